"""A cluster: what it holds, and the images that are open in it."""

import errno
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from typing import TypeVar, TypeVarTuple

import rados
import rbd
import trio

from rbdfs.catalog import Catalog, ImageRef, ImageStat, Namespace, Pool, Usage
from rbdfs.ceph import allocation, clients, placement
from rbdfs.ceph.bindings.aio import LibrbdImage, Portal, open_in_librbd
from rbdfs.ceph.bindings.health import ConnectionHealth
from rbdfs.ceph.bindings.lifetime import by_the_newest
from rbdfs.ceph.connection.connect import NEEDED_CAPS, ClusterOptions, why_no_osd_answers
from rbdfs.ceph.connection.connections import CONNECTION_LANE, Connection, Connections
from rbdfs.ceph.errors import translated
from rbdfs.ceph.image.ceph_image import CephImage
from rbdfs.ceph.image.changes import Changes, EarlierSnapshot
from rbdfs.ceph.image.diff import ImageDiff, objects_ever
from rbdfs.ceph.image.handle_cache import HandleCache
from rbdfs.ceph.image.image_state import HeaderClient
from rbdfs.ceph.metadata import header, rbd_directory
from rbdfs.ceph.metadata.attributes import AttributeReader
from rbdfs.ceph.metadata.pools import look_at, may_read
from rbdfs.ceph.metadata.snapshots import SnapshotReader
from rbdfs.ceph.metadata.stat import StatReader
from rbdfs.errors import ConnectError, RbdfsError
from rbdfs.spec import ImageSpec
from rbdfs.threads import run_in_thread

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

KIB = 1024


class Cluster(Catalog):
    """A connection to a cluster: lists its images, and opens them."""

    def __init__(self, connections: Connections, portal: Portal, name: str, only_pools: frozenset[str]) -> None:
        """`connect` does this."""
        self._connections = connections
        self._name = name
        self._portal = portal
        self._only_pools = only_pools
        self._unclear_pools: AbstractSet[int] = frozenset()
        """Pools that did not answer at the last listing: the log already has a line for each."""
        self._operations = connections.operations
        self._read_ioctx = connections.read_ioctx
        self._headers = HeaderClient(self._operations, self._read_ioctx, connections.client_ids)
        self._handles = HandleCache(self._read_ioctx, LibrbdImage)
        self._stat_reader = StatReader(self._operations, self._read_ioctx)
        self._snapshots = SnapshotReader(self._operations, self._read_ioctx)
        self._attributes = AttributeReader(
            self._operations, self._read_ioctx, self._pool_name_known, self._ask_open_image
        )

    @classmethod
    async def connect(cls, options: ClusterOptions, only_pools: Iterable[str] = ()) -> "Cluster":
        """Connect within `connect_timeout`. `only_pools` limits what is listed and found.

        Raises ConnectError, which says what is wrong on the way to the cluster, or with the rights there.
        """
        portal, only = Portal(), frozenset(only_pools)
        connections = Connections(options, only, portal)
        await connections.open()
        cluster = cls(connections, portal, options.name, only)
        try:
            with trio.move_on_after(options.connect_timeout) as waiting:
                await cluster._check_rights()
            if waiting.cancelled_caught:
                client = connections.current.rados
                reason = await run_in_thread(
                    why_no_osd_answers, client, options.name, abandon_on_cancel=True, lane=CONNECTION_LANE
                )
                raise ConnectError(f"the monitors answer, but no OSD did within {options.connect_timeout} s: {reason}")
        except BaseException:
            with trio.CancelScope(shield=True):
                await cluster.aclose()
            raise
        connections.recover()
        return cluster

    async def pools(self) -> list[Pool]:
        pools = await self._connections.pools()
        readable: list[Pool] = []
        unclear: dict[int, str] = {}

        async def ask(pool: Pool) -> None:
            try:
                may_read = await self._may_read(pool)
            except RbdfsError as error:
                # Listed, it cannot be entered; left out, it would look removed to a program that mirrors the mount.
                may_read = error.errno != errno.ENOENT
                unclear[pool.id] = f"cannot tell whether pool {pool.name} may be read: {error}"
            if may_read:
                readable.append(pool)

        async with trio.open_nursery() as nursery:
            for pool in pools:
                nursery.start_soon(ask, pool)
        for pool_id in unclear.keys() - self._unclear_pools:
            log.warning("%s", unclear[pool_id])
        self._unclear_pools = unclear.keys()
        return sorted(readable, key=lambda pool: pool.name)

    async def pool(self, name: str) -> Pool:
        for pool in await self._connections.pools():
            if pool.name == name:
                if await self._may_read(pool):
                    return pool
                raise RbdfsError(f"{self._name} may not read pool {name}", errno.EACCES)
        raise RbdfsError(f"there is no pool {name} with the application rbd", errno.ENOENT)

    async def namespaces(self, pool: Pool) -> list[Namespace]:
        names = await rbd_directory.namespaces(self._operations, self._read_ioctx(Namespace(pool)))
        return [Namespace(pool, name) for name in sorted(names)]

    async def namespace(self, pool: Pool, name: str) -> Namespace:
        namespace = Namespace(pool, name)
        if namespace in await self.namespaces(pool):
            return namespace
        raise RbdfsError(f"there is no image and no namespace {namespace}", errno.ENOENT)

    async def changed_ns(self, namespace: Namespace) -> int | None:
        return await rbd_directory.changed_ns(self._operations, self._read_ioctx(namespace))

    async def image_names(self, namespace: Namespace) -> dict[str, ImageRef]:
        return await rbd_directory.image_names(self._operations, self._read_ioctx(namespace), namespace)

    async def image(self, namespace: Namespace, name: str) -> ImageRef:
        return await rbd_directory.image(self._operations, self._read_ioctx(namespace), namespace, name)

    async def snapshots(self, image: ImageRef) -> dict[str, ImageRef]:
        try:
            return await self._snapshots.by_name(image)
        except RbdfsError as error:
            if error.errno == errno.ENOENT and await self._stat_reader.is_broken(image):
                return {}
            raise

    async def snapshot(self, image: ImageRef, name: str) -> ImageRef:
        snapshots = await self.snapshots(image)
        if name not in snapshots:
            raise RbdfsError(f"image {image.id} of {image.namespace} has no snapshot {name}", errno.ENOENT)
        return snapshots[name]

    async def stat(self, image: ImageRef) -> ImageStat:
        return await self._stat_reader.stat(image)

    async def stat_all(self, images: Iterable[ImageRef]) -> Mapping[ImageRef, ImageStat | None]:
        return await self._stat_reader.stat_all(images)

    async def attribute_names(self, image: ImageRef) -> list[str]:
        return await self._attributes.names(image)

    async def attribute(self, image: ImageRef, name: str) -> str:
        return await self._attributes.value(image, name)

    async def usage(self) -> Usage:

        def ask(client: rados.Rados) -> Mapping[str, int]:
            with translated("ask how full the cluster is"):
                return dict(client.get_cluster_stats())

        stats = await self._connections.ask(lambda connection: partial(ask, connection.rados))
        return Usage(total=stats["kb"] * KIB, available=stats["kb_avail"] * KIB)

    @property
    def health(self) -> ConnectionHealth:
        """How the cluster has answered recently."""
        return self._portal.health

    @property
    def fsid(self) -> str:
        """The cluster's unique id."""
        return str(self._connections.current.rados.get_fsid())

    def setting(self, name: str) -> str:
        """An option of Ceph's configuration, as this client has it."""
        return str(self._connections.current.rados.conf_get(name))

    async def writers(self, image: ImageRef) -> list[str]:
        """The addresses of clients that may write to an image now. Ask before opening it here. Raises RbdfsError."""
        return await self._ask_librbd(image, clients.writers, image)

    async def allocation(self, image: ImageRef, offset: int, length: int | None) -> allocation.Allocation:
        """Where a range of an image is stored; without `length`, to the end of the image. Raises RbdfsError."""
        return await self._ask_librbd(image, allocation.allocation, image, offset, length)

    async def pool_name(self, pool_id: int) -> str:
        """The present name of a pool. Raises RbdfsError."""

        def ask(client: rados.Rados) -> str:
            with translated(f"look for pool {pool_id}"):
                return str(client.pool_reverse_lookup(pool_id))

        return await self._connections.ask(lambda connection: partial(ask, connection.rados))

    async def placements(
        self, pool_id: int, namespace: str, object_names: Iterable[str]
    ) -> Mapping[str, tuple[str, list[int]]]:
        """The placement group and acting OSDs of objects in a pool; they need not exist. Raises RbdfsError."""
        where = pool_id, namespace, set(object_names)
        return await self._connections.ask(lambda connection: partial(placement.placements, connection.rados, *where))

    async def open_image(self, spec: ImageSpec, image: ImageRef) -> CephImage:
        """Open an image; `spec` is its name in messages. Raises RbdfsError."""

        async def by_connection(_: Connection) -> CephImage:
            return await CephImage.open(
                spec, image, self._headers, self._portal, self._handles, self._stat_reader.objects
            )

        try:
            return await by_the_newest(self._connections.newest, by_connection)
        except RbdfsError as error:
            if error.errno != errno.ENOENT or not await self._stat_reader.is_broken(image):
                raise
            # Not ENOENT: rsync and tar take that for a file that was just removed, and report no error.
            raise RbdfsError(
                f"{error}; its pool names the image, but part of its header {header.object_of(image)} is missing",
                errno.EIO,
            ) from error

    async def changes(self, since: ImageRef, later: Sequence[CephImage], kept_bytes: int) -> Changes:
        """What has changed since a snapshot, up to each of `later`, which are open; everything beyond `kept_bytes` has.

        Raises RbdfsError: ENOENT if the snapshot is gone.
        """
        earlier = await self._earlier(since, later[0].spec)
        objects = [(image, await self._stat_reader.objects(image.image)) for image in later]
        return Changes(earlier, await self._stat_reader.objects(since), objects, kept_bytes)

    async def diff(self, since: ImageRef | None, image: CephImage) -> ImageDiff:
        """What has changed in an image or snapshot since an earlier snapshot, or since it was made.

        Raises RbdfsError: ENOENT if the snapshot is gone.
        """
        head = replace(image.image, snapshot_id=None)
        _, snapshots = await header.snapshots(self._operations, self._read_ioctx(head.namespace), head)
        objects = await objects_ever(
            self._stat_reader.objects, since, image.image, [snapshot.id for snapshot in snapshots]
        )
        return ImageDiff(image, None if since is None else await self._earlier(since, image.spec), objects)

    async def _earlier(self, snapshot: ImageRef, later: ImageSpec) -> EarlierSnapshot:
        name = await self._snapshot_name(snapshot)
        state = await self._headers.state(replace(later, snapshot=name), snapshot)
        return EarlierSnapshot(name, state, partial(self._snapshot_name, snapshot))

    async def _snapshot_name(self, snapshot: ImageRef) -> str:
        """The present name of a snapshot. Raises RbdfsError."""
        for name, other in (await self.snapshots(replace(snapshot, snapshot_id=None))).items():
            if snapshot == other:
                return name
        raise RbdfsError(f"snapshot {snapshot.snapshot_id} of image {snapshot.id} was removed", errno.ENOENT)

    def _pool_name_known(self, pool_id: int) -> str:
        """Raises rados's errors."""
        return str(self._connections.current.rados.pool_reverse_lookup(pool_id))

    async def _ask_librbd(self, image: ImageRef, function: Callable[[rados.Ioctx, *Ts], T], *args: *Ts) -> T:
        """Call a blocking function that opens an image by Ceph's own binding. Raises what it raises, and RbdfsError."""
        await self._headers.check(image)
        where = image.namespace
        return await self._connections.ask(
            lambda connection: partial(function, connection.ioctx(where), *args), where.pool.id
        )

    async def _ask_open_image(self, image: ImageRef, ask: Callable[[rbd.Image], str]) -> str:
        def in_librbd(ioctx: rados.Ioctx) -> str:
            with translated(f"open image {image.id} of {image.namespace}"), open_in_librbd(ioctx, image) as opened:
                return ask(opened)

        return await self._ask_librbd(image, in_librbd)

    async def aclose(self) -> None:
        """Disconnect. Close all images first: librados aborts the process otherwise."""
        await self._handles.aclose()
        await self._connections.aclose()

    async def _may_read(self, pool: Pool) -> bool:
        return may_read(pool, await self._operations.ask(look_at(self._read_ioctx(Namespace(pool)))))

    async def _check_rights(self) -> None:
        """Raise ConnectError if no pool can be shown, or if one that was asked for cannot."""
        pools = await self._connections.pools()
        missing = self._only_pools - {pool.name for pool in pools}
        if missing:
            raise ConnectError(f"there is no pool {', '.join(sorted(missing))} with the application rbd")
        refused = [pool.name for pool in pools if not await self._may_read(pool)]
        if refused and (self._only_pools or len(refused) == len(pools)):
            raise ConnectError(f"{self._name} may not read pool {', '.join(refused)}; it needs the caps {NEEDED_CAPS}")
        if not pools:
            log.warning("there is no pool with the application rbd, so there is nothing to show yet")
