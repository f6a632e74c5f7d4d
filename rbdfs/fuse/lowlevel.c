/* Two FUSE operations past pyfuse3: lseek, for SEEK_DATA and SEEK_HOLE, which it does not bind; and read, for which it
 * starts a coroutine where a call would do.
 *
 * pyfuse3 hands libfuse a table of operations in which .lseek is empty, and gives no way to fill it in. So this
 * library defines the function by which the table is handed over. Loaded with RTLD_GLOBAL before pyfuse3 is
 * imported, it comes first when the dynamic linker binds pyfuse3's reference; it copies the table, fills in
 * .lseek and .read, and passes the copy on to the function that pyfuse3 would have called without us.
 *
 * In the same way it stands in for the functions by which pyfuse3 waits for requests and receives them. rbdfs waits
 * itself, and has reads begun by a call, as many in a row as the kernel has; other requests are kept for pyfuse3.
 *
 * That function has had several names:
 *
 *   fuse_session_new             exported up to libfuse 3.16; since then kept for old binaries
 *   _fuse_session_new            3.17: the header's inline fuse_session_new() calls it, with the version of the header
 *   _fuse_session_new_317        the same, where libfuse was built without symbol versions
 *   fuse_session_new_versioned   the same, in later releases (3.18)
 *
 * Nothing here is linked to libfuse: what it needs it looks up in the caller's own libraries, so that one build
 * serves libfuse3.so.3 and libfuse3.so.4 and never brings a second libfuse into the process.
 *
 * It is no Python module: rbdfs/fuse/lowlevel.py loads it through ctypes.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#define FUSE_USE_VERSION 35
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse_lowlevel.h>
#include <linux/fuse.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

struct libfuse_version; /* new in the headers of 3.17 */

/* Called for each request, in the thread and inside the call of fuse_session_process_buf(). Must not block.
 * Whoever is called owns `req` and answers it, then or later, by exactly one of the two reply functions below. */
typedef void (*lseek_callback)(void *req, uint64_t inode, uint64_t fh, int64_t offset, int whence);
typedef void (*read_callback)(void *req, uint64_t inode, uint64_t fh, int64_t offset, size_t size);

typedef struct fuse_session *(*session_new)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);
typedef struct fuse_session *(*session_new_versioned)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
						      struct libfuse_version *, void *);

/* All of this belongs to the one thread that makes the session and serves it. */
static lseek_callback on_lseek;
static read_callback on_read;
static void (*pyfuse3_read)(fuse_req_t req, fuse_ino_t inode, size_t size, off_t offset, struct fuse_file_info *fi);
static int (*reply_lseek)(fuse_req_t req, off_t offset);
static int (*reply_buf)(fuse_req_t req, const char *buf, size_t size);
static int (*reply_err)(fuse_req_t req, int errnum);
static int sessions;

/* How many sessions have got their operations from us. */
int rbdfs_sessions(void)
{
	return sessions;
}

/* Who answers requests from now on; NULL for nobody. */
void rbdfs_on_lseek(lseek_callback answer)
{
	on_lseek = answer;
}

/* The same; NULL for pyfuse3. */
void rbdfs_on_read(read_callback answer)
{
	on_read = answer;
}

/* All replies return 0 or -errno: -ENOENT where the caller was interrupted, -ENODEV after an unmount. In either
 * case `req` is gone. */
int rbdfs_reply_lseek(void *req, int64_t offset)
{
	return reply_lseek(req, offset);
}

int rbdfs_reply_read(void *req, const char *buffer, size_t start, size_t size)
{
	return reply_buf(req, buffer + start, size);
}

int rbdfs_reply_error(void *req, int errnum)
{
	return reply_err(req, errnum);
}

static void op_lseek(fuse_req_t req, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *fi)
{
	if (on_lseek)
		on_lseek(req, inode, fi->fh, offset, whence);
	else
		reply_err(req, EOPNOTSUPP); /* not ENOSYS: the kernel would never ask again */
}

static void op_read(fuse_req_t req, fuse_ino_t inode, size_t size, off_t offset, struct fuse_file_info *fi)
{
	if (on_read)
		on_read(req, inode, fi->fh, offset, size);
	else
		pyfuse3_read(req, inode, size, offset, fi);
}

/* What `name` would have been bound to without this library, for the code at `caller`: dlsym() on the calling
 * object searches that object and its dependencies. RTLD_NEXT would not do: it starts from this library's
 * dependencies, and pyfuse3's, loaded by Python with RTLD_LOCAL, are not among them. */
static void *find(const char *name, void *caller)
{
	Dl_info info;
	void *object, *symbol = NULL;

	if (dladdr(caller, &info) && (object = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD))) {
		symbol = dlsym(object, name);
#ifdef __GLIBC__
		if (!symbol) /* libfuse 3.17 hides the old fuse_session_new() from lookups without a version */
			symbol = dlvsym(object, name, "FUSE_3.0");
#endif
		dlclose(object); /* the caller keeps it loaded */
	}
	return symbol ? symbol : dlsym(RTLD_NEXT, name);
}

/* A copy of the table with ours filled in, to be freed by the caller; NULL to pass the table on as it is.
 * `*size` is the table's size as pyfuse3's headers have it, and never shrinks: a newer libfuse has operations
 * behind .lseek. */
static struct fuse_lowlevel_ops *with_ours(const struct fuse_lowlevel_ops *op, size_t *size, void *caller)
{
	const size_t needed = offsetof(struct fuse_lowlevel_ops, lseek) + sizeof op->lseek;
	struct fuse_lowlevel_ops *copy;

	if (!op || (*size >= needed && op->lseek)) /* somebody else's session, or a pyfuse3 that has learned lseek */
		return NULL;
	reply_lseek = find("fuse_reply_lseek", caller);
	reply_buf = find("fuse_reply_buf", caller);
	reply_err = find("fuse_reply_err", caller);
	if (!reply_lseek || !reply_buf || !reply_err) /* libfuse before 3.8 */
		return NULL;
	copy = calloc(1, *size > needed ? *size : needed);
	if (!copy)
		return NULL;
	memcpy(copy, op, *size);
	copy->lseek = op_lseek;
	pyfuse3_read = op->read;
	copy->read = op_read;
	if (*size < needed)
		*size = needed;
	sessions++;
	return copy;
}

static struct fuse_session *next_session_new(const char *name, void *caller, struct fuse_args *args,
					     const struct fuse_lowlevel_ops *op, size_t op_size, void *userdata)
{
	session_new next = find(name, caller);
	struct fuse_lowlevel_ops *copy;
	struct fuse_session *session;

	if (!next)
		return NULL;
	copy = with_ours(op, &op_size, caller);
	session = next(args, copy ? copy : op, op_size, userdata);
	free(copy); /* libfuse keeps a copy of its own */
	return session;
}

static struct fuse_session *next_session_new_versioned(const char *name, void *caller, struct fuse_args *args,
						       const struct fuse_lowlevel_ops *op, size_t op_size,
						       struct libfuse_version *version, void *userdata)
{
	session_new_versioned next = find(name, caller);
	struct fuse_lowlevel_ops *copy;
	struct fuse_session *session;

	if (!next)
		return NULL;
	copy = with_ours(op, &op_size, caller);
	session = next(args, copy ? copy : op, op_size, version, userdata);
	free(copy);
	return session;
}

/* The exported names are given to the assembler only: as C names, libfuse's headers have them as prototypes,
 * macros or inline functions, by turns. */
#define CALLER __builtin_return_address(0)

struct fuse_session *session_new_30(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t op_size,
				    void *userdata) __asm__("fuse_session_new");
struct fuse_session *session_new_30(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t op_size,
				    void *userdata)
{
	return next_session_new("fuse_session_new", CALLER, args, op, op_size, userdata);
}

#define INTERPOSE_VERSIONED(function, name) \
	struct fuse_session *function(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t op_size, \
				      struct libfuse_version *version, void *userdata) __asm__(name); \
	struct fuse_session *function(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t op_size, \
				      struct libfuse_version *version, void *userdata) \
	{ \
		return next_session_new_versioned(name, CALLER, args, op, op_size, version, userdata); \
	}

INTERPOSE_VERSIONED(session_new_317, "_fuse_session_new")
INTERPOSE_VERSIONED(session_new_317_unversioned, "_fuse_session_new_317")
INTERPOSE_VERSIONED(session_new_318, "fuse_session_new_versioned")

/* Where requests come from. pyfuse3 waits for `gate`: while rbdfs receives, that tells of what it has kept for pyfuse3,
 * else of the kernel. One session at a time, as pyfuse3 has it. */
struct kept {
	struct kept *next;
	size_t size;
	char request[];
};

static struct {
	struct fuse_session *session;
	int kernel, gate, kept_event;
	int is_ours;          /* rbdfs receives */
	struct kept *kept, **last;
	int has_ended, ended; /* what the kernel said in the end */
	struct {
		struct fuse_buf buf;
		char fields_to_come[64];
	} received;
} in = { .kernel = -1, .gate = -1, .kept_event = -1 };

static int (*next_receive_buf)(struct fuse_session *, struct fuse_buf *);
static void (*process_buf)(struct fuse_session *, const struct fuse_buf *);

static int turn_gate(int from, int to)
{
	struct epoll_event readable = { .events = EPOLLIN };

	epoll_ctl(in.gate, EPOLL_CTL_DEL, from, NULL);
	return epoll_ctl(in.gate, EPOLL_CTL_ADD, to, &readable);
}

int session_fd(struct fuse_session *session) __asm__("fuse_session_fd");
int session_fd(struct fuse_session *session)
{
	int (*next)(struct fuse_session *) = find("fuse_session_fd", CALLER);

	next_receive_buf = find("fuse_session_receive_buf", CALLER);
	process_buf = find("fuse_session_process_buf", CALLER);
	if (in.gate < 0)
		in.gate = epoll_create1(EPOLL_CLOEXEC);
	if (in.kept_event < 0)
		in.kept_event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	in.kernel = next(session);
	in.session = NULL;
	if (in.kept_event < 0 || turn_gate(in.kept_event, in.kernel))
		return in.kernel;
	in.session = session;
	in.has_ended = 0;
	in.last = &in.kept;
	return in.gate;
}

/* From now on rbdfs_receive() has the kernel's requests: the descriptor to wait for; -1 if that cannot be. */
int rbdfs_begin_receiving(void)
{
	if (!in.session || turn_gate(in.kernel, in.kept_event))
		return -1;
	fcntl(in.kernel, F_SETFL, fcntl(in.kernel, F_GETFL) | O_NONBLOCK);
	in.is_ours = 1;
	return in.kernel;
}

/* pyfuse3 has them again. */
void rbdfs_end_receiving(void)
{
	in.is_ours = 0;
	turn_gate(in.kept_event, in.kernel);
}

static int keep(const struct fuse_buf *buf)
{
	struct kept *kept = malloc(sizeof *kept + buf->size);

	if (!kept)
		return -ENOMEM;
	kept->next = NULL;
	kept->size = buf->size;
	memcpy(kept->request, buf->mem, buf->size);
	*in.last = kept;
	in.last = &kept->next;
	eventfd_write(in.kept_event, 1);
	return 0;
}

/* Take one request from the kernel: a read is begun, any other kept for pyfuse3. 1 if there was one, 0 if not, -1 at
 * the end of the session, of which pyfuse3 is told as well. */
int rbdfs_receive(void)
{
	struct fuse_buf *buf = &in.received.buf;
	int received = next_receive_buf(in.session, buf);

	if (received == -EAGAIN || received == -EINTR)
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
	in.has_ended = 1;
	in.ended = received;
	eventfd_write(in.kept_event, 1);
	return -1;
}

/* The next request for pyfuse3; -EINTR, upon which it waits again, if there is none. */
int receive_buf(struct fuse_session *session, struct fuse_buf *buf) __asm__("fuse_session_receive_buf");
int receive_buf(struct fuse_session *session, struct fuse_buf *buf)
{
	struct kept *kept = in.kept;
	eventfd_t count;

	free(buf->mem); /* may be one of ours, which are as large as the request, or one of libfuse's, which are not */
	buf->mem = NULL;
	if (!kept && !in.is_ours)
		return next_receive_buf(session, buf);
	if (!kept)
		return in.has_ended ? in.ended : -EINTR;
	buf->mem = malloc(kept->size);
	if (!buf->mem)
		return -ENOMEM;
	buf->size = kept->size;
	memcpy(buf->mem, kept->request, kept->size);
	in.kept = kept->next;
	free(kept);
	if (!in.kept) {
		in.last = &in.kept;
		if (!in.has_ended)
			eventfd_read(in.kept_event, &count);
	}
	return (int)buf->size;
}
