"""Stat thousands of images without opening any: two round trips for each, all at the same time.

The object map is read first and the header second: the header says whether the map is valid, and a map that became
invalid in between must not be used. Through a clone its parent shows, and through that its own parent: so parents are
asked too, each once for all of its clones, and the maps are merged.
"""

import errno
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import trio

from rbdfs.catalog import ImageRef, ImageStat, Namespace
from rbdfs.ceph.bindings import librados
from rbdfs.ceph.bindings.encoding import MalformedError
from rbdfs.ceph.bindings.read_op import Call, ReadOperations, Reply, Request
from rbdfs.ceph.metadata import header, object_map, rbd_directory
from rbdfs.ceph.metadata.header import Header
from rbdfs.ceph.metadata.object_map import ObjectSet
from rbdfs.ceph.metadata.versioned import VersionedCache
from rbdfs.errors import RbdfsError

log = logging.getLogger(__name__)

IMAGES_A_BATCH = 64
BATCHES_AT_ONCE = 3
"""One is decoded while the OSDs answer the others. The object maps of a batch are in memory together: 16 KiB for each
256 GiB of an image."""

ANCESTORS_AT_MOST = 16
"""How many generations of parents are asked, as in the kernel's rbd driver. A damaged header may name its own image as
its parent."""

BROKEN = ImageStat(size=1, used_bytes=1, modified_ns=0)
"""The stat of an image that has a name, and no header that can be understood. Opening it fails. It has one byte because
tar archives a file without bytes, or without blocks, without opening it, and so without an error."""

_BROKEN = frozenset({errno.ENOENT, errno.EIO, errno.EINVAL})

CACHED_FROM_OBJECTS = 1 << 16
"""Objects of an image whose map is cached: 256 GiB with objects of 4 MiB. To load a smaller map costs no more than to
ask for its version."""

CACHED_BYTES = 32 << 20
"""Of all cached maps, at two bits an object."""


@dataclass(slots=True)
class _Mapped:
    """An image or a parent of one: its header, and the objects that hold data, None if they are not known."""

    header: Header
    objects: ObjectSet | None


class StatReader:
    """Asks for the stat of images, and for the objects that hold their data."""

    def __init__(self, operations: ReadOperations, ioctx_of: Callable[[Namespace], librados.Ioctx]) -> None:
        self._operations = operations
        self._ioctx_of = ioctx_of
        self._maps: VersionedCache[ImageRef, ObjectSet] = VersionedCache(CACHED_BYTES)

    async def stat(self, image: ImageRef) -> ImageStat:
        found = (await self._batch([image]))[image]
        if isinstance(found, RbdfsError):
            if found.errno in _BROKEN and await self.is_broken(image):
                return BROKEN
            raise found
        return found

    async def objects(self, image: ImageRef) -> ObjectSet | None:
        """The objects that hold data, or through which a parent's data shows. Raises RbdfsError.

        None if maps do not tell, and for a striped image, whose bytes lie in its objects in another order."""
        mapped = (await self._with_parents([image]))[image]
        if isinstance(mapped, RbdfsError):
            raise mapped
        return None if mapped.header.is_striped else mapped.objects

    async def is_broken(self, image: ImageRef) -> bool:
        """Whether an image without a header still has a name. Raises RbdfsError."""
        return bool(await self._still_named([image]))

    async def stat_all(self, images: Iterable[ImageRef]) -> Mapping[ImageRef, ImageStat | None]:
        stats: dict[ImageRef, ImageStat | None] = {}
        waiting = iter(images)

        async def ask() -> None:
            while batch := list(islice(waiting, IMAGES_A_BATCH)):
                await self._ask(batch, stats)

        async with trio.open_nursery() as nursery:
            for _ in range(BATCHES_AT_ONCE):
                nursery.start_soon(ask)
        return stats

    async def _ask(self, images: Sequence[ImageRef], stats: dict[ImageRef, ImageStat | None]) -> None:
        missing = []
        for image, found in (await self._batch(images)).items():
            if isinstance(found, ImageStat):
                stats[image] = found
            elif found.errno in _BROKEN:
                missing.append(image)
            else:
                log.debug("cannot stat image %s of %s: %s", image.id, image.namespace, found)
                stats[image] = None
        if missing:
            try:
                stats |= dict.fromkeys(await self._still_named(missing), BROKEN)
            except RbdfsError as error:  # they may exist
                log.debug("%s", error)
                stats |= dict.fromkeys(missing)

    async def _still_named(self, images: list[ImageRef]) -> set[ImageRef]:
        """Those HEADs that still have a name: these are broken, the others gone."""
        heads = [image for image in images if image.snapshot_id is None]
        if not heads:
            return set()
        namespace = heads[0].namespace
        return await rbd_directory.still_named(self._operations, self._ioctx_of(namespace), namespace, heads)

    async def _batch(self, images: Sequence[ImageRef]) -> dict[ImageRef, ImageStat | RbdfsError]:
        layers = await self._with_parents(images)
        return {image: _stat(mapped) if isinstance(mapped, _Mapped) else mapped for image, mapped in layers.items()}

    async def _with_parents(self, images: Sequence[ImageRef]) -> dict[ImageRef, _Mapped | RbdfsError]:
        layers = await self._headers_and_maps(images)
        await self._merge_parents(layers.values(), ANCESTORS_AT_MOST)
        return layers

    async def _headers_and_maps(self, images: Sequence[ImageRef]) -> dict[ImageRef, _Mapped | RbdfsError]:
        layers: dict[ImageRef, _Mapped | RbdfsError] = {}
        asked: list[tuple[ImageRef, librados.Ioctx]] = []
        for image in images:
            try:
                asked.append((image, self._ioctx_of(image.namespace)))
            except RbdfsError as error:  # a parent whose pool was removed
                layers[image] = error
        maps = await self._load_maps([(image, ioctx) for image, ioctx in asked if image.format != 1])
        headers = await header.ask(self._operations, [header.request(ioctx, image) for image, ioctx in asked])
        for (image, _), reply in zip(asked, headers, strict=True):
            layers[image] = _mapped(image, maps.get(image), reply)
        return layers

    async def _load_maps(self, images: Sequence[tuple[ImageRef, librados.Ioctx]]) -> dict[ImageRef, ObjectSet]:
        """The maps of the images that have one. A large map that is cached is loaded again only if it has changed: `ls`
        and readers of files ask for it every second."""
        operate = self._operations.operate
        known = {image: cached for image, _ in images if (cached := self._maps.get(image)) is not None}
        maps: dict[ImageRef, ObjectSet] = {}
        requests = [
            Request(ioctx, object_map.object_of(image), stat=True)
            if image in known
            else Request(ioctx, object_map.object_of(image), _LOAD)
            for image, ioctx in images
        ]
        changed = []
        for (image, ioctx), reply in zip(images, await operate(requests), strict=True):
            if image not in known:
                self._take_map(image, reply, maps)
            elif reply.result >= 0 and reply.version == known[image].version:
                maps[image] = known[image].value
            else:
                changed.append((image, Request(ioctx, object_map.object_of(image), _LOAD)))
        for (image, _), reply in zip(changed, await operate([request for _, request in changed]), strict=True):
            self._take_map(image, reply, maps)
        return maps

    def _take_map(self, image: ImageRef, loaded: Reply, maps: dict[ImageRef, ObjectSet]) -> None:
        """Decode a map, and cache it if it is large."""
        self._maps.drop(image)
        if loaded.result < 0 or loaded.calls[0][0] < 0:
            return
        try:
            objects = object_map.decode(loaded.calls[0][1])
        except MalformedError as error:
            log.warning("%s cannot be understood, so the image looks full: %s", object_map.object_of(image), error)
            return
        maps[image] = objects
        if objects.slots >= CACHED_FROM_OBJECTS:
            self._maps.put(image, loaded.version, objects, objects.slots // object_map.OBJECTS_A_BYTE)

    async def _merge_parents(self, layers: Iterable[_Mapped | RbdfsError], ancestors: int) -> None:
        """Ask `ancestors` generations of parents at most; a clone with more looks full."""
        clones = [
            (each, each.objects, each.header.parent)
            for each in layers
            if isinstance(each, _Mapped) and each.objects is not None and each.header.parent is not None
        ]
        if not clones:
            return
        parents: dict[ImageRef, _Mapped | RbdfsError] = {}
        if ancestors:
            parents = await self._headers_and_maps(list({parent.image for _, _, parent in clones}))
            await self._merge_parents(parents.values(), ancestors - 1)
        for clone, objects, parent in clones:
            clone.objects, below, top = None, parents.get(parent.image), clone.header
            # `below` is an error if the key may not read the parent. With different stripes, objects of one number hold
            # different bytes, and with any stripes the overlap ends in several objects.
            if (
                isinstance(below, _Mapped)
                and below.objects is not None
                and below.header.object_size == top.object_size
                and not (top.is_striped or below.header.is_striped)
            ):
                clone.objects = objects.over(below.objects, -(-min(parent.overlap, top.size) // top.object_size))


_LOAD = (Call(b"object_map_load"),)


def _mapped(image: ImageRef, objects: ObjectSet | None, reply: Reply) -> _Mapped | RbdfsError:
    try:
        found = header.decode(image, reply)
    except RbdfsError as error:
        return error
    # A map that is too short was made for a smaller image.
    if objects is not None and (not found.map_is_valid or objects.slots * found.object_size < found.size):
        objects = None
    return _Mapped(found, objects)


def _stat(mapped: _Mapped) -> ImageStat:
    found, objects = mapped.header, mapped.objects
    return ImageStat(
        size=found.size,
        used_bytes=found.size if objects is None else min(found.size, objects.count * found.object_size),
        modified_ns=found.modified_ns,
    )
