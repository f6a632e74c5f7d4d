"""The pools of a cluster, and whether the key may read them."""

import errno
from collections.abc import Set as AbstractSet

import rados

from rbdfs.catalog import Pool
from rbdfs.ceph.bindings.librados import Ioctx
from rbdfs.ceph.bindings.read_op import Reply, Request
from rbdfs.ceph.errors import reason_of
from rbdfs.ceph.metadata.monitors import ask_monitors
from rbdfs.ceph.metadata.rbd_directory import DIRECTORY
from rbdfs.errors import RbdfsError

RBD_APPLICATION = "rbd"


def rbd_pools(client: rados.Rados, only: AbstractSet[str]) -> list[Pool]:
    """The pools with the application rbd, even if the key may not read them; only those in `only`, unless it is empty.

    Blocks, for `rados_mon_op_timeout` at most. `mon 'profile rbd'` may ask this. Raises RbdfsError.
    """
    # Not wait_for_latest_osdmap and then list_pools: if no monitor answers, that waits for ever.
    pools = ask_monitors(client, "list the pools", "osd pool ls", detail="detail")
    return [
        Pool(each["pool_id"], each["pool_name"])
        for each in pools
        if RBD_APPLICATION in each["application_metadata"] and (not only or each["pool_name"] in only)
    ]


def look_at(ioctx: Ioctx) -> Request:
    """The request that tells whether the key may read a pool."""
    return Request(ioctx, DIRECTORY, stat=True)


def may_read(pool: Pool, reply: Reply) -> bool:
    """Whether the key may read a pool, by the reply to `look_at`. Raises RbdfsError."""
    if reply.result in (0, -errno.ENOENT):
        return True
    if reply.result in (-errno.EPERM, -errno.EACCES):
        return False
    raise RbdfsError(f"cannot read pool {pool.name}: {reason_of(-reply.result)}", -reply.result)
