/* Scattered reads: from the kernel to librbd and back, without Python.
 *
 * A small read that is not near any other is not in the cache and starts no readahead: there is nothing to decide, and
 * the way through Python and back costs as much as the cluster takes to answer. For a file that is read so, the receiving
 * thread (receiving.c) starts librbd's aio itself, and librbd's thread answers the kernel.
 *
 * All else is handed over to Python, and where there is a doubt it is all else: a read near one before, larger, beyond
 * the end or over two objects; one of a block of which the cache holds anything; a read that failed; bytes that may be
 * what is left of an image that was removed or shrunk (rbdfs/ceph/changes.py).
 *
 * Nothing here is linked to librbd: Python gives its functions' addresses.
 */
#include "lowlevel.h"
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
	MAX_BYTES = 64 << 10, /* of a scattered read */
	MAX_IN_FLIGHT = 128,  /* in all; librados holds the caller up at 1024 (objecter_inflight_ops) */
	FRONTS = 8,           /* as Readahead's STREAMS */
	SKIP_READS = 8,       /* as Readahead's */
	FILES = 256,          /* lists of files, by handle */
};

/* As _Image in shortcut.py: librbd's functions, an image that is open in librbd, and what it takes to read it so. */
struct image {
	void *image;
	int (*create_completion)(void *argument, void (*completed)(void *, void *), void **completion);
	int (*aio_read)(void *image, uint64_t offset, size_t size, char *buffer, void *completion);
	ssize_t (*get_return_value)(void *completion);
	void (*release)(void *completion);
	uint64_t size, object_size; /* bytes */
	int is_constant;            /* a snapshot */
	const uint32_t *held;       /* for each block, modulo `blocks`, how much of it the cache holds; 0 is nothing */
	uint64_t block_size, blocks;
};

/* One for each image, for all files that are open on it. */
struct shortcut {
	struct image image;
	int64_t until; /* ns of CLOCK_MONOTONIC: how long reads may take it */
	uint64_t in_flight, answered;
};

/* One open(). */
struct file {
	struct file *next;
	uint64_t fh;
	struct shortcut *shortcut;
	uint64_t fronts[FRONTS]; /* where the latest reads have ended; the newest first */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* for all of the above and below */
static pthread_cond_t replied = PTHREAD_COND_INITIALIZER;
static struct file *files[FILES];
static unsigned open_files;
static struct read in_flight = { .next = &in_flight, .previous = &in_flight };
static unsigned reads, replying;

static int64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* NULL if there is no memory. To be freed when no file takes it and nothing is in flight. */
struct shortcut *rbdfs_new_shortcut(const struct image *image)
{
	struct shortcut *new = calloc(1, sizeof *new);

	if (new)
		new->image = *image;
	return new;
}

void rbdfs_free_shortcut(struct shortcut *shortcut)
{
	free(shortcut);
}

/* Reads may take it for so long from now; not at all from now on, if that is not positive. */
void rbdfs_open_shortcut(struct shortcut *shortcut, double seconds)
{
	pthread_mutex_lock(&lock);
	shortcut->until = seconds > 0 ? now() + (int64_t)(seconds * 1e9) : 0;
	pthread_mutex_unlock(&lock);
}

static uint64_t count(const uint64_t *counter)
{
	uint64_t value;

	pthread_mutex_lock(&lock);
	value = *counter;
	pthread_mutex_unlock(&lock);
	return value;
}

/* Reads that librbd has not answered yet. */
uint64_t rbdfs_in_flight(const struct shortcut *shortcut)
{
	return count(&shortcut->in_flight);
}

/* Reads that were answered without Python so far. */
uint64_t rbdfs_answered(const struct shortcut *shortcut)
{
	return count(&shortcut->answered);
}

static struct file **place_of(uint64_t fh)
{
	struct file **place = &files[fh % FILES];

	while (*place && (*place)->fh != fh)
		place = &(*place)->next;
	return place;
}

/* This file's scattered reads take the shortcut from now on. Returns 0, or an errno. */
int rbdfs_begin_file(uint64_t fh, struct shortcut *shortcut)
{
	struct file *file = calloc(1, sizeof *file);
	int error;

	if (!file)
		return ENOMEM;
	file->fh = fh;
	file->shortcut = shortcut;
	memset(file->fronts, 0xff, sizeof file->fronts); /* nowhere */
	pthread_mutex_lock(&lock);
	file->next = files[fh % FILES];
	files[fh % FILES] = file;
	open_files++;
	pthread_mutex_unlock(&lock);
	error = rbdfs_begin_thread();
	if (error)
		rbdfs_end_file(fh);
	return error;
}

/* This file's reads are all Python's. */
void rbdfs_end_file(uint64_t fh)
{
	struct file **place, *file;
	unsigned left;

	pthread_mutex_lock(&lock);
	place = place_of(fh);
	file = *place;
	if (file) {
		*place = file->next;
		open_files--;
	}
	left = open_files;
	pthread_mutex_unlock(&lock);
	free(file);
	if (!left)
		rbdfs_end_thread();
}

/* Whether a read of [offset, end) goes on where one before has ended, or nearly: then it is Readahead's. */
static int is_near(struct file *file, uint64_t offset, uint64_t end)
{
	const uint64_t skip = SKIP_READS * (end - offset);
	uint64_t front = end;
	int i, near = 0;

	for (i = 0; i < FRONTS && !near; i++) {
		front = file->fronts[i];
		near = front != UINT64_MAX && offset <= front + skip && front <= end + skip;
	}
	i = near ? i - 1 : FRONTS - 1;
	memmove(file->fronts + 1, file->fronts, i * sizeof *file->fronts);
	file->fronts[0] = near && front > end ? front : end;
	return near;
}

static int is_held(const struct image *image, uint64_t offset)
{
	/* Without the GIL: what Python is just about to fetch may be fetched twice. */
	return __atomic_load_n(&image->held[offset / image->block_size % image->blocks], __ATOMIC_RELAXED);
}

static int may_take(struct file *file, uint64_t offset, size_t size)
{
	const struct image *image = &file->shortcut->image;
	const uint64_t last = offset + size - 1;

	return !is_near(file, offset, offset + size) && size <= MAX_BYTES && last < image->size &&
	       offset / image->object_size == last / image->object_size && !is_held(image, offset) &&
	       !is_held(image, last) && reads < MAX_IN_FLIGHT && now() < file->shortcut->until;
}

static void forget(struct read *read)
{
	read->next->previous = read->previous;
	read->previous->next = read->next;
	reads--;
}

/* Whether these are surely the image's bytes. An object that was removed or cut ends in zeros; a snapshot's data is
 * there for a while after it was seen in its place (is_in_doubt in rbdfs/ceph/image.py). */
static int is_settled(const struct read *read)
{
	if (read->result != (int64_t)read->size)
		return 0;
	return read->shortcut->image.is_constant ? now() < read->shortcut->until : read->data[read->size - 1] != 0;
}

/* librbd has answered; in a thread of its own. */
static void completed(void *completion, void *argument)
{
	struct read *read = argument;
	struct shortcut *shortcut = read->shortcut;
	int is_ours, settled;

	read->result = shortcut->image.get_return_value(completion);
	read->has_arrived = 1;
	shortcut->image.release(completion);
	pthread_mutex_lock(&lock);
	is_ours = read->req != NULL;
	settled = is_ours && is_settled(read);
	if (is_ours)
		forget(read);
	shortcut->answered += settled;
	replying++;
	pthread_mutex_unlock(&lock);
	if (settled)
		rbdfs_reply_read(read->req, read->data, 0, read->size);
	if (is_ours && !settled)
		rbdfs_hand_over(read);
	else
		free(read);
	pthread_mutex_lock(&lock);
	shortcut->in_flight--;
	if (!--replying)
		pthread_cond_broadcast(&replied);
	pthread_mutex_unlock(&lock);
}

/* In the receiving thread: start to read, if this read may be answered so; 0 if not. */
int rbdfs_take_shortcut(fuse_req_t req, uint64_t inode, uint64_t fh, int64_t offset, size_t size)
{
	struct file *file;
	struct read *read = NULL;
	void *completion;

	pthread_mutex_lock(&lock);
	file = *place_of(fh);
	if (file && size && may_take(file, offset, size))
		read = malloc(sizeof *read + size);
	if (read) {
		*read = (struct read){ .req = req, .inode = inode, .fh = fh, .offset = offset, .size = size,
				       .shortcut = file->shortcut, .next = &in_flight, .previous = in_flight.previous };
		in_flight.previous->next = read;
		in_flight.previous = read;
		reads++;
		file->shortcut->in_flight++;
	}
	pthread_mutex_unlock(&lock);
	if (!read)
		return 0;
	read->shortcut->image.create_completion(read, completed, &completion); /* always 0, as rbd_aio_read */
	read->shortcut->image.aio_read(read->shortcut->image.image, offset, size, read->data, completion);
	return 1;
}

/* Answer all that is under way ECONNABORTED, and see that nothing is answered after the return. */
void rbdfs_abort_shortcuts(void)
{
	struct read *read;

	pthread_mutex_lock(&lock);
	while ((read = in_flight.next) != &in_flight) {
		forget(read);
		rbdfs_reply_error(read->req, ECONNABORTED);
		read->req = NULL; /* freed when librbd is done with it */
	}
	while (replying)
		pthread_cond_wait(&replied, &lock);
	pthread_mutex_unlock(&lock);
}
