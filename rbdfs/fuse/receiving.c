/* Where requests come from. pyfuse3 waits for `gate`: while rbdfs receives, that tells of what it has kept for pyfuse3,
 * else of the kernel. rbdfs waits for `ours`: the kernel, or what a thread of its own has received and handed over.
 * The thread is there while any file takes the shortcut (shortcut.c). One session at a time, as pyfuse3 has it.
 */
#include "lowlevel.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct kept {
	struct kept *next;
	size_t size;
	char request[];
};

/* Newer libfuses write into fields of a fuse_buf that the headers of this build may not have (3.17: mem_size). */
struct buffer {
	struct fuse_buf buf;
	char fields_to_come[64];
};

static struct {
	struct fuse_session *session;
	int kernel, gate, ours;
	int kept_event, handed_event, stop_event; /* eventfds */
	int is_ours;                              /* rbdfs receives */
	int has_thread;
	pthread_t thread;
	struct buffer received; /* by the main thread */
	pthread_mutex_t lock;   /* for all below: */
	struct kept *kept, **last_kept;
	struct read *handed, **last_handed;
	int has_ended, ended; /* what the kernel said in the end */
} in = { .kernel = -1, .gate = -1, .lock = PTHREAD_MUTEX_INITIALIZER };

static __thread int in_thread; /* this is the receiving thread */
static read_callback on_read;
static arrived_callback on_arrived;
static int (*next_receive_buf)(struct fuse_session *, struct fuse_buf *);
static void (*process_buf)(struct fuse_session *, const struct fuse_buf *);

/* Who answers reads from now on; NULL for pyfuse3. */
void rbdfs_on_read(read_callback begun, arrived_callback arrived)
{
	on_read = begun;
	on_arrived = arrived;
}

static int add(int epoll, int fd)
{
	struct epoll_event readable = { .events = EPOLLIN };

	return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &readable);
}

static int turn_gate(int from, int to)
{
	epoll_ctl(in.gate, EPOLL_CTL_DEL, from, NULL);
	return add(in.gate, to);
}

static int make_events(void)
{
	if (in.gate >= 0)
		return 0;
	in.kept_event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	in.handed_event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	in.stop_event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	in.ours = epoll_create1(EPOLL_CLOEXEC);
	in.gate = epoll_create1(EPOLL_CLOEXEC);
	return add(in.ours, in.handed_event); /* fails, if any of these did */
}

int session_fd(struct fuse_session *session) __asm__("fuse_session_fd");
int session_fd(struct fuse_session *session)
{
	void *caller = __builtin_return_address(0);
	int (*next)(struct fuse_session *) = rbdfs_find("fuse_session_fd", caller);

	next_receive_buf = rbdfs_find("fuse_session_receive_buf", caller);
	process_buf = rbdfs_find("fuse_session_process_buf", caller);
	in.kernel = next(session);
	in.session = NULL;
	if (make_events() || turn_gate(in.kept_event, in.kernel))
		return in.kernel;
	in.session = session;
	in.has_ended = 0;
	in.last_kept = &in.kept;
	in.last_handed = &in.handed;
	return in.gate;
}

/* From now on rbdfs_receive() has the kernel's requests: the descriptor to wait for; -1 if that cannot be. */
int rbdfs_begin_receiving(void)
{
	if (!in.session || turn_gate(in.kernel, in.kept_event) || add(in.ours, in.kernel))
		return -1;
	fcntl(in.kernel, F_SETFL, fcntl(in.kernel, F_GETFL) | O_NONBLOCK);
	in.is_ours = 1;
	return in.ours;
}

static struct read *take_handed(void)
{
	struct read *read;
	eventfd_t count;

	pthread_mutex_lock(&in.lock);
	read = in.handed;
	if (read)
		in.handed = read->next;
	if (read && !in.handed) { /* the event is there as long as a read is */
		in.last_handed = &in.handed;
		if (!in.has_ended)
			eventfd_read(in.handed_event, &count);
	}
	pthread_mutex_unlock(&in.lock);
	return read;
}

/* pyfuse3 has them again. Reads that are under way without Python are answered ECONNABORTED. */
void rbdfs_end_receiving(void)
{
	struct read *read;

	if (!in.is_ours)
		return;
	rbdfs_end_thread();
	rbdfs_abort_shortcuts();
	while ((read = take_handed())) {
		rbdfs_reply_error(read->req, ECONNABORTED);
		free(read);
	}
	in.is_ours = 0;
	epoll_ctl(in.ours, EPOLL_CTL_DEL, in.kernel, NULL);
	turn_gate(in.kept_event, in.kernel);
}

/* For Python: it gets this read from rbdfs_receive(). For any thread. */
void rbdfs_hand_over(struct read *read)
{
	read->next = NULL;
	pthread_mutex_lock(&in.lock);
	*in.last_handed = read;
	in.last_handed = &read->next;
	eventfd_write(in.handed_event, 1);
	pthread_mutex_unlock(&in.lock);
}

static int keep(const struct fuse_buf *buf)
{
	struct kept *kept = malloc(sizeof *kept + buf->size);

	if (!kept)
		return -ENOMEM;
	kept->next = NULL;
	kept->size = buf->size;
	memcpy(kept->request, buf->mem, buf->size);
	pthread_mutex_lock(&in.lock);
	*in.last_kept = kept;
	in.last_kept = &kept->next;
	eventfd_write(in.kept_event, 1);
	pthread_mutex_unlock(&in.lock);
	return 0;
}

/* The session is over: tell whoever waits. */
static void end(int ended)
{
	pthread_mutex_lock(&in.lock);
	in.has_ended = 1;
	in.ended = ended;
	eventfd_write(in.kept_event, 1);
	eventfd_write(in.handed_event, 1);
	pthread_mutex_unlock(&in.lock);
}

/* Take one request from the kernel: a read is begun, any other kept for pyfuse3. 1 if there was one, 0 if not, -1 at the
 * end of the session. */
static int receive(struct fuse_buf *buf)
{
	int received = next_receive_buf(in.session, buf);

	if (received == -EINTR)
		return 1;
	if (received == -EAGAIN)
		return 0;
	if (received > 0) {
		if (on_read && ((struct fuse_in_header *)buf->mem)->opcode == FUSE_READ) {
			process_buf(in.session, buf);
			return 1;
		}
		received = keep(buf);
		if (!received)
			return 1;
	}
	end(received);
	return -1;
}

/* Called by libfuse, inside of process_buf(). 0 if the read is pyfuse3's. */
int rbdfs_received_read(fuse_req_t req, uint64_t inode, uint64_t fh, int64_t offset, size_t size)
{
	struct read *read;

	if (!on_read)
		return 0;
	if (!in_thread) {
		on_read(req, inode, fh, offset, size);
	} else if (!rbdfs_take_shortcut(req, inode, fh, offset, size)) {
		read = malloc(sizeof *read);
		if (!read) {
			rbdfs_reply_error(req, ENOMEM);
			return 1;
		}
		*read = (struct read){ .req = req, .inode = inode, .fh = fh, .offset = offset, .size = size };
		rbdfs_hand_over(read);
	}
	return 1;
}

/* In the main thread, with the GIL: have one request served, as far as it is ours. 1 if there was one, 0 if not, -1 at
 * the end of the session. */
int rbdfs_receive(void)
{
	struct read *read = take_handed();

	if (!read)
		return in.has_ended ? -1 : in.has_thread ? 0 : receive(&in.received.buf);
	if (read->has_arrived)
		on_arrived(read->req, read->inode, read->fh, read->offset, read->size, read->result, read->data);
	else
		on_read(read->req, read->inode, read->fh, read->offset, read->size);
	free(read);
	return 1;
}

static void *receive_until_stopped(void *unused)
{
	struct pollfd waits[] = { { .fd = in.kernel, .events = POLLIN }, { .fd = in.stop_event, .events = POLLIN } };
	struct buffer buffer = { 0 };
	int received;

	(void)unused;
	in_thread = 1;
	while ((received = receive(&buffer.buf)) >= 0)
		if (!received && poll(waits, 2, -1) > 0 && waits[1].revents)
			break;
	free(buffer.buf.mem);
	return NULL;
}

/* From now on a thread takes the kernel's requests, until rbdfs_end_thread(). Returns 0, or an errno. */
int rbdfs_begin_thread(void)
{
	sigset_t all, before;
	int error;

	if (!in.is_ours)
		return ENOTCONN;
	if (in.has_thread)
		return 0;
	epoll_ctl(in.ours, EPOLL_CTL_DEL, in.kernel, NULL);
	sigfillset(&all); /* signals are Python's */
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&in.thread, NULL, receive_until_stopped, NULL);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (error)
		add(in.ours, in.kernel);
	else
		pthread_setname_np(in.thread, "receiver");
	in.has_thread = !error;
	return error;
}

void rbdfs_end_thread(void)
{
	eventfd_t count;

	if (!in.has_thread)
		return;
	eventfd_write(in.stop_event, 1);
	pthread_join(in.thread, NULL);
	eventfd_read(in.stop_event, &count);
	in.has_thread = 0;
	add(in.ours, in.kernel);
}

/* The next request for pyfuse3; -EINTR, upon which it waits again, if there is none. */
int receive_buf(struct fuse_session *session, struct fuse_buf *buf) __asm__("fuse_session_receive_buf");
int receive_buf(struct fuse_session *session, struct fuse_buf *buf)
{
	struct kept *kept;
	eventfd_t count;

	free(buf->mem); /* may be one of ours, which are as large as the request, or one of libfuse's, which are not */
	buf->mem = NULL;
	pthread_mutex_lock(&in.lock);
	kept = in.kept;
	if (kept)
		in.kept = kept->next;
	if (kept && !in.kept) {
		in.last_kept = &in.kept;
		if (!in.has_ended)
			eventfd_read(in.kept_event, &count);
	}
	pthread_mutex_unlock(&in.lock);
	if (!kept && !in.is_ours)
		return next_receive_buf(session, buf);
	if (!kept)
		return in.has_ended ? in.ended : -EINTR;
	buf->size = kept->size;
	buf->mem = malloc(kept->size);
	if (buf->mem)
		memcpy(buf->mem, kept->request, kept->size);
	free(kept);
	return buf->mem ? (int)buf->size : -ENOMEM;
}
