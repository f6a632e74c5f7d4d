"""When to reconnect to the cluster: if the present connection will never work again, and a new one works.

A client that was blocklisted stays blocklisted; one whose key was replaced is refused once its tickets end; one whose
monitors have moved looks for them where they were. A new connection reads configuration and keyring again. If the
cluster is silent for all clients, a new connection does not work either, and the present one is kept.

A client that was blocklisted reconnects at once. After EACCES, EPERM, ETIMEDOUT or PATIENT_SECONDS without an answer,
the present connection is probed first: it stays if it works, or if a new one does not.
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
"""EBLOCKLISTED. It is permanent for a connection."""

SIGNS: Final = frozenset({BARRED, -errno.EACCES, -errno.EPERM, -errno.ETIMEDOUT})
"""Results that may mean that the connection will never work again."""

PATIENT_SECONDS: Final = 3.0
"""How long an answer may take before the connection is suspected. The question is not given up then."""

CALM_SECONDS: Final = 10.0
"""How long a connection that was suspected and works is not suspected again: in a dead pool every request waits."""

FIRST_SECONDS: Final = 1.0
LONGEST_SECONDS: Final = 30.0
"""Between two attempts; it doubles each time."""


class Recovery:
    """Tries a new connection while there is trouble with the present one. All in the trio thread."""

    def __init__(
        self,
        health: ConnectionHealth,
        works: Callable[[], Awaitable[bool]],
        reconnect: Callable[[], Awaitable[None]],
    ) -> None:
        """`works` tells within seconds whether the present connection can be used, and does not raise. `reconnect`
        replaces it by one that works, or raises RbdfsError."""
        self.is_on = False
        """Whether to reconnect at all."""
        self._health = health
        self._works = works
        self._reconnect = reconnect
        self._is_barred = False
        self._must_ask = False
        """Whether to probe the connection even if other requests were answered."""
        self._running: trio.CancelScope | None = None
        self._hurry = trio.Event()
        self._is_pausing = False
        self._tried = trio.Event()
        self._ended = trio.Event()
        self._worked_at = -math.inf
        """When the present connection was last found to work, though it was suspected."""
        self._numbers = itertools.count()
        self._asked: dict[int, float] = {}
        """When each question that is still unanswered was asked, the oldest first."""
        self._is_watching = False

    def note(self, result: int) -> None:
        """Call at the end of each operation; `result` is a negative errno if it failed."""
        self._health.note(result, monotonic())
        if result not in SIGNS:
            return
        if result == BARRED:
            self._is_barred = True
            self._hurry.set()
        self._start()

    def suspect(self) -> None:
        """Probe the connection: a question got no answer, even if others did."""
        self._must_ask = True
        self._start()

    @contextmanager
    def patience(self) -> Iterator[None]:
        """Enclose a question: if it takes long, the connection is suspected even if other questions were answered."""
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
        """Watch all questions in one task: a task for each costs more than most of the questions."""
        while self._asked:
            await trio.sleep(PATIENT_SECONDS / 2)
            number, since = next(iter(self._asked.items()), (0, trio.current_time()))
            if trio.current_time() - since >= PATIENT_SECONDS:
                del self._asked[number]
                self.suspect()
        self._is_watching = False

    async def attempt(self) -> None:
        """The cluster refuses this client: return when a new connection was tried, or at once if one has just failed
        and the next attempt is not due."""
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
            log.exception("recovering the connection to the cluster failed unexpectedly")
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
                log.warning("%s (see 'ceph osd blocklist ls'): reconnecting", told)
            try:
                await self._reconnect()
            except RbdfsError as error:
                if str(error) != told:
                    told = str(error)
                    # If the cluster answers nobody, the requests that wait for it say so.
                    level = logging.INFO if error.errno == errno.ETIMEDOUT else logging.WARNING
                    log.log(level, "reconnecting to the cluster failed, trying again: %s", error)
            else:
                log.log(NOTICE, "reconnected to the cluster after %.0f s", trio.current_time() - began)
                return
            self._is_barred = False  # the cluster may have removed it from the blocklist
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
        """Stop all attempts."""
        self.is_on = False
        if self._running is not None:
            self._running.cancel()
            await self._ended.wait()
