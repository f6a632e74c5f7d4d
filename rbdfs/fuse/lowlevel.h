/* What the files of the C library have of each other. Names that begin with rbdfs_ are seen by the whole process. */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#define FUSE_USE_VERSION 35
#include <fuse3/fuse_lowlevel.h>
#include <stdint.h>

/* Called for each request, in the thread and inside the call of fuse_session_process_buf() or rbdfs_receive(). Must not
 * block. Whoever is called owns `req` and answers it, then or later, by exactly one of the reply functions. */
typedef void (*lseek_callback)(void *req, uint64_t inode, uint64_t fh, int64_t offset, int whence);
typedef void (*read_callback)(void *req, uint64_t inode, uint64_t fh, int64_t offset, size_t size);

/* The same for a read that librbd has answered, with `result` (a count of bytes or a negative errno) and `data`, which
 * is gone when the call returns; but it takes more to know whether that is the answer. */
typedef void (*arrived_callback)(void *req, uint64_t inode, uint64_t fh, int64_t offset, size_t size, int64_t result,
				 const char *data);

/* A read() that is on its way without Python. */
struct read {
	struct read *next, *previous;
	fuse_req_t req; /* NULL once it was answered */
	uint64_t inode, fh;
	int64_t offset;
	size_t size;
	struct shortcut *shortcut;
	int has_arrived;
	int64_t result;
	char data[];
};

/* lowlevel.c */
void *rbdfs_find(const char *name, void *caller);
int rbdfs_reply_read(void *req, const char *buffer, size_t start, size_t size);
int rbdfs_reply_error(void *req, int errnum);

/* receiving.c */
int rbdfs_received_read(fuse_req_t req, uint64_t inode, uint64_t fh, int64_t offset, size_t size);
void rbdfs_hand_over(struct read *read);
int rbdfs_begin_thread(void);
void rbdfs_end_thread(void);

/* shortcut.c */
int rbdfs_take_shortcut(fuse_req_t req, uint64_t inode, uint64_t fh, int64_t offset, size_t size);
void rbdfs_end_file(uint64_t fh);
void rbdfs_abort_shortcuts(void);
