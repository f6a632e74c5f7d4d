/*
 * Reads of librbd into memory of Ceph's own.
 *
 * librbd's C API copies what was read from the messenger's buffer into the caller's. Its C++ API hands the messenger's
 * buffer over, in a ceph::bufferlist; a read within one object is one piece of memory. What the C API has opened and
 * created is used here through the C++ API:
 *
 *   rbd_image_t       is the pointer that a librbd::Image holds, as its only member (librbd.cc: rbd_open, Image)
 *   rbd_completion_t  is a librbd::RBD::AioCompletion * (librbd.cc: rbd_aio_create_completion)
 *
 * The layout of a bufferlist is part of its name (ceph::buffer::v15_2_0::list): with a Ceph that has another one, this
 * library does not load, rather than to read wrong.
 *
 * It is no Python module: rbdfs/ceph/bufferlist.py loads it through ctypes.
 */
#include <rados/librados.hpp>
#include <rbd/librbd.h>
#include <rbd/librbd.hpp>
#include <type_traits>

using ceph::bufferlist;

static_assert(std::is_pointer<rbd_image_t>::value && sizeof(librbd::Image) == sizeof(rbd_image_t),
	      "a librbd::Image is the pointer that the C API hands out, and nothing more");
static_assert(std::is_pointer<rbd_completion_t>::value, "the C API hands a completion out by its address");

/* Start a read; what arrives is owned by the bufferlist, which must live until the completion has come. */
extern "C" bufferlist *rbdfs_bufferlist_read(rbd_image_t image, uint64_t offset, size_t length,
					     rbd_completion_t completion)
{
	auto *received = new bufferlist;

	/* Not an Image of our own: its destructor would close the image. Errors come by the completion only. */
	reinterpret_cast<librbd::Image &>(image).aio_read(offset, length, *received,
							  static_cast<librbd::RBD::AioCompletion *>(completion));
	return received;
}

/* Where the `length` bytes of a completed read lie, in one piece until it is freed; NULL if they are not so many.
 *
 * What came of several objects, of a clone and its parent or from around a hole is copied together here. So is what
 * would keep more than a quarter of its size in memory beside itself. */
extern "C" const char *rbdfs_bufferlist_data(bufferlist *received, size_t length)
{
	if (!length || received->length() != length)
		return nullptr;
	if (received->get_num_buffers() > 1 || received->front().raw_length() - length > length / 4)
		received->rebuild();
	return received->c_str();
}

/* For any thread, also when the image is closed and the cluster shut down: the memory is counted, and nobody else's. */
extern "C" void rbdfs_bufferlist_free(bufferlist *received)
{
	delete received;
}
