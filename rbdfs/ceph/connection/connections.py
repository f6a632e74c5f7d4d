"""The connection to a cluster, which is two: one by Ceph's own binding, and one of ours for what that lacks.

When it does not work any more (recovery.py), a new one takes its place. The old one is closed once nothing uses it:
librados aborts the process if a connection is shut down that has open images.
"""

import errno
import logging
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Final, TypeVar

import rados
import trio

from rbdfs.catalog import Namespace, Pool
from rbdfs.ceph.bindings import librados
from rbdfs.ceph.bindings.aio import Portal
from rbdfs.ceph.bindings.lifetime import Lifetime, by_the_newest
from rbdfs.ceph.bindings.read_op import ReadOperations
from rbdfs.ceph.connection.connect import ClusterOptions, connect, connect_for_reads
from rbdfs.ceph.connection.probe import PROBE_SECONDS, Probe
from rbdfs.ceph.connection.recovery import Recovery
from rbdfs.ceph.errors import translated
from rbdfs.ceph.metadata.pools import look_at, may_read, rbd_pools
from rbdfs.errors import ConnectError, RbdfsError
from rbdfs.tasks import BackgroundTasks
from rbdfs.threads import forget_lanes, run_in_thread, wait_for_abandoned

log = logging.getLogger(__name__)

T = TypeVar("T")

ABANDONED_SECONDS = 10.0
"""How long a disconnect waits for threads that cancelled requests have left behind: they use the connection."""

UNANSWERED: Final = "the cluster has not answered requests that were cancelled; leaving the connection open"

MONITORS_LANE: Final = -1
MONITORS_SILENT: Final = (errno.ETIMEDOUT, errno.EACCES)
"""The errors of a question that the monitors have not answered."""

CONNECTION_LANE: Final = "recovery"
"""For the threads that make, probe and close connections: if they hang, they block no others."""


class Connection:
    """Both connections, and the ioctxs that were opened by them. All in the trio thread, except `close`."""

    def __init__(self, client: rados.Rados, reads: librados.Cluster, lifetime: Lifetime) -> None:
        """Use `open`."""
        self.rados = client
        self.reads = reads
        self.lifetime = lifetime
        self._ioctxs: dict[Namespace, rados.Ioctx] = {}
        self._read_ioctxs: dict[Namespace, librados.Ioctx] = {}
        self._listed_pools: set[int] = set()
        """Those that the OSD maps of both have had."""

    @classmethod
    async def open(cls, options: ClusterOptions, lifetime: Lifetime) -> "Connection":
        """Connect, with configuration and keyring as they are now. Raises ConnectError."""
        client = await run_in_thread(connect, options, abandon_on_cancel=True, lane=CONNECTION_LANE)
        try:
            reads = await run_in_thread(partial(connect_for_reads, client, options, lifetime), lane=CONNECTION_LANE)
        except BaseException:
            with trio.CancelScope(shield=True):
                await run_in_thread(client.shutdown, lane=CONNECTION_LANE)
            raise
        return cls(client, reads, lifetime)

    def pools(self, only: AbstractSet[str]) -> list[Pool]:
        """What `rbd_pools` lists. Blocks.

        The first ioctx of a pool that is newer than the OSD map waits for a map (`RadosClient::create_ioctx`). Those
        of listed pools are opened here once, so that nobody waits in the trio thread.
        """
        pools = rbd_pools(self.rados, only)
        for pool in pools:
            if pool.id not in self._listed_pools:
                with suppress(RbdfsError):  # it was removed since it was listed
                    self.reads.open_ioctx(Namespace(pool)).destroy()
                    self._open_ioctx(pool.id, "").close()
                    self._listed_pools.add(pool.id)
        return pools

    def ioctx(self, namespace: Namespace) -> rados.Ioctx:
        """For Ceph's own bindings. Raises RbdfsError."""
        if namespace not in self._ioctxs:
            self._ioctxs[namespace] = self._open_ioctx(namespace.pool.id, namespace.name)
        return self._ioctxs[namespace]

    def _open_ioctx(self, pool_id: int, namespace: str) -> rados.Ioctx:
        with translated(f"open pool {pool_id}"):
            ioctx = self.rados.open_ioctx2(pool_id)
            try:
                ioctx.set_namespace(namespace)
            except UnicodeEncodeError:  # Ceph's binding takes a str, and encodes it strictly
                ioctx.close()
                raise RbdfsError(
                    f"images of namespace {namespace!r} cannot be opened: its name is not UTF-8", errno.EILSEQ
                ) from None
            return ioctx

    def read_ioctx(self, namespace: Namespace) -> librados.Ioctx:
        """For what Ceph's own bindings lack: image data, read operations and watches. Raises RbdfsError."""
        if namespace not in self._read_ioctxs:
            self._read_ioctxs[namespace] = self.reads.open_ioctx(namespace)
        return self._read_ioctxs[namespace]

    def close(self) -> None:
        """Disconnect. Blocks. Nothing may use the connection any more."""
        self.reads.flush_watches()
        for read_ioctx in self._read_ioctxs.values():
            read_ioctx.destroy()
        self.reads.shutdown()
        for ioctx in self._ioctxs.values():
            ioctx.close()
        self.rados.shutdown()


class Connections:
    """The present connection, and earlier ones that are still in use. All in the trio thread."""

    def __init__(self, options: ClusterOptions, only_pools: frozenset[str], portal: Portal) -> None:
        """Call `open` next."""
        self._options = options
        self._only_pools = only_pools
        self._portal = portal
        self.current: Connection
        self._probe: Probe
        self.client_ids: set[int] = set()
        """The ids by which others see our watches, also by earlier connections. No id is used again."""
        self.operations = ReadOperations(portal, self.read_ioctx)
        self._recovery = Recovery(portal.health, self._works, self._reconnect)
        self._replaced: set[Connection] = set()
        self._closing = BackgroundTasks()

    async def open(self) -> None:
        """Connect. Raises ConnectError."""
        self._take(await Connection.open(self._options, Lifetime(self._recovery)))

    def recover(self) -> None:
        """Reconnect from now on, whenever the connection does not work any more."""
        self._recovery.is_on = True

    def _take(self, connection: Connection) -> None:
        self.client_ids.add(connection.reads.client_id)
        self.current = connection
        self._probe = self._probe_of(connection)

    def read_ioctx(self, namespace: Namespace) -> librados.Ioctx:
        return self.current.read_ioctx(namespace)

    async def newest(self) -> Connection:
        """The present connection, for `by_the_newest`."""
        return self.current

    async def ask(self, prepare: Callable[[Connection], Callable[[], T]], pool_id: int | None = None) -> T:
        """Call the blocking function that `prepare` returns in a thread; again if the connection is replaced during it.

        It waits for the pool `pool_id`, or for the monitors if that is None. A cancel abandons it. Raises RbdfsError.
        """

        async def call(connection: Connection) -> T:
            lifetime = connection.lifetime
            lane = MONITORS_LANE if pool_id is None else pool_id
            try:
                return await self._portal.run_holding(lifetime, prepare(connection), lane=lifetime.lane(lane))
            except RbdfsError as error:
                if pool_id is None and error.errno in MONITORS_SILENT:
                    self._recovery.suspect()
                raise

        with self._recovery.patience() if pool_id is None else nullcontext():
            return await by_the_newest(self.newest, call)

    async def pools(self) -> list[Pool]:
        """The pools with the rbd application, whether or not the key may read them. Raises RbdfsError."""
        return await self.ask(lambda connection: partial(connection.pools, self._only_pools))

    async def _works(self) -> bool:
        return await self._probe.why_not() is None

    def _probe_of(self, connection: Connection) -> Probe:
        async def list_pools() -> list[Pool]:
            ask = partial(connection.pools, self._only_pools)
            return await self._portal.run_holding(connection.lifetime, ask, lane=CONNECTION_LANE)

        async def is_readable(pool: Pool) -> bool:
            request = look_at(connection.read_ioctx(Namespace(pool)))
            return may_read(pool, (await self.operations.operate_once([request]))[0])

        return Probe(list_pools, is_readable)

    async def _reconnect(self) -> None:
        """Replace the present connection by a new one. Raises RbdfsError if that does not work either.

        A connection with short timeouts is tried first: it can be closed soon, however often this is tried.
        """
        options = replace(self._options, probe_seconds=PROBE_SECONDS)
        tried = await Connection.open(options, Lifetime(self._recovery))
        try:
            if tried.rados.get_fsid() != self.current.rados.get_fsid():
                raise ConnectError("the configuration names another cluster now: unmount, and mount that one")
            if (reason := await self._probe_of(tried).why_not()) is not None:
                raise reason
        finally:
            self._close_when_unused(tried)
            tried.lifetime.end()
        new = await Connection.open(self._options, Lifetime(self._recovery))
        old = self.current
        self._take(new)
        self._portal.health.note(0, monotonic())
        self._close_when_unused(old)
        old.lifetime.end()

    def _close_when_unused(self, connection: Connection) -> None:
        self._replaced.add(connection)

        async def close() -> None:
            await connection.lifetime.unused()
            if connection in self._replaced:
                self._replaced.remove(connection)
                forget_lanes(connection.lifetime)
                self._closing.start(partial(run_in_thread, connection.close, lane=CONNECTION_LANE))

        trio.lowlevel.spawn_system_task(close)

    async def aclose(self) -> None:
        """Disconnect. Close all images first: librados aborts the process otherwise.

        Waits for what still uses the connection, such as a watch whose open was given up: librados does not hold on to
        an ioctx for it (`IoCtxImpl::aio_watch`), and would use freed memory.
        """
        await self._recovery.aclose()
        await self._closing.wait()
        last = [*self._replaced, self.current]
        self._replaced.clear()
        with trio.move_on_after(ABANDONED_SECONDS) as waiting:
            for connection in last:
                connection.lifetime.end()
                await connection.lifetime.unused()
        if waiting.cancelled_caught:
            log.warning(UNANSWERED)
            return
        seconds = waiting.deadline - trio.current_time()
        await run_in_thread(self._close_all, last, seconds)
        for connection in last:
            forget_lanes(connection.lifetime)

    def _close_all(self, connections: list[Connection], seconds: float) -> None:
        if not wait_for_abandoned(seconds):
            log.warning(UNANSWERED)
            return
        for connection in connections:
            connection.close()
