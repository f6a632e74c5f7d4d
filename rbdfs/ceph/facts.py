"""The facts of images, thousands at a time, without opening any: two round trips each, all under way at once.

The object map goes first and the header second, which says whether the map can be believed: one that became invalid
meanwhile must not be. Through a clone its parent shows, and through that one its own: then the parents are asked the
same, each once for all of their clones, and the maps are laid over one another.
"""

import errno
import logging
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import trio

from rbdfs.catalog import ImageFacts, ImageRef, Namespace
from rbdfs.ceph import directory, header, librados, object_map
from rbdfs.ceph.header import Header
from rbdfs.ceph.object_map import ObjectSet
from rbdfs.ceph.read_op import Call, ReadOperations, Reply, Request
from rbdfs.errors import RbdfsError

log = logging.getLogger(__name__)

IMAGES_A_BATCH = 64
BATCHES_AT_ONCE = 3
"""One is decoded here while the OSDs answer the others. The object maps of a batch are in memory at a time: 16 KiB for
each 256 GiB of an image."""

BROKEN = ImageFacts(size=1, used_bytes=1, modified_ns=0)
"""What is shown of an image that its pool names and that has no header, or none that can be understood. Opening it
fails; tar archives a file without bytes, or without blocks, without opening it, and so without an error."""

_BROKEN = frozenset({errno.ENOENT, errno.EIO, errno.EINVAL})


@dataclass(slots=True)
class _Layer:
    """An image, or a parent of one: its header, and what it holds, None where that is not known."""

    header: Header
    held: ObjectSet | None


class FactsReader:
    """Asks for the facts of images."""

    def __init__(self, operations: ReadOperations, ioctx_of: Callable[[Namespace], librados.Ioctx]) -> None:
        self._operations = operations
        self._ioctx_of = ioctx_of

    async def facts(self, image: ImageRef) -> ImageFacts:
        """See `Catalog.facts`."""
        found = (await self._batch([image]))[image]
        if isinstance(found, RbdfsError):
            if found.errno in _BROKEN and await self.is_broken(image):
                return BROKEN
            raise found
        return found

    async def is_broken(self, image: ImageRef) -> bool:
        """Whether an image without a header has a name all the same. Raises RbdfsError."""
        return bool(await self._still_named([image]))

    async def facts_of_all(self, images: Iterable[ImageRef]) -> Mapping[ImageRef, ImageFacts | None]:
        """See `Catalog.facts_of_all`."""
        facts: dict[ImageRef, ImageFacts | None] = {}
        waiting = iter(images)

        async def ask() -> None:
            while batch := list(islice(waiting, IMAGES_A_BATCH)):
                await self._ask(batch, facts)

        async with trio.open_nursery() as nursery:
            for _ in range(BATCHES_AT_ONCE):
                nursery.start_soon(ask)
        return facts

    async def _ask(self, images: Sequence[ImageRef], facts: dict[ImageRef, ImageFacts | None]) -> None:
        missing = []
        for image, found in (await self._batch(images)).items():
            if isinstance(found, ImageFacts):
                facts[image] = found
            elif found.errno in _BROKEN:
                missing.append(image)
            else:
                log.debug("nothing is known of image %s of %s: %s", image.id, image.namespace, found)
                facts[image] = None
        if missing:
            try:
                facts |= dict.fromkeys(await self._still_named(missing), BROKEN)
            except RbdfsError as error:
                log.debug("%s", error)

    async def _still_named(self, images: list[ImageRef]) -> set[ImageRef]:
        """Those HEADs that their pool has a name for: these are broken, the others gone."""
        heads = [image for image in images if image.snapshot_id is None]
        if not heads:
            return set()
        namespace = heads[0].namespace
        return await directory.still_named(self._operations, self._ioctx_of(namespace), namespace, heads)

    async def _batch(self, images: Sequence[ImageRef]) -> dict[ImageRef, ImageFacts | RbdfsError]:
        layers = await self._layers(images)
        await self._lay_parents_under(layers.values())
        return {image: _facts(layer) if isinstance(layer, _Layer) else layer for image, layer in layers.items()}

    async def _layers(self, images: Sequence[ImageRef]) -> dict[ImageRef, _Layer | RbdfsError]:
        operate = self._operations.operate
        layers: dict[ImageRef, _Layer | RbdfsError] = {}
        asked: list[tuple[ImageRef, librados.Ioctx]] = []
        for image in images:
            try:
                asked.append((image, self._ioctx_of(image.namespace)))
            except RbdfsError as error:  # a parent whose pool was removed
                layers[image] = error
        mapped = [(image, ioctx) for image, ioctx in asked if image.format != 1]
        loaded = await operate([Request(ioctx, object_map.object_of(image), _LOAD) for image, ioctx in mapped])
        maps = {image: reply for (image, _), reply in zip(mapped, loaded, strict=True)}
        headers = await operate([header.request(ioctx, image) for image, ioctx in asked])
        for (image, _), reply in zip(asked, headers, strict=True):
            layers[image] = _layer(image, maps.get(image), reply)
        return layers

    async def _lay_parents_under(self, layers: Iterable[_Layer | RbdfsError]) -> None:
        clones = [
            (each, each.held, each.header.parent)
            for each in layers
            if isinstance(each, _Layer) and each.held is not None and each.header.parent is not None
        ]
        if not clones:
            return
        parents = await self._layers(list({parent.image for _, _, parent in clones}))
        await self._lay_parents_under(parents.values())
        for clone, held, parent in clones:
            below = parents[parent.image]
            object_size = clone.header.object_size
            # An error: a parent that the key may not read.
            if isinstance(below, RbdfsError) or below.held is None or below.header.object_size != object_size:
                clone.held = None
            else:
                clone.held = held.over(below.held, -(-parent.overlap // object_size))


_LOAD = (Call(b"object_map_load"),)


def _layer(image: ImageRef, loaded: Reply | None, reply: Reply) -> _Layer | RbdfsError:
    try:
        found = header.decode(image, reply)
    except RbdfsError as error:
        return error
    if loaded is None or loaded.result < 0 or not found.map_is_valid:
        return _Layer(found, None)
    result, encoded = loaded.calls[0]
    try:
        return _Layer(found, object_map.decode(encoded) if result >= 0 else None)
    except struct.error as error:
        log.warning("%s cannot be understood, so the image looks full: %s", object_map.object_of(image), error)
        return _Layer(found, None)


def _facts(layer: _Layer) -> ImageFacts:
    found, held = layer.header, layer.held
    return ImageFacts(
        size=found.size,
        used_bytes=found.size if held is None else min(found.size, held.count * found.object_size),
        modified_ns=found.modified_ns,
    )
