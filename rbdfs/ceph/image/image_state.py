"""What an open image, and all that is cached of it, was derived from: its header and the headers of its ancestors.

librbd's read-only handle never refreshes (`OpenRequest` registers no watch): size, parent, overlap and flags stay what
they were when it was opened. So each open() and each revalidation asks the headers, and compares.
"""

import errno
import struct
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, NamedTuple

import rbd

from rbdfs.catalog import ImageRef, Namespace
from rbdfs.ceph.bindings import librados
from rbdfs.ceph.bindings.encoding import NANOSECONDS, Reader, encode_string, understood
from rbdfs.ceph.bindings.read_op import Call, ReadOperations, Reply, Request
from rbdfs.ceph.metadata import header
from rbdfs.ceph.metadata.header import Header
from rbdfs.ceph.metadata.rbd_directory import DIRECTORY
from rbdfs.errors import RbdfsError
from rbdfs.spec import ImageSpec

FILLING_NS: Final = 3600 * NANOSECONDS
"""A deep copy makes an image, at once all of its snapshots, and fills these afterwards (`DeepCopyRequest`). So nobody
fills a snapshot that was made so much later than its image, whoever holds the lock now."""

_UNSETTLED: Final = rbd.RBD_FEATURE_MIGRATING | rbd.RBD_FEATURE_NON_PRIMARY
"""Features of an image that others fill, by rules of their own: one in migration, a secondary of rbd-mirror."""

_MAP_INVALID: Final = rbd.RBD_FLAG_OBJECT_MAP_INVALID | rbd.RBD_FLAG_FAST_DIFF_INVALID

_CREATED: Final = b"create_timestamp"

# Of librbd's managed lock. The argument of cls_lock's get_info: version 1, compatible with 1, length, the lock's name.
_GET_LOCK: Final = Call(
    b"get_info", struct.pack("<BBI", 1, 1, 4 + len("rbd_lock")) + encode_string("rbd_lock"), b"lock"
)


class Locker(NamedTuple):
    """Who holds the exclusive lock."""

    client: int
    cookie: str


@dataclass(frozen=True, slots=True)
class Layer:
    """What one header said: that of the image, or of an ancestor."""

    image: ImageRef
    header: Header
    version: int
    """Of the header object, which moves with lock and unlock, resize, snapshots, features, flags, metadata, parent; not
    with watches, nor with what is written under a lock that is held (tried with 16.2). 0 if it is not known."""
    lockers: frozenset[Locker]
    created_ns: int
    """When the image was made, in nanoseconds since the epoch; 0 if that is not known. Asked of snapshots alone."""

    @property
    def has_fast_diff(self) -> bool:
        """Whether it has a fast-diff map that can be believed."""
        return bool(self.header.features & rbd.RBD_FEATURE_FAST_DIFF) and not self.header.flags & _MAP_INVALID

    @property
    def is_settled(self) -> bool:
        """Of a snapshot, whether nobody can still be filling it. Of HEAD, whether it follows the ordinary rules.

        It is not settled while it is migrated, mirrored to here, or perhaps the target of a deep copy: that holds the
        lock. Of an image without locks this cannot tell.
        """
        if self.header.features & _UNSETTLED:
            return False
        made_later = self.created_ns and self.header.modified_ns - self.created_ns > FILLING_NS
        return self.image.snapshot_id is None or not self.lockers or bool(made_later)

    def opens_as(self, other: "Layer") -> bool:
        """Whether librbd opened the same for both, but for the size."""
        mine, theirs = self.header, other.header
        return (
            self.image == other.image
            and mine.features == theirs.features
            and mine.flags == theirs.flags
            and mine.parent == theirs.parent
        )


@dataclass(frozen=True, slots=True)
class ImageState:
    """An image or snapshot as its header and those of its ancestors have it."""

    layers: tuple[Layer, ...]
    """The image's own first, then its parent's, and so on."""

    @property
    def own(self) -> Layer:
        """The image's own."""
        return self.layers[0]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.own.header.size

    @property
    def ancestors(self) -> tuple[ImageRef, ...]:
        """The snapshots that show through, the nearest first."""
        return tuple(layer.image for layer in self.layers[1:])

    @property
    def is_migrating(self) -> bool:
        """Whether it or an ancestor is in the middle of a migration: its source shows through, which no header says."""
        return any(layer.header.features & rbd.RBD_FEATURE_MIGRATING for layer in self.layers)

    @property
    def is_clone(self) -> bool:
        """Whether anything shows through where the image itself has no object."""
        return len(self.layers) > 1 or self.is_migrating

    @property
    def is_settled(self) -> bool:
        """Whether all layers are."""
        return all(layer.is_settled for layer in self.layers)

    @property
    def has_fast_diff(self) -> bool:
        """Whether all layers have a fast-diff map that can be believed."""
        return all(layer.has_fast_diff for layer in self.layers)

    def is_same_version(self, other: "ImageState") -> bool:
        """Whether no header was written to in between."""
        return [(layer.image, layer.version) for layer in self.layers] == [
            (layer.image, layer.version) for layer in other.layers
        ] and all(layer.version for layer in self.layers)

    def opens_as(self, other: "ImageState") -> bool:
        """Whether librbd opened the same for both, but for the image's own size."""
        return len(self.layers) == len(other.layers) and all(map(Layer.opens_as, self.layers, other.layers))


class HeaderClient:
    """Asks headers."""

    def __init__(
        self, operations: ReadOperations, ioctx_of: Callable[[Namespace], librados.Ioctx], client_ids: AbstractSet[int]
    ) -> None:
        """`ioctx_of` raises RbdfsError for a pool that is not there; `client_ids` is whose watches are our own."""
        self.client_ids = client_ids
        self.ioctx_of = ioctx_of
        self._operations = operations

    async def state(self, spec: ImageSpec, image: ImageRef, ancestors: Sequence[ImageRef] = ()) -> ImageState:
        """One round trip if it still has the `ancestors` that it is said to have, else one more for each.

        Raises RbdfsError: ENOENT if the image is gone or in the trash, or if the snapshot is gone for its users.
        """
        what = f"ask for {spec}"
        images = (image, *ancestors)
        requests = [self._request(each) for each in images]
        if image.format != 1 and image.snapshot_id is None:
            name = Call(b"dir_get_name", encode_string(image.id))
            requests.append(Request(self.ioctx_of(image.namespace), DIRECTORY, (name,)))
        replies = list(await header.ask(self._operations, requests))
        if len(requests) > len(images):  # `rbd rm` moves an image to the trash first, out of the directory
            replies[-1].answer(0, what)
        found = dict(zip(images, replies, strict=False))
        if image.snapshot_id is not None and not header.is_users_snapshot(image, found[image]):
            raise RbdfsError(f"cannot {what}: the snapshot was removed", errno.ENOENT)
        layers = [_layer(image, found[image])]
        while (parent := layers[-1].header.parent) is not None:
            if any(layer.image == parent.image for layer in layers):
                raise RbdfsError(f"cannot {what}: its header names itself as an ancestor", errno.EIO)
            try:
                reply = found.get(parent.image)
                if reply is None:
                    (reply,) = await header.ask(self._operations, [self._request(parent.image)])
                layers.append(_layer(parent.image, reply))
            except RbdfsError as error:
                raise _parent_error(spec, parent.image, error) from error
        return ImageState(tuple(layers))

    def _request(self, image: ImageRef) -> Request:
        request = header.request(self.ioctx_of(image.namespace), image)
        if image.format == 1:
            return request
        keys = request.keys if image.snapshot_id is None else (*request.keys, _CREATED)
        return request._replace(calls=(*request.calls, _GET_LOCK), keys=keys)


def _layer(image: ImageRef, reply: Reply) -> Layer:
    found = header.decode(image, reply)
    if image.format == 1:
        return Layer(image, found, reply.version, frozenset(), 0)
    name = header.object_of(image)
    with understood(f"the header {name}"):
        lockers = _decode_lockers(reply.answer(len(reply.calls) - 1, f"read the header {name}"))
        created = reply.values.get(_CREATED)
        return Layer(image, found, reply.version, lockers, Reader(created).time_ns() if created is not None else 0)


def _decode_lockers(info: bytes) -> frozenset[Locker]:
    """A `cls_lock_get_info_reply`."""
    _, reader = Reader(info).structure(1)
    lockers = []
    for _ in range(reader.u32()):
        _, locker = reader.structure(1)  # a locker_id_t
        locker.u8()  # what kind of entity: a client
        lockers.append(Locker(locker.s64(), locker.string()))
        reader.structure(1)  # a locker_info_t
    return frozenset(lockers)


def _parent_error(spec: ImageSpec, parent: ImageRef, error: RbdfsError) -> RbdfsError:
    where = f"image {parent.id} of pool {parent.namespace.pool.id}"
    if error.errno in (errno.EPERM, errno.EACCES):
        hint = f"it is a clone: the key must be allowed to read its parent as well, {where}"
    else:
        hint = f"it is a clone: is its parent, {where}, still there?"
    # Not ENOENT, which rsync and tar take for a file that was removed meanwhile.
    number = errno.EIO if error.errno == errno.ENOENT else error.errno
    return RbdfsError(f"cannot ask for {spec}: {error}; {hint}", number)
