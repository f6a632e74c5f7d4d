"""Who else uses an image now."""

import rados
import rbd

from rbdfs.ceph.errors import translated


def writers(ioctx: rados.Ioctx, image_id: str) -> list[str]:
    """Addresses of the clients that may write to an image now. Blocks. Raises RbdfsError.

    Who writes to an image with the feature exclusive-lock holds its lock. Without it there is no telling: then it is
    all who have it open, other than read-only. To be asked before we open it, or we are among them.
    """
    with translated(f"ask who uses image {image_id}"), rbd.Image(ioctx, image_id=image_id, read_only=True) as image:
        if image.features() & rbd.RBD_FEATURE_EXCLUSIVE_LOCK:
            lock = image.list_lockers()
            return [str(address) for _client, _cookie, address in lock["lockers"]] if lock else []
        return [str(watcher["addr"]) for watcher in image.watchers_list()]
