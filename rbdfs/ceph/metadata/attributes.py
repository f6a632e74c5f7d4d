"""The attributes of images, each as a text in the words of the `rbd` command.

Nearly all are asked without opening the image, with one question each. Only librbd knows the clients that use an image,
and most attributes of format 1: for these the image is opened read-only, and so without a watch, and closed again.
"""

import errno
import struct
import time
from collections.abc import Awaitable, Callable
from typing import Final

import rbd

from rbdfs.catalog import ImageRef, Namespace
from rbdfs.ceph.bindings import librados
from rbdfs.ceph.bindings.encoding import NANOSECONDS, Reader, encode_string, understood
from rbdfs.ceph.bindings.read_op import Call, ReadOperations, Request
from rbdfs.ceph.errors import translated
from rbdfs.ceph.metadata import header
from rbdfs.ceph.metadata.paging import listed
from rbdfs.ceph.metadata.rbd_directory import DIRECTORY
from rbdfs.errors import RbdfsError
from rbdfs.spec import ImageSpec

META: Final = "meta."
"""The prefix for keys of an image's own metadata (`rbd image-meta`)."""

_TRASH: Final = "rbd_trash"
_TRASH_VERSION: Final = 2  # the newest that we know of a `cls::rbd::TrashImageSpec`
_KEYS_A_PAGE: Final = 64
_PROTECTED: Final = 2  # RBD_PROTECTION_STATUS_PROTECTED
_FOR_READING: Final = b"\1"  # asks which features matter to a client that does not write

_FEATURES: Final = (
    *("layering", "striping", "exclusive-lock", "object-map", "fast-diff", "deep-flatten", "journaling", "data-pool"),
    *("operations", "migrating", "non-primary", "dirty-cache"),
)
_FLAGS: Final = ("object map invalid", "fast diff invalid")

Attribute = Callable[[ImageRef], Awaitable[str]]
"""Asks for one attribute. Raises RbdfsError."""

AskLibrbd = Callable[[ImageRef, Callable[[rbd.Image], str]], Awaitable[str]]
"""Opens an image read-only in librbd, and calls the function with it, in a thread. Raises RbdfsError."""


class AttributeReader:
    """Asks for the attributes of images, one by one. One that an image does not have, such as a parent, is empty."""

    def __init__(
        self,
        operations: ReadOperations,
        ioctx_of: Callable[[Namespace], librados.Ioctx],
        pool_name: Callable[[int], str],
        ask_librbd: AskLibrbd,
    ) -> None:
        self._operations = operations
        self._ioctx_of = ioctx_of
        self._pool_name = pool_name
        self._ask_librbd = ask_librbd
        self._known: dict[str, Attribute] = {
            "id": _known(lambda image: image.id),
            "pool": _known(lambda image: image.namespace.pool.name),
            "namespace": _known(lambda image: image.namespace.name),
        }
        self._attributes: dict[str, Attribute] = {
            **self._known,
            "features": self._answer(b"get_features", _features, as_of_snapshot=True, argument=_FOR_READING),
            "flags": self._answer(b"get_flags", _flags, as_of_snapshot=True),
            "object_size": self._object_size,
            "stripe_unit": self._stripe_unit,
            "stripe_count": self._stripe_count,
            "data_pool": self._answer(b"get_data_pool", self._pool),
            "block_name_prefix": self._answer(b"get_object_prefix", Reader.string),
            "parent": self._parent,
            "parent_overlap": self._parent_overlap,
            "snapshots": self._snapshots,
            "watchers": self._opened(_watchers),
            "lock_owner": self._opened(_lockers),
            "create_timestamp": self._answer(b"get_create_timestamp", _local_time),
            "access_timestamp": self._answer(b"get_access_timestamp", _local_time),
            "modify_timestamp": self._answer(b"get_modify_timestamp", _local_time),
        }
        self._for_snapshots: dict[str, Attribute] = {
            "snapshot": self._snapshot,
            "snapshot_id": _known(lambda image: str(image.snapshot_id)),
            "protected": self._answer(b"get_protection_status", _protected, as_of_snapshot=True),
        }
        nothing = _known(lambda _: "")
        object_size = self._opened(lambda image: str(image.stat()["obj_size"]))
        self._for_format_1: dict[str, Attribute] = {
            **dict.fromkeys(self._attributes, nothing),
            **{name: self._attributes[name] for name in ("pool", "namespace", "snapshots", "watchers", "lock_owner")},
            "object_size": object_size,
            "stripe_unit": object_size,
            "stripe_count": _known(lambda _: "1"),
            "block_name_prefix": self._opened(lambda image: str(image.stat()["block_name_prefix"])),
        }

    async def names(self, image: ImageRef) -> list[str]:
        try:
            keys = [] if image.format == 1 else await self._metadata_keys(image)
        except RbdfsError as error:
            if error.errno != errno.ENOENT:
                raise
            # There is no header. That is no error here: recent ls asks each file for the names of its attributes.
            return list(self._known)
        return [*self._attributes_of(image), *(META + key for key in keys)]

    async def value(self, image: ImageRef, name: str) -> str:
        attribute = self._attributes_of(image).get(name)
        with understood(f"the {name} of image {image.id} of {image.namespace}"):
            if attribute is not None:
                return await attribute(image)
            if name.startswith(META) and image.format != 1:
                return await self._metadata(image, name.removeprefix(META))
        raise RbdfsError(f"there is no attribute {name} of image {image.id} of {image.namespace}", errno.ENODATA)

    def _attributes_of(self, image: ImageRef) -> dict[str, Attribute]:
        attributes = self._for_format_1 if image.format == 1 else self._attributes
        if image.snapshot_id is None:
            return attributes
        protected = {"protected": _known(lambda _: str(False))} if image.format == 1 else {}
        return attributes | self._for_snapshots | protected

    # ---- kinds of attributes

    def _answer(
        self, method: bytes, decode: Callable[[Reader], str], *, as_of_snapshot: bool = False, argument: bytes = b""
    ) -> Attribute:
        """The answer of a method of the object class `rbd`, as a text."""

        async def attribute(image: ImageRef) -> str:
            which = _snapshot_argument(image) if as_of_snapshot else b""
            return decode(await self._read(image, method, which + argument))

        return attribute

    def _opened(self, ask: Callable[[rbd.Image], str]) -> Attribute:
        """An answer of librbd about the open image."""

        return lambda image: self._ask_librbd(image, ask)

    async def _call(self, image: ImageRef, method: bytes, argument: bytes = b"") -> bytes:
        name = header.object_of(image)
        reply = await self._operations.ask(Request(self._ioctx_of(image.namespace), name, [Call(method, argument)]))
        return reply.answer(0, f"call {method.decode()} on {name}")

    async def _read(self, image: ImageRef, method: bytes, argument: bytes = b"") -> Reader:
        return Reader(await self._call(image, method, argument))

    # ---- attributes

    async def _object_size(self, image: ImageRef) -> str:
        return str(1 << (await self._read(image, b"get_size", _snapshot_argument(image))).u8())

    async def _stripe_unit(self, image: ImageRef) -> str:
        return (
            str((await self._stripe(image)).u64()) if await self._is_striped(image) else await self._object_size(image)
        )

    async def _stripe_count(self, image: ImageRef) -> str:
        if not await self._is_striped(image):
            return "1"
        reader = await self._stripe(image)
        reader.u64()  # the stripe unit
        return str(reader.u64())

    async def _is_striped(self, image: ImageRef) -> bool:
        features = await self._read(image, b"get_features", _snapshot_argument(image) + _FOR_READING)
        return bool(features.u64() & rbd.RBD_FEATURE_STRIPINGV2)

    async def _stripe(self, image: ImageRef) -> Reader:
        return await self._read(image, b"get_stripe_unit_count")

    def _pool(self, reader: Reader) -> str:
        pool_id = reader.s64()
        return self._name_of_pool(pool_id) if pool_id >= 0 else ""

    def _name_of_pool(self, pool_id: int) -> str:
        with translated(f"find the name of pool {pool_id}"):
            return self._pool_name(pool_id)

    async def _snapshots(self, image: ImageRef) -> str:
        _, found = await header.snapshots(self._operations, self._ioctx_of(image.namespace), image)
        return "\n".join(snapshot.name for snapshot in found if snapshot.is_users)

    async def _snapshot(self, image: ImageRef) -> str:
        _, found = await header.snapshots(self._operations, self._ioctx_of(image.namespace), image)
        for snapshot in found:
            if snapshot.id == image.snapshot_id:
                return snapshot.name
        raise RbdfsError(f"image {image.id} of {image.namespace} has no snapshot {image.snapshot_id}", errno.ENOENT)

    async def _parent_of(self, image: ImageRef) -> header.Parent | None:
        request = header.request(self._ioctx_of(image.namespace), image)
        (reply,) = await header.ask(self._operations, [request])
        return header.decode(image, reply).parent

    async def _parent_overlap(self, image: ImageRef) -> str:
        parent = await self._parent_of(image)
        return "" if parent is None else str(parent.overlap)

    async def _parent(self, image: ImageRef) -> str:
        parent = await self._parent_of(image)
        if parent is None:
            return ""
        namespace = parent.image.namespace
        name, trash = await self._name(parent.image)
        pool, snapshot = self._name_of_pool(namespace.pool.id), await self._snapshot(parent.image)
        return f"{ImageSpec(pool, name, namespace.name, snapshot)}{trash}"

    async def _name(self, image: ImageRef) -> tuple[str, str]:
        """The name of an image, and what `rbd info` adds if the image is in the trash."""
        ioctx, image_id = self._ioctx_of(image.namespace), encode_string(image.id)
        what = f"find the name of image {image.id} of pool {image.namespace}"
        reply = await self._operations.ask(Request(ioctx, DIRECTORY, [Call(b"dir_get_name", image_id)]))
        try:
            return Reader(reply.answer(0, what)).string(), ""
        except RbdfsError as error:
            if error.errno != errno.ENOENT:
                raise
        reply = await self._operations.ask(Request(ioctx, _TRASH, [Call(b"trash_get", image_id)]))
        _, reader = Reader(reply.answer(0, what)).structure(_TRASH_VERSION)
        reader.u8()  # which program moved it there
        return reader.string(), f" (trash {image.id})"

    # ---- metadata

    async def _metadata_keys(self, image: ImageRef) -> list[str]:
        with understood(f"the metadata of image {image.id} of {image.namespace}"):
            return list(
                await listed(
                    lambda _, argument: self._call(image, b"metadata_list", argument), _KEYS_A_PAGE, Reader.bytes
                )
            )

    async def _metadata(self, image: ImageRef, key: str) -> str:
        try:
            return (await self._read(image, b"metadata_get", encode_string(key))).string()
        except RbdfsError as error:
            raise RbdfsError(str(error), errno.ENODATA if error.errno == errno.ENOENT else error.errno) from error


def _snapshot_argument(image: ImageRef) -> bytes:
    return struct.pack("<Q", header.snapshot_id_of(image))


def _known(tell: Callable[[ImageRef], str]) -> Attribute:
    """An attribute that is known without a question."""

    async def attribute(image: ImageRef) -> str:
        return tell(image)

    return attribute


def _features(reader: Reader) -> str:
    return _bits(reader.u64(), _FEATURES)


def _flags(reader: Reader) -> str:
    return _bits(reader.u64(), _FLAGS)


def _bits(value: int, names: tuple[str, ...]) -> str:
    """Features or flags as `rbd info` lists them; one without a name here by its number."""
    known = dict(enumerate(names))
    return ", ".join(known.get(bit, f"bit {bit}") for bit in range(value.bit_length()) if value >> bit & 1)


def _protected(reader: Reader) -> str:
    return str(reader.u8() == _PROTECTED)


def _local_time(reader: Reader) -> str:
    """Empty if it was made before Ceph stored this (Mimic)."""
    seconds = reader.time_ns() // NANOSECONDS
    return time.ctime(seconds) if seconds else ""


def _watchers(image: rbd.Image) -> str:
    """As `rbd status` shows them, one a line."""
    return "\n".join(f"{each['addr']} client.{each['id']} cookie={each['cookie']}" for each in image.watchers_list())


def _lockers(image: rbd.Image) -> str:
    """As `rbd lock ls` shows them, one a line."""
    return "\n".join(" ".join(locker) for locker in dict(image.list_lockers()).get("lockers", ()))
