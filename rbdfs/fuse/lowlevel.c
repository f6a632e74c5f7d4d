/* The FUSE operation that pyfuse3 does not bind: lseek, for SEEK_DATA and SEEK_HOLE.
 *
 * pyfuse3 hands libfuse a table of operations in which .lseek is empty, and gives no way to fill it in. So this
 * library defines the function by which the table is handed over. Loaded with RTLD_GLOBAL before pyfuse3 is
 * imported, it comes first when the dynamic linker binds pyfuse3's reference; it copies the table, fills in
 * .lseek, and passes the copy on to the function that pyfuse3 would have called without us.
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
#include <fuse3/fuse_lowlevel.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct libfuse_version; /* new in the headers of 3.17 */

/* Called for each request, in the thread and inside the call of fuse_session_process_buf(). Must not block.
 * Whoever is called owns `req` and answers it, then or later, by exactly one of the two reply functions below. */
typedef void (*lseek_callback)(void *req, uint64_t inode, uint64_t fh, int64_t offset, int whence);

typedef struct fuse_session *(*session_new)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);
typedef struct fuse_session *(*session_new_versioned)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
						      struct libfuse_version *, void *);

/* All of this belongs to the one thread that makes the session and serves it. */
static lseek_callback callback;
static int (*reply_lseek)(fuse_req_t req, off_t offset);
static int (*reply_err)(fuse_req_t req, int errnum);
static int sessions;

/* How many sessions have got their .lseek from us. */
int rbdfs_lseek_sessions(void)
{
	return sessions;
}

/* Who answers requests from now on; NULL for nobody. */
void rbdfs_lseek_callback(lseek_callback answer)
{
	callback = answer;
}

/* Both replies return 0 or -errno: -ENOENT where the caller was interrupted, -ENODEV after an unmount. In either
 * case `req` is gone. */
int rbdfs_lseek_reply(void *req, int64_t offset)
{
	return reply_lseek(req, offset);
}

int rbdfs_lseek_error(void *req, int errnum)
{
	return reply_err(req, errnum);
}

static void op_lseek(fuse_req_t req, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *fi)
{
	if (callback)
		callback(req, inode, fi->fh, offset, whence);
	else
		reply_err(req, EOPNOTSUPP); /* not ENOSYS: the kernel would never ask again */
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

/* A copy of the table with .lseek filled in, to be freed by the caller; NULL to pass the table on as it is.
 * `*size` is the table's size as pyfuse3's headers have it, and never shrinks: a newer libfuse has operations
 * behind .lseek. */
static struct fuse_lowlevel_ops *with_lseek(const struct fuse_lowlevel_ops *op, size_t *size, void *caller)
{
	const size_t needed = offsetof(struct fuse_lowlevel_ops, lseek) + sizeof op->lseek;
	struct fuse_lowlevel_ops *copy;

	if (!op || (*size >= needed && op->lseek)) /* somebody else's session, or a pyfuse3 that has learned lseek */
		return NULL;
	reply_lseek = find("fuse_reply_lseek", caller);
	reply_err = find("fuse_reply_err", caller);
	if (!reply_lseek || !reply_err) /* libfuse before 3.8 */
		return NULL;
	copy = calloc(1, *size > needed ? *size : needed);
	if (!copy)
		return NULL;
	memcpy(copy, op, *size);
	copy->lseek = op_lseek;
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
	copy = with_lseek(op, &op_size, caller);
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
	copy = with_lseek(op, &op_size, caller);
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
