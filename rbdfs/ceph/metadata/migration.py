"""What the header of an image in migration says of the image that it is made from (`cls::rbd::MigrationSpec`)."""

from typing import Final

from rbdfs.catalog import ImageRef, Namespace, Pool
from rbdfs.ceph.bindings.encoding import Reader, understood
from rbdfs.ceph.bindings.read_op import Call

GET: Final = Call(b"migration_get")
"""A call on the header object."""

_VERSION: Final = 3
_TARGET: Final = 2
"""MIGRATION_HEADER_TYPE_DST."""
_EXECUTED: Final = 4
"""MIGRATION_STATE_EXECUTED: the target holds all."""


def decode_source(answer: bytes) -> ImageRef | None:
    """Return the image that shows through; None if none does, or if it is no image of Ceph. Raises RbdfsError (EIO)."""
    with understood("the header of an image in migration"):
        version, reader = Reader(answer).structure(_VERSION)
        kind, pool_id, namespace = reader.u8(), reader.s64(), reader.string()
        name, image_id = reader.string(), reader.string()
        for _ in range(reader.u32()):
            reader.raw(16)  # a snapshot of the source, and its copy
        reader.raw(10)  # overlap, flatten, mirroring
        state = reader.u8()
        reader.string()  # the state in words
        if version >= _VERSION:
            reader.u8()  # how it is mirrored
            if reader.string():  # a file or an export of another kind
                return None
        if kind != _TARGET or state == _EXECUTED:
            return None
        where = Namespace(Pool(pool_id, str(pool_id)), namespace)
        return ImageRef(where, image_id) if image_id else ImageRef(where, name, format=1)
