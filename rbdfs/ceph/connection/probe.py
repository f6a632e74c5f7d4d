"""Test whether a connection works, without leaving ever more questions hanging if it does not."""

import errno
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from rbdfs.catalog import Pool
from rbdfs.ceph.bindings.aio import Future
from rbdfs.errors import RbdfsError

log = logging.getLogger(__name__)

PROBE_SECONDS: Final = 5
"""How long monitors and OSDs may take to answer."""

PROBED_POOLS: Final = 64
"""How many pools are asked at most. One that answers is enough."""

Reason = RbdfsError | None
"""Why a connection cannot be used; None if it works."""


class Probe:
    """Tests one connection. A question without an answer is not asked again. All in the trio thread."""

    def __init__(
        self, list_pools: Callable[[], Awaitable[list[Pool]]], may_read: Callable[[Pool], Awaitable[bool]]
    ) -> None:
        """`list_pools` asks the monitors, `may_read` an OSD. Both raise RbdfsError, and are never cancelled."""
        self._list_pools = list_pools
        self._may_read = may_read
        self._is_listing = False
        self._asked: set[Pool] = set()

    async def why_not(self) -> Reason:
        """None if the monitors and an OSD answer, and let the key read something, within PROBE_SECONDS."""
        found: Future[Reason] = Future()
        if not self._is_listing:
            self._is_listing = True
            trio.lowlevel.spawn_system_task(self._list, found)
        with trio.move_on_after(PROBE_SECONDS):
            return await found.get()
        return RbdfsError(f"no answer within {PROBE_SECONDS} s", errno.ETIMEDOUT)

    async def _list(self, found: Future[Reason]) -> None:
        try:
            pools = await self._list_pools()
        except Exception as error:  # out of a system task it would end the mount for everyone
            found.set(_reason(error))
        else:
            asked = {pool for pool in pools[:PROBED_POOLS] if pool not in self._asked}
            for pool in asked:
                self._asked.add(pool)
                trio.lowlevel.spawn_system_task(self._ask, pool, asked, found)
            if not pools:
                found.set(None)
        self._is_listing = False

    async def _ask(self, pool: Pool, waiting: set[Pool], found: Future[Reason]) -> None:
        """Ask one pool; `waiting` are the pools that are asked together."""
        reason: Reason
        try:
            is_allowed = await self._may_read(pool)
            reason = None if is_allowed else RbdfsError(f"the key may not read pool {pool.name}", errno.EACCES)
        except Exception as error:  # as above
            reason = _reason(error)
        self._asked.discard(pool)
        waiting.discard(pool)
        if reason is None or not waiting:  # only the first counts
            found.set(reason)


def _reason(error: Exception) -> RbdfsError:
    if isinstance(error, RbdfsError):
        return error
    log.error("a connection could not be probed", exc_info=error)
    return RbdfsError(f"unexpected {type(error).__name__}: {error}")
