"""The headers of an image and its ancestors: everything that an open image and its caches were derived from.

librbd's read-only handle never refreshes (`OpenRequest` registers no watch): size, parent, overlap and flags stay as
they were when it was opened. So each open() and each revalidation asks the headers, and compares.
"""

import errno
import struct
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, NamedTuple

import rbd

from rbdfs.catalog import ImageRef, Namespace
from rbdfs.ceph.bindings import librados
from rbdfs.ceph.bindings.encoding import NANOSECONDS, Reader, encode_string, understood
from rbdfs.ceph.bindings.read_op import Call, ReadOperations, Reply, Request
from rbdfs.ceph.metadata import header, migration
from rbdfs.ceph.metadata.header import Header
from rbdfs.ceph.metadata.rbd_directory import DIRECTORY
from rbdfs.errors import RbdfsError
from rbdfs.spec import ImageSpec

FILLING_NS: Final = 3600 * NANOSECONDS
"""A deep copy creates an image with all of its snapshots, and fills them afterwards (`DeepCopyRequest`). So a snapshot
that was made so much later than its image is not being filled, whichever client holds the lock now."""

_INCOMPLETE: Final = rbd.RBD_FEATURE_MIGRATING | rbd.RBD_FEATURE_NON_PRIMARY
"""Features of an image that others fill by their own rules: in migration, or a secondary of rbd-mirror."""

_MAP_INVALID: Final = rbd.RBD_FLAG_OBJECT_MAP_INVALID | rbd.RBD_FLAG_FAST_DIFF_INVALID

_CREATED: Final = b"create_timestamp"

# Of librbd's managed lock. The argument of cls_lock's get_info: version 1, compatible with 1, length, the lock's name.
_GET_LOCK: Final = Call(
    b"get_info", struct.pack("<BBI", 1, 1, 4 + len("rbd_lock")) + encode_string("rbd_lock"), b"lock"
)


class Locker(NamedTuple):
    """A holder of the exclusive lock."""

    client: int
    cookie: str


@dataclass(frozen=True, slots=True)
class Layer:
    """What one header said: that of the image or of an ancestor."""

    image: ImageRef
    header: Header
    version: int
    """The version of the header object. It changes with lock and unlock, resize, snapshots, features, flags, metadata
    and parent; not with watches, nor with writes under a lock (tried with 16.2). 0 if it is not known."""
    lockers: frozenset[Locker]
    created_ns: int
    """When the image was made, in nanoseconds since the epoch; 0 if that is not known. Only asked for a snapshot."""

    @property
    def has_fast_diff(self) -> bool:
        """Whether it has a valid fast-diff map."""
        return bool(self.header.features & rbd.RBD_FEATURE_FAST_DIFF) and not self.header.flags & _MAP_INVALID

    @property
    def is_complete(self) -> bool:
        """For a snapshot, whether nobody can still be filling it. For HEAD, whether the ordinary rules hold for it.

        An image is not complete during a migration, as a mirror's secondary, or if it may be the target of a deep copy,
        which holds the lock. For an image without locks this cannot be known.
        """
        if self.header.features & _INCOMPLETE:
            return False
        made_later = self.created_ns and self.header.modified_ns - self.created_ns > FILLING_NS
        return self.image.snapshot_id is None or not self.lockers or bool(made_later)

    def opens_as(self, other: "Layer") -> bool:
        """Whether librbd opens the same for both, except for the size."""
        mine, theirs = self.header, other.header
        return (
            self.image == other.image
            and mine.features == theirs.features
            and mine.flags == theirs.flags
            and mine.parent == theirs.parent
        )


@dataclass(frozen=True, slots=True)
class ImageState:
    """An image or snapshot as described by its header and those of its ancestors."""

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
        """The snapshots that show through, nearest first."""
        return tuple(layer.image for layer in self.layers[1:])

    @property
    def is_migrating(self) -> bool:
        """Whether it or an ancestor is being migrated: then the source shows through, which no header says."""
        return any(layer.header.features & rbd.RBD_FEATURE_MIGRATING for layer in self.layers)

    @property
    def is_clone(self) -> bool:
        """Whether anything shows through where the image itself has no object."""
        return len(self.layers) > 1 or self.is_migrating

    @property
    def is_complete(self) -> bool:
        """Whether all layers are complete."""
        return all(layer.is_complete for layer in self.layers)

    @property
    def has_fast_diff(self) -> bool:
        """Whether all layers have a valid fast-diff map."""
        return all(layer.has_fast_diff for layer in self.layers)

    def is_same_version(self, other: "ImageState") -> bool:
        """Whether no header was written to between the two."""
        return [(layer.image, layer.version) for layer in self.layers] == [
            (layer.image, layer.version) for layer in other.layers
        ] and all(layer.version for layer in self.layers)

    def opens_as(self, other: "ImageState") -> bool:
        """Whether librbd opens the same for both, except for the image's own size."""
        return len(self.layers) == len(other.layers) and all(map(Layer.opens_as, self.layers, other.layers))


class HeaderClient:
    """Asks the headers of an image and its ancestors."""

    def __init__(
        self, operations: ReadOperations, ioctx_of: Callable[[Namespace], librados.Ioctx], client_ids: AbstractSet[int]
    ) -> None:
        """`ioctx_of` raises RbdfsError if there is no such pool; `client_ids` are our own clients."""
        self.client_ids = client_ids
        self.ioctx_of = ioctx_of
        self._operations = operations

    async def state(self, spec: ImageSpec, image: ImageRef, ancestors: Sequence[ImageRef] = ()) -> ImageState:
        """Ask in one round trip if the image still has these `ancestors`, with one more for each that is new.

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
        return ImageState(tuple(await self._layers(str(spec), image, found)))

    async def check(self, image: ImageRef) -> None:
        """Raise RbdfsError if the image, an ancestor, or what they are made from in a migration cannot be opened.

        librbd 16 ends the process if it cannot open the source of a migration: `NativeFormat::handle_open` logs the
        error by an ImageCtx that is deleted. `state` checks that, too.
        """
        await self._layers(f"image {image.id} of {image.namespace}", image, {})

    async def _layers(self, name: str, image: ImageRef, found: Mapping[ImageRef, Reply]) -> list[Layer]:
        """An image and its ancestors, of which `found` has some replies. Also checks the sources of migrations."""
        layers = await self._ancestry(name, image, found)
        for layer in layers:
            if layer.header.features & rbd.RBD_FEATURE_MIGRATING:
                await self._check_source(name, layer.image)
        return layers

    async def _ancestry(self, name: str, image: ImageRef, found: Mapping[ImageRef, Reply]) -> list[Layer]:
        layers = [_layer(image, await self._reply(image, found))]
        while (parent := layers[-1].header.parent) is not None:
            if any(layer.image == parent.image for layer in layers):
                raise RbdfsError(f"cannot ask for {name}: its header names itself as an ancestor", errno.EIO)
            try:
                layers.append(_layer(parent.image, await self._reply(parent.image, found)))
            except RbdfsError as error:
                raise _origin_error(name, parent.image, error, "a clone", "parent") from error
        return layers

    async def _reply(self, image: ImageRef, found: Mapping[ImageRef, Reply]) -> Reply:
        if image in found:
            return found[image]
        (reply,) = await header.ask(self._operations, [self._request(image)])
        return reply

    async def _check_source(self, name: str, image: ImageRef) -> None:
        request = Request(self.ioctx_of(image.namespace), header.object_of(image), (migration.GET,))
        try:
            answer = (await self._operations.ask(request)).answer(0, f"ask for the migration of {name}")
        except RbdfsError as error:
            if error.errno == errno.ENOENT:  # committed since the header was read
                return
            raise
        source = migration.decode_source(answer)
        if source is None:
            return
        what = f"read the header {header.object_of(source)}"
        try:
            if source.format == 1:  # in migration, its header is marked, and librbd knows it
                stat = Request(self.ioctx_of(source.namespace), header.object_of(source), stat=True)
                (await self._operations.ask(stat)).check(what)
            else:
                await self._ancestry(name, source, {})
        except RbdfsError as error:
            raise _origin_error(name, source, error, "in migration", "source") from error

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
        locker.u8()  # the kind of entity: a client
        lockers.append(Locker(locker.s64(), locker.string()))
        reader.structure(1)  # a locker_info_t
    return frozenset(lockers)


def _origin_error(name: str, image: ImageRef, error: RbdfsError, kind: str, role: str) -> RbdfsError:
    where = f"image {image.id} of pool {image.namespace.pool.id}"
    if error.errno in (errno.EPERM, errno.EACCES):
        hint = f"it is {kind}: the key must be allowed to read its {role} as well, {where}"
    else:
        hint = f"it is {kind}: is its {role}, {where}, still there?"
    # Not ENOENT, which rsync and tar take for a file that was just removed.
    number = errno.EIO if error.errno == errno.ENOENT else error.errno
    return RbdfsError(f"cannot ask for {name}: {error}; {hint}", number)
