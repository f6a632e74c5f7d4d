/* Two FUSE operations past pyfuse3: lseek, for SEEK_DATA and SEEK_HOLE, which it does not bind; and read, for which it
 * starts a coroutine where a call would do.
 *
 * pyfuse3 hands libfuse a table of operations in which .lseek is empty, and gives no way to fill it in. So this
 * library defines the function by which the table is handed over. Loaded with RTLD_GLOBAL before pyfuse3 is
 * imported, it comes first when the dynamic linker binds pyfuse3's reference; it copies the table, fills in
 * .lseek and .read, and passes the copy on to the function that pyfuse3 would have called without us.
 *
 * In the same way it stands in for the functions by which pyfuse3 waits for requests and receives them (receiving.c):
 * rbdfs waits itself, and has reads begun by a call; or takes them to librbd and back without Python (shortcut.c).
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
#include "lowlevel.h"
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

struct libfuse_version; /* new in the headers of 3.17 */

typedef struct fuse_session *(*session_new)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *);
typedef struct fuse_session *(*session_new_versioned)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
						      struct libfuse_version *, void *);

/* All of this belongs to the one thread that makes the session and serves it. */
static lseek_callback on_lseek;
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
	if (!rbdfs_received_read(req, inode, fi->fh, offset, size))
		pyfuse3_read(req, inode, size, offset, fi);
}

/* What `name` would have been bound to without this library, for the code at `caller`: dlsym() on the calling
 * object searches that object and its dependencies. RTLD_NEXT would not do: it starts from this library's
 * dependencies, and pyfuse3's, loaded by Python with RTLD_LOCAL, are not among them. */
void *rbdfs_find(const char *name, void *caller)
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
	reply_lseek = rbdfs_find("fuse_reply_lseek", caller);
	reply_buf = rbdfs_find("fuse_reply_buf", caller);
	reply_err = rbdfs_find("fuse_reply_err", caller);
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
	session_new next = rbdfs_find(name, caller);
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
	session_new_versioned next = rbdfs_find(name, caller);
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
