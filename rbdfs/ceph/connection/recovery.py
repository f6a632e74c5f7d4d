"""When to connect to the cluster anew: the present connection is of no use for good, and a new one works.

A client that was blocklisted stays so, whose key was replaced is refused once its tickets end, and one whose monitors
have moved looks for them where they were. A new connection reads configuration and keyring again. Where the cluster is
silent for everybody a new connection does not work either, and the present one is kept.
"""

import errno
import itertools
import logging
import math
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Final

import trio

from rbdfs.ceph.bindings.health import ConnectionHealth
from rbdfs.errors import NOTICE, RbdfsError

log = logging.getLogger(__name__)

BARRED: Final = -errno.ESHUTDOWN
"""EBLOCKLISTED: it is for good."""

SIGNS: Final = frozenset({BARRED, -errno.EACCES, -errno.EPERM, -errno.ETIMEDOUT})
"""Of a connection that may be of no use any more."""

PATIENT_SECONDS: Final = 3.0
"""How long an answer may take before the connection is suspected. Who waits then has not been given up."""

CALM_SECONDS: Final = 10.0
"""For so long a connection that was suspected and works is not suspected again: in a pool that is dead, all wait."""

FIRST_SECONDS: Final = 1.0
LONGEST_SECONDS: Final = 30.0
"""Between two attempts: doubled each time."""


class Recovery:
    """Tries a new connection while there is trouble with the present one. All in the trio thread."""

    def __init__(
        self,
        health: ConnectionHealth,
        works: Callable[[], Awaitable[bool]],
        connect_anew: Callable[[], Awaitable[None]],
    ) -> None:
        """`works` says whether the present connection can be used; it does not raise, and ends within seconds.
        `connect_anew` replaces it by one that works, or raises RbdfsError."""
        self.is_on = False
        """Whether anything is tried."""
        self._health = health
        self._works = works
        self._connect_anew = connect_anew
        self._is_barred = False
        self._must_ask = False
        """Whether other answers than those of the trouble do not count."""
        self._running: trio.CancelScope | None = None
        self._hurry = trio.Event()
        self._is_pausing = False
        self._tried = trio.Event()
        self._ended = trio.Event()
        self._worked_at = -math.inf
        """When the present connection was last found to work, though it was suspected."""
        self._numbers = itertools.count()
        self._asked: dict[int, float] = {}
        """Since when answers are waited for; the first has waited for longest."""
        self._is_watching = False

    def note(self, result: int) -> None:
        """An operation has ended; a negative errno if it has failed."""
        self._health.note(result, monotonic())
        if result not in SIGNS:
            return
        if result == BARRED:
            self._is_barred = True
            self._hurry.set()
        self._start()

    def suspect(self) -> None:
        """Something was not answered, whatever else was."""
        self._must_ask = True
        self._start()

    @contextmanager
    def patience(self) -> Iterator[None]:
        """While something is asked: if that takes long, whatever others were answered, the connection is suspected."""
        number = next(self._numbers)
        self._asked[number] = trio.current_time()
        if not self._is_watching:
            self._is_watching = True
            trio.lowlevel.spawn_system_task(self._watch)
        try:
            yield
        finally:
            self._asked.pop(number, None)

    async def _watch(self) -> None:
        """One task for all, and for some time after: a task each costs more than most of the questions."""
        while self._asked:
            await trio.sleep(PATIENT_SECONDS / 2)
            number, since = next(iter(self._asked.items()), (0, trio.current_time()))
            if trio.current_time() - since >= PATIENT_SECONDS:
                del self._asked[number]
                self.suspect()
        self._is_watching = False

    async def attempt(self) -> None:
        """The cluster refuses this client: return when a new connection was tried. At once if one has failed just
        now, and the next is not due."""
        self.note(BARRED)
        if self._running is not None and not self._is_pausing:
            await self._tried.wait()

    def _start(self) -> None:
        if self._running is None and self.is_on:
            self._running = trio.CancelScope()
            self._ended = trio.Event()
            trio.lowlevel.spawn_system_task(self._run, self._running, monotonic())

    async def _run(self, scope: trio.CancelScope, suspected_at: float) -> None:
        try:
            with scope:
                await self._recover(suspected_at)
        except Exception:  # out of a system task it would end the mount for everyone
            log.exception("the connection to the cluster could not be looked after")
        self._running = None
        self._is_barred = self._must_ask = self._is_pausing = False
        self._hurry = trio.Event()
        self._end_attempt()
        self._ended.set()

    def _end_attempt(self) -> None:
        self._tried.set()
        self._tried = trio.Event()

    async def _recover(self, suspected_at: float) -> None:
        began, told, pause = trio.current_time(), "", FIRST_SECONDS
        with trio.move_on_at(max(began + FIRST_SECONDS, self._worked_at + CALM_SECONDS)):
            await self._hurry.wait()
        if not self._is_barred and not self._must_ask and self._has_served_since(suspected_at):
            return
        while self._is_barred or not await self._works():
            if self._is_barred and not told:
                told = "the cluster has blocklisted this client"
                log.warning("%s (see 'ceph osd blocklist ls'): connecting anew", told)
            try:
                await self._connect_anew()
            except RbdfsError as error:
                if str(error) != told:
                    told = str(error)
                    # That nothing answers anybody is told by who waits for it.
                    level = logging.INFO if error.errno == errno.ETIMEDOUT else logging.WARNING
                    log.log(level, "connecting anew failed, and is tried again: %s", error)
            else:
                log.log(NOTICE, "connected anew after %.0f s", trio.current_time() - began)
                return
            self._is_barred = False  # perhaps it is let in again
            self._is_pausing = True
            self._end_attempt()
            await trio.sleep(pause)
            self._is_pausing = False
            pause = min(2 * pause, LONGEST_SECONDS)
        self._worked_at = trio.current_time()
        if told:
            log.log(NOTICE, "the cluster serves this client again, after %.0f s", trio.current_time() - began)

    def _has_served_since(self, then: float) -> bool:
        return self._health.last_result not in SIGNS and self._health.last_at >= then

    async def aclose(self) -> None:
        """Try no more."""
        self.is_on = False
        if self._running is not None:
            self._running.cancel()
            await self._ended.wait()
