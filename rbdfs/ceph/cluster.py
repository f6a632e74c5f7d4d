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
from rbdfs.ceph import allocation, clients, directory, header, librados, placement
from rbdfs.ceph.aio import Answer, Handover, LibrbdImage, open_in_librbd
from rbdfs.ceph.attributes import AttributeReader
from rbdfs.ceph.connect import ClusterOptions, connect, connect_for_reads
from rbdfs.ceph.errors import translated
from rbdfs.ceph.facts import FactsReader
from rbdfs.ceph.handles import Handles
from rbdfs.ceph.image import Asks, CephImage
from rbdfs.ceph.read_op import ReadOperations
from rbdfs.errors import ConnectError, RbdfsError
from rbdfs.spec import ImageSpec
from rbdfs.threads import in_thread, in_thread_to_its_end, wait_for_abandoned

log = logging.getLogger(__name__)

RBD_APPLICATION = "rbd"
KIB = 1024

ABANDONED_SECONDS = 10.0
"""How long a disconnect waits for what a cancelled request has left behind in a thread: it uses the connection."""


class Cluster:
    """A `Catalog` (rbdfs/catalog.py) of a real cluster, and where images are opened."""

    def __init__(self, connection: rados.Rados, name: str, handover: Handover, only_pools: frozenset[str]) -> None:
        self._rados = connection
        self._name = name
        self._handover = handover
        self._only_pools = only_pools
        self._ioctxs: dict[Namespace, rados.Ioctx] = {}
        self._reads: librados.Cluster
        self._read_ioctxs: dict[Namespace, librados.Ioctx] = {}
        self._operations = ReadOperations(handover)
        self._handles = Handles(self._open_handle)
        self._facts = FactsReader(self._operations, self._read_ioctx)
        self._attributes = AttributeReader(
            self._operations, self._read_ioctx, connection.pool_reverse_lookup, self._open_to_ask
        )

    @classmethod
    async def connect(cls, options: ClusterOptions, only_pools: Iterable[str] = ()) -> "Cluster":
        """Connect within `connect_timeout`. `only_pools` limits what is listed and found.

        Raises ConnectError, whose sentence says what is wrong on the way to the cluster, or with the rights there.
        """
        client = await in_thread(connect, options)
        cluster = cls(client, options.name, Handover(), frozenset(only_pools))
        try:
            cluster._reads = await in_thread_to_its_end(connect_for_reads, client, options)
            with trio.move_on_after(options.connect_timeout) as waiting:
                await cluster._check_rights()
            if waiting.cancelled_caught:
                raise ConnectError(
                    f"the monitors answer, but no OSD did within {options.connect_timeout} s: see 'ceph health detail'"
                )
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
        names = await directory.namespaces(self._operations, self._read_ioctx(Namespace(pool)))
        return [Namespace(pool, name) for name in sorted(names)]

    async def namespace(self, pool: Pool, name: str) -> Namespace:
        """See `Catalog.namespace`."""
        namespace = Namespace(pool, name)
        if namespace in await self.namespaces(pool):
            return namespace
        raise RbdfsError(f"there is no image and no namespace {namespace}", errno.ENOENT)

    async def changed_ns(self, namespace: Namespace) -> int | None:
        """See `Catalog.changed_ns`."""
        return await directory.changed_ns(self._operations, self._read_ioctx(namespace))

    async def image_names(self, namespace: Namespace) -> dict[str, ImageRef]:
        """See `Catalog.image_names`."""
        return await directory.image_names(self._operations, self._read_ioctx(namespace), namespace)

    async def image(self, namespace: Namespace, name: str) -> ImageRef:
        """See `Catalog.image`."""
        return await directory.image(self._operations, self._read_ioctx(namespace), namespace, name)

    async def snapshots(self, image: ImageRef) -> dict[str, ImageRef]:
        """See `Catalog.snapshots`."""
        try:
            found = await header.snapshots(self._operations, self._read_ioctx(image.namespace), image)
        except RbdfsError as error:
            if error.errno == errno.ENOENT and await self._facts.is_broken(image):
                return {}
            raise
        return {each.name: replace(image, snapshot_id=each.id) for each in found if each.is_users}

    async def snapshot(self, image: ImageRef, name: str) -> ImageRef:
        """See `Catalog.snapshot`."""
        snapshots = await self.snapshots(image)
        if name not in snapshots:
            raise RbdfsError(f"image {image.id} of {image.namespace} has no snapshot {name}", errno.ENOENT)
        return snapshots[name]

    async def facts(self, image: ImageRef) -> ImageFacts:
        """See `Catalog.facts`."""
        return await self._facts.facts(image)

    async def facts_of_all(self, images: Iterable[ImageRef]) -> Mapping[ImageRef, ImageFacts | None]:
        """See `Catalog.facts_of_all`."""
        return await self._facts.facts_of_all(images)

    async def attribute_names(self, image: ImageRef) -> list[str]:
        """See `Catalog.attribute_names`."""
        return await self._attributes.names(image)

    async def attribute(self, image: ImageRef, name: str) -> str:
        """See `Catalog.attribute`."""
        return await self._attributes.value(image, name)

    async def usage(self) -> Usage:
        """See `Catalog.usage`."""
        with translated("ask how full the cluster is"):
            stats = await in_thread(self._rados.get_cluster_stats)
        return Usage(total=stats["kb"] * KIB, available=stats["kb_avail"] * KIB)

    @property
    def fsid(self) -> str:
        """The cluster's id, which no other has."""
        return str(self._rados.get_fsid())

    def setting(self, name: str) -> str:
        """An option of Ceph's configuration, as it is for us."""
        return str(self._rados.conf_get(name))

    async def writers(self, image: ImageRef) -> list[str]:
        """Who may write to an image now, by address. To be asked before we open it. Raises RbdfsError."""
        return await in_thread(clients.writers, self._ioctx(image.namespace), image)

    async def allocation(self, image: ImageRef, offset: int, length: int | None) -> allocation.Allocation:
        """Where a range of an image lies, to its end without a length. Raises RbdfsError."""
        return await in_thread(allocation.allocation, self._ioctx(image.namespace), image, offset, length)

    async def pool_name(self, pool_id: int) -> str:
        """What a pool is called now. Raises RbdfsError."""
        with translated(f"look for pool {pool_id}"):
            return str(await in_thread(self._rados.pool_reverse_lookup, pool_id))

    async def placements(
        self, pool_id: int, namespace: str, object_names: Iterable[str]
    ) -> Mapping[str, tuple[str, list[int]]]:
        """Of objects in a pool, present or not, the placement group and its acting OSDs. Raises RbdfsError."""
        return await in_thread(placement.placements, self._rados, pool_id, namespace, set(object_names))

    async def open_image(self, spec: ImageSpec, image: ImageRef) -> CephImage:
        """Open an image; `spec` is what it is called in messages. Raises RbdfsError."""
        ioctx = self._ioctx(image.namespace)
        asks = Asks(self._operations, self._read_ioctx(image.namespace))
        try:
            return await CephImage.open(spec, image, ioctx, asks, self._handover, self._handles)
        except RbdfsError as error:
            if error.errno != errno.ENOENT or not await self._facts.is_broken(image):
                raise
            # Not ENOENT: rsync and tar take that for a file that was removed meanwhile, and are content.
            raise RbdfsError(
                f"{error}; its pool names the image, but part of its header {header.object_of(image)} is missing",
                errno.EIO,
            ) from error

    def _open_handle(self, image: ImageRef) -> LibrbdImage:
        """Blocks; raises RbdfsError."""
        return LibrbdImage(self._read_ioctx(image.namespace), image)

    def _open_to_ask(self, image: ImageRef) -> rbd.Image:
        """Blocks; raises rbd's errors."""
        return open_in_librbd(self._ioctx(image.namespace), image)

    async def aclose(self) -> None:
        """Disconnect. Every image must be closed: librados aborts the process otherwise."""
        await self._handles.aclose()
        await in_thread_to_its_end(self._shutdown)

    def _shutdown(self) -> None:
        if not wait_for_abandoned(ABANDONED_SECONDS):
            log.warning("the cluster still owes an answer to what was given up; leaving the connection as it is")
            return
        for read_ioctx in self._read_ioctxs.values():
            read_ioctx.destroy()
        if hasattr(self, "_reads"):
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
        if namespace not in self._ioctxs:
            self._ioctxs[namespace] = self._open_ioctx(namespace.pool.id, namespace.name)
        return self._ioctxs[namespace]

    def _open_ioctx(self, pool_id: int, namespace: str) -> rados.Ioctx:
        """For the caller to close."""
        with translated(f"open pool {pool_id}"):
            ioctx = self._rados.open_ioctx2(pool_id)
            try:
                ioctx.set_namespace(namespace)
            except UnicodeEncodeError:  # Ceph's binding takes a str, and encodes it strictly
                ioctx.close()
                raise RbdfsError(
                    f"images of namespace {namespace!r} cannot be opened: its name is not UTF-8", errno.EILSEQ
                ) from None
            return ioctx

    def _read_ioctx(self, namespace: Namespace) -> librados.Ioctx:
        """For what Ceph's own bindings lack: image data by events, and read operations."""
        if namespace not in self._read_ioctxs:
            self._read_ioctxs[namespace] = self._reads.open_ioctx(namespace.pool.id, namespace.name)
        return self._read_ioctxs[namespace]
