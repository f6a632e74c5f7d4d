"""The facts of images, thousands at a time, without opening any: two round trips each, all under way at once.

The object map goes first and the header second, which says whether the map can be believed: one that became invalid
meanwhile must not be. Through a clone its parent shows, and through that one its own: then the parents are asked the
same, each once for all of their clones, and the maps are laid over one another.
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
"""One is decoded here while the OSDs answer the others. The object maps of a batch are in memory at a time: 16 KiB for
each 256 GiB of an image."""

ANCESTORS_AT_MOST = 16
"""Generations of parents that are asked for, as many as the kernel's rbd driver takes. A damaged header may name its
own image as its parent."""

BROKEN = ImageStat(size=1, used_bytes=1, modified_ns=0)
"""What is shown of an image that its pool names and that has no header, or none that can be understood. Opening it
fails; tar archives a file without bytes, or without blocks, without opening it, and so without an error."""

_BROKEN = frozenset({errno.ENOENT, errno.EIO, errno.EINVAL})


KEPT_FROM_OBJECTS = 1 << 16
"""Of an image whose map is kept: 256 GiB with objects of 4 MiB. A smaller map costs no more than to ask whether it is
the same."""

KEPT_BYTES = 32 << 20
"""Of all maps that are kept, at two bits an object."""


@dataclass(slots=True)
class _Layer:
    """An image, or a parent of one: its header, and what it holds, None where that is not known."""

    header: Header
    objects: ObjectSet | None


class StatReader:
    """Asks for the facts of images."""

    def __init__(self, operations: ReadOperations, ioctx_of: Callable[[Namespace], librados.Ioctx]) -> None:
        self._operations = operations
        self._ioctx_of = ioctx_of
        self._maps: VersionedCache[ImageRef, ObjectSet] = VersionedCache(KEPT_BYTES)

    async def stat(self, image: ImageRef) -> ImageStat:
        """See `Catalog.stat`."""
        found = (await self._batch([image]))[image]
        if isinstance(found, RbdfsError):
            if found.errno in _BROKEN and await self.is_broken(image):
                return BROKEN
            raise found
        return found

    async def objects(self, image: ImageRef) -> ObjectSet | None:
        """Which of its objects hold data, its parents' included as they show through; None where that is not known by
        maps, and of a striped image, whose bytes lie in its objects in another order. Raises RbdfsError."""
        layer = (await self._layered([image]))[image]
        if isinstance(layer, RbdfsError):
            raise layer
        return None if layer.header.is_striped else layer.objects

    async def is_broken(self, image: ImageRef) -> bool:
        """Whether an image without a header has a name all the same. Raises RbdfsError."""
        return bool(await self._still_named([image]))

    async def stat_all(self, images: Iterable[ImageRef]) -> Mapping[ImageRef, ImageStat | None]:
        """See `Catalog.stat_all`."""
        facts: dict[ImageRef, ImageStat | None] = {}
        waiting = iter(images)

        async def ask() -> None:
            while batch := list(islice(waiting, IMAGES_A_BATCH)):
                await self._ask(batch, facts)

        async with trio.open_nursery() as nursery:
            for _ in range(BATCHES_AT_ONCE):
                nursery.start_soon(ask)
        return facts

    async def _ask(self, images: Sequence[ImageRef], facts: dict[ImageRef, ImageStat | None]) -> None:
        missing = []
        for image, found in (await self._batch(images)).items():
            if isinstance(found, ImageStat):
                facts[image] = found
            elif found.errno in _BROKEN:
                missing.append(image)
            else:
                log.debug("nothing is known of image %s of %s: %s", image.id, image.namespace, found)
                facts[image] = None
        if missing:
            try:
                facts |= dict.fromkeys(await self._still_named(missing), BROKEN)
            except RbdfsError as error:  # they may be there
                log.debug("%s", error)
                facts |= dict.fromkeys(missing)

    async def _still_named(self, images: list[ImageRef]) -> set[ImageRef]:
        """Those HEADs that their pool has a name for: these are broken, the others gone."""
        heads = [image for image in images if image.snapshot_id is None]
        if not heads:
            return set()
        namespace = heads[0].namespace
        return await rbd_directory.still_named(self._operations, self._ioctx_of(namespace), namespace, heads)

    async def _batch(self, images: Sequence[ImageRef]) -> dict[ImageRef, ImageStat | RbdfsError]:
        layers = await self._layered(images)
        return {image: _facts(layer) if isinstance(layer, _Layer) else layer for image, layer in layers.items()}

    async def _layered(self, images: Sequence[ImageRef]) -> dict[ImageRef, _Layer | RbdfsError]:
        layers = await self._layers(images)
        await self._lay_parents_under(layers.values(), ANCESTORS_AT_MOST)
        return layers

    async def _layers(self, images: Sequence[ImageRef]) -> dict[ImageRef, _Layer | RbdfsError]:
        layers: dict[ImageRef, _Layer | RbdfsError] = {}
        asked: list[tuple[ImageRef, librados.Ioctx]] = []
        for image in images:
            try:
                asked.append((image, self._ioctx_of(image.namespace)))
            except RbdfsError as error:  # a parent whose pool was removed
                layers[image] = error
        mapped = [(image, ioctx) for image, ioctx in asked if image.format != 1]
        maps = await self._load_maps(mapped)
        headers = await header.ask(self._operations, [header.request(ioctx, image) for image, ioctx in asked])
        for (image, _), reply in zip(asked, headers, strict=True):
            layers[image] = _layer(image, maps.get(image), reply)
        return layers

    async def _load_maps(self, images: Sequence[tuple[ImageRef, librados.Ioctx]]) -> dict[ImageRef, ObjectSet]:
        """What their maps say, of those that have one. A large map that is known is loaded only if it was written to:
        `ls` and who reads a file ask for it every second."""
        operate = self._operations.operate
        known = {image: kept for image, _ in images if (kept := self._maps.get(image)) is not None}
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
        """Decode a map, and keep it if it is large."""
        self._maps.drop(image)
        if loaded.result < 0 or loaded.calls[0][0] < 0:
            return
        try:
            objects = object_map.decode(loaded.calls[0][1])
        except MalformedError as error:
            log.warning("%s cannot be understood, so the image looks full: %s", object_map.object_of(image), error)
            return
        maps[image] = objects
        if objects.slots >= KEPT_FROM_OBJECTS:
            self._maps.keep(image, loaded.version, objects, objects.slots // object_map.OBJECTS_A_BYTE)

    async def _lay_parents_under(self, layers: Iterable[_Layer | RbdfsError], ancestors: int) -> None:
        """`ancestors`: of how many generations; a clone of more looks full."""
        clones = [
            (each, each.objects, each.header.parent)
            for each in layers
            if isinstance(each, _Layer) and each.objects is not None and each.header.parent is not None
        ]
        if not clones:
            return
        parents: dict[ImageRef, _Layer | RbdfsError] = {}
        if ancestors:
            parents = await self._layers(list({parent.image for _, _, parent in clones}))
            await self._lay_parents_under(parents.values(), ancestors - 1)
        for clone, objects, parent in clones:
            clone.objects, below, top = None, parents.get(parent.image), clone.header
            # An error: a parent that the key may not read. With other stripes, objects of one number hold other bytes,
            # and with any, the overlap ends in several objects.
            if (
                isinstance(below, _Layer)
                and below.objects is not None
                and below.header.object_size == top.object_size
                and not (top.is_striped or below.header.is_striped)
            ):
                clone.objects = objects.over(below.objects, -(-min(parent.overlap, top.size) // top.object_size))


_LOAD = (Call(b"object_map_load"),)


def _layer(image: ImageRef, objects: ObjectSet | None, reply: Reply) -> _Layer | RbdfsError:
    try:
        found = header.decode(image, reply)
    except RbdfsError as error:
        return error
    # One that is too short was made for a smaller image.
    if objects is not None and (not found.map_is_valid or objects.slots * found.object_size < found.size):
        objects = None
    return _Layer(found, objects)


def _facts(layer: _Layer) -> ImageStat:
    found, objects = layer.header, layer.objects
    return ImageStat(
        size=found.size,
        used_bytes=found.size if objects is None else min(found.size, objects.count * found.object_size),
        modified_ns=found.modified_ns,
    )
