"""The connection to a cluster: its pools, its images and their facts, without opening any."""

import errno
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

import rados
import rbd
import trio

from rbdfs.catalog import ImageFacts, ImageRef, Namespace, Pool, Usage
from rbdfs.ceph import header, librbd, object_map
from rbdfs.ceph.aio import (
    Answer,
    CallbackImage,
    EventImage,
    Handover,
    ReadHandle,
    execute,
    in_thread,
    in_thread_to_its_end,
)
from rbdfs.ceph.connect import ClusterOptions, connect, connect_for_reads
from rbdfs.ceph.errors import translated
from rbdfs.ceph.image import CephImage
from rbdfs.errors import ConnectError, RbdfsError
from rbdfs.spec import ImageSpec

log = logging.getLogger(__name__)

RBD_APPLICATION = "rbd"
KIB = 1024
FACTS_AT_ONCE = 64
"""Images that are asked for their facts at a time; more did not list 2,000 images sooner."""


class Cluster:
    """A `Catalog` (rbdfs/catalog.py) of a real cluster, and where images are opened."""

    def __init__(self, connection: rados.Rados, name: str, handover: Handover, only_pools: frozenset[str]) -> None:
        self._rados = connection
        self._name = name
        self._handover = handover
        self._only_pools = only_pools
        self._ioctxs: dict[tuple[int, str], rados.Ioctx] = {}
        self._reads: librbd.Cluster | None = None
        self._read_ioctxs: dict[tuple[int, str], librbd.Ioctx] = {}

    @classmethod
    async def connect(cls, options: ClusterOptions, only_pools: Iterable[str] = ()) -> "Cluster":
        """Connect within `connect_timeout`. `only_pools` limits what is listed and found.

        Raises ConnectError, whose sentence says what is wrong on the way to the cluster, or with the rights there.
        """
        client = await in_thread(connect, options)
        cluster = cls(client, options.name, Handover(), frozenset(only_pools))
        try:
            with trio.move_on_after(options.connect_timeout) as waiting:
                await cluster._check_rights()
            if waiting.cancelled_caught:
                raise ConnectError(
                    f"the monitors answer, but no OSD did within {options.connect_timeout} s: see 'ceph health detail'"
                )
            if options.events:
                await cluster._connect_for_reads(options)
        except BaseException:
            with trio.CancelScope(shield=True):
                await cluster.aclose()
            raise
        return cluster

    async def pools(self) -> list[Pool]:
        """See `Catalog.pools`."""
        pools = await self._all_pools()
        readable: list[Pool] = []

        async def ask(pool: Pool) -> None:
            try:
                if await self._may_read(pool):
                    readable.append(pool)
            except RbdfsError as error:
                log.warning("pool %s is left out of the listing: %s", pool.name, error)

        async with trio.open_nursery() as nursery:
            for pool in pools:
                nursery.start_soon(ask, pool)
        return sorted(readable, key=lambda pool: pool.name)

    async def pool(self, name: str) -> Pool:
        """See `Catalog.pool`."""
        for pool in await self._all_pools():
            if pool.name == name:
                if await self._may_read(pool):
                    return pool
                raise RbdfsError(f"{self._name} may not read pool {name}", errno.EACCES)
        raise RbdfsError(f"there is no pool {name} with the application rbd", errno.ENOENT)

    async def namespaces(self, pool: Pool) -> list[Namespace]:
        """See `Catalog.namespaces`."""
        ioctx = self._ioctx(Namespace(pool))
        with translated(f"list the namespaces of {pool.name}"):
            names = await in_thread(rbd.RBD().namespace_list, ioctx)
        return [Namespace(pool, name) for name in sorted(names)]

    async def namespace(self, pool: Pool, name: str) -> Namespace:
        """See `Catalog.namespace`."""
        ioctx = self._ioctx(Namespace(pool))
        with translated(f"look for namespace {name} of {pool.name}"):
            if await in_thread(rbd.RBD().namespace_exists, ioctx, name):
                return Namespace(pool, name)
        raise RbdfsError(f"pool {pool.name} has no namespace {name}", errno.ENOENT)

    async def image_names(self, namespace: Namespace) -> dict[str, ImageRef]:
        """See `Catalog.image_names`."""
        ioctx = self._ioctx(namespace)
        with translated(f"list the images of {namespace}"):
            images = await in_thread(lambda: list(rbd.RBD().list2(ioctx)))
        return {image["name"]: ImageRef(namespace, image["id"]) for image in images if image["id"]}

    async def image(self, namespace: Namespace, name: str) -> ImageRef:
        """See `Catalog.image`."""
        answer = await execute(
            self._handover, self._ioctx(namespace), "rbd_directory", "rbd", "dir_get_id", header.encode_string(name)
        )
        return ImageRef(namespace, header.decode_string(answer))

    async def snapshots(self, image: ImageRef) -> dict[str, ImageRef]:
        """See `Catalog.snapshots`."""
        ioctx = self._ioctx(image.namespace)
        found = {}
        for snapshot_id in reversed(await header.get_snapshot_ids(self._handover, ioctx, image.id)):
            snapshot = await header.get_snapshot(self._handover, ioctx, image.id, snapshot_id)
            if snapshot.is_users:
                found[snapshot.name] = replace(image, snapshot_id=snapshot_id)
        return found

    async def snapshot(self, image: ImageRef, name: str) -> ImageRef:
        """See `Catalog.snapshot`."""
        snapshots = await self.snapshots(image)
        if name not in snapshots:
            raise RbdfsError(f"image {image.id} of {image.namespace} has no snapshot {name}", errno.ENOENT)
        return snapshots[name]

    async def facts(self, image: ImageRef) -> ImageFacts:
        """See `Catalog.facts`."""
        ioctx = self._ioctx(image.namespace)
        snapshot_id = header.HEAD if image.snapshot_id is None else image.snapshot_id
        size, object_size = await header.get_size(self._handover, ioctx, image.id, snapshot_id)
        if image.snapshot_id is None:
            modified_ns = await header.get_modify_timestamp(self._handover, ioctx, image.id)
        else:
            modified_ns = (await header.get_snapshot(self._handover, ioctx, image.id, snapshot_id)).created_ns
        mapped = object_map.MappedImage(
            image.namespace.pool.id, image.namespace.name, image.id, size, object_size, snapshot_id
        )
        held = await object_map.held_objects(self._handover, self._ioctx_by_id, mapped)
        return ImageFacts(
            size=size,
            used_bytes=size if held is None else min(size, held.count * object_size),
            object_size=object_size,
            modified_ns=modified_ns,
        )

    async def facts_of_all(self, images: Iterable[ImageRef]) -> Mapping[ImageRef, ImageFacts]:
        """See `Catalog.facts_of_all`."""
        facts: dict[ImageRef, ImageFacts] = {}
        waiting = iter(images)

        async def ask() -> None:
            for image in waiting:
                try:
                    facts[image] = await self.facts(image)
                except RbdfsError as error:
                    log.debug("image %s of %s is left out: %s", image.id, image.namespace, error)

        async with trio.open_nursery() as nursery:
            for _ in range(FACTS_AT_ONCE):
                nursery.start_soon(ask)
        return facts

    async def usage(self) -> Usage:
        """See `Catalog.usage`."""
        with translated("ask how full the cluster is"):
            stats = await in_thread(self._rados.get_cluster_stats)
        return Usage(total=stats["kb"] * KIB, available=stats["kb_avail"] * KIB)

    async def open_image(self, spec: ImageSpec, image: ImageRef) -> CephImage:
        """Open an image; `spec` is what it is called in messages. Raises RbdfsError."""
        ioctx = self._open_ioctx(image.namespace.pool.id, image.namespace.name)
        read_ioctx = self._read_ioctx(image.namespace)

        def open_handle(read_only: bool) -> ReadHandle:
            if read_ioctx is None:
                return CallbackImage(ioctx, image.id, self._handover, read_only=read_only)
            return EventImage(read_ioctx, image.id, read_only=read_only)

        return await CephImage.open(spec, image.id, ioctx, self._handover, open_handle)

    async def aclose(self) -> None:
        """Disconnect. Every image must be closed: librados aborts the process otherwise."""
        await in_thread_to_its_end(self._shutdown)

    def _shutdown(self) -> None:
        for read_ioctx in self._read_ioctxs.values():
            read_ioctx.destroy()
        if self._reads is not None:
            self._reads.shutdown()
        for ioctx in self._ioctxs.values():
            ioctx.close()
        self._rados.shutdown()

    async def _all_pools(self) -> list[Pool]:
        """The pools with the rbd application, whether or not the key may read them."""
        with translated("list the pools"):
            return await in_thread(self._list_pools)

    def _list_pools(self) -> list[Pool]:
        # An idle client hears of no new osdmap, and so of no new pool, unless it asks.
        self._rados.wait_for_latest_osdmap()
        pools = []
        for name in self._rados.list_pools():
            if self._only_pools and name not in self._only_pools:
                continue
            try:
                with self._rados.open_ioctx(name) as ioctx:
                    if RBD_APPLICATION in ioctx.application_list():
                        pools.append(Pool(ioctx.get_pool_id(), name))
            except rados.ObjectNotFound:
                log.debug("pool %s was removed while the pools were listed", name)
        return pools

    async def _may_read(self, pool: Pool) -> bool:
        answer: Answer[int] = Answer()

        def arrived(completion: rados.Completion, *_: object) -> None:
            self._handover.post(partial(answer.give, completion.get_return_value()))

        with translated(f"read pool {pool.name}"):
            self._ioctx(Namespace(pool)).aio_stat("rbd_directory", arrived)
        result = await answer.get()
        if result in (0, -errno.ENOENT):
            return True
        if result in (-errno.EPERM, -errno.EACCES):
            return False
        raise RbdfsError(f"cannot read pool {pool.name}: {os.strerror(-result)}", -result)

    async def _connect_for_reads(self, options: ClusterOptions) -> None:
        try:
            self._reads = await in_thread_to_its_end(connect_for_reads, self._rados, options)
        except ConnectError as error:
            log.warning("image data comes by callbacks, which are slower for small reads: %s", error)

    async def _check_rights(self) -> None:
        """Raise ConnectError where nothing could be shown, or a pool that was asked for could not."""
        pools = await self._all_pools()
        missing = self._only_pools - {pool.name for pool in pools}
        if missing:
            raise ConnectError(f"there is no pool {', '.join(sorted(missing))} with the application rbd")
        refused = [pool.name for pool in pools if not await self._may_read(pool)]
        if refused and (self._only_pools or len(refused) == len(pools)):
            raise ConnectError(
                f"{self._name} may not read pool {', '.join(refused)}: "
                f"it needs the caps mon 'profile rbd' osd 'profile rbd-read-only'"
            )
        if not pools:
            log.warning("there is no pool with the application rbd, so there is nothing to show yet")

    def _ioctx(self, namespace: Namespace) -> rados.Ioctx:
        return self._ioctx_by_id(namespace.pool.id, namespace.name)

    def _ioctx_by_id(self, pool_id: int, namespace: str) -> rados.Ioctx:
        key = (pool_id, namespace)
        if key not in self._ioctxs:
            self._ioctxs[key] = self._open_ioctx(pool_id, namespace)
        return self._ioctxs[key]

    def _open_ioctx(self, pool_id: int, namespace: str) -> rados.Ioctx:
        """For the caller to close."""
        with translated(f"open pool {pool_id}"):
            ioctx = self._rados.open_ioctx2(pool_id)
            ioctx.set_namespace(namespace)
            return ioctx

    def _read_ioctx(self, namespace: Namespace) -> librbd.Ioctx | None:
        """For the event API; None where reads go by callbacks."""
        key = (namespace.pool.id, namespace.name)
        if self._reads is not None and key not in self._read_ioctxs:
            self._read_ioctxs[key] = self._reads.open_ioctx(*key)
        return self._read_ioctxs.get(key)
