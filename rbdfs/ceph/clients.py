"""Which clients use an image now."""

import rados
import rbd

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings.aio import open_in_librbd
from rbdfs.ceph.errors import translated


def writers(ioctx: rados.Ioctx, image: ImageRef) -> list[str]:
    """Addresses of the clients that may write to an image now. Blocks. Raises RbdfsError.

    A client that writes to an image with the feature exclusive-lock holds its lock. Without that feature, all clients
    count that have the image open for writing. Ask before opening it here: our own watch would count too.
    """
    with translated(f"ask which clients use image {image.id}"), open_in_librbd(ioctx, image) as opened:
        if opened.features() & rbd.RBD_FEATURE_EXCLUSIVE_LOCK:
            lock = opened.list_lockers()
            return [str(address) for _client, _cookie, address in lock["lockers"]] if lock else []
        return [str(watcher["addr"]) for watcher in opened.watchers_list()]
