"""Ends requests that have waited too long, or whose thread was killed.

The kernel lets a thread wait for as long as it takes, also one that was killed: once a request was read from the device
it ends by its answer alone (fs/fuse/dev.c, request_wait_answer). So each has an answer in bounded time, and at once if
nobody is left to take it.
"""

import errno
from collections.abc import Callable, Container
from time import monotonic
from typing import Final

import trio

from rbdfs.errors import RbdfsError
from rbdfs.fuse import protocol
from rbdfs.fuse.process import is_killed
from rbdfs.fuse.replies import Replies
from rbdfs.fuse.requests import Requests, WaitingRequest
from rbdfs.fuse.timeouts import TimedOutReads

CHECK_SECONDS: Final = 0.5
"""How often to check for requests that have waited too long, and for killed threads."""

KILL_CHECK_AFTER_SECONDS: Final = 0.5
"""How long a request must have waited before its thread is checked."""

THREADS_CHECKED_AT_ONCE: Final = 100
"""Threads to check in one go; each takes some 30 us."""

_WITHOUT_DEADLINE: Final = (protocol.RELEASE, protocol.RELEASEDIR, protocol.INIT, protocol.DESTROY)
"""Requests that must reach pyfuse3, however late: nobody waits for them."""


class Deadlines:
    """Watches the requests that wait for an answer."""

    def __init__(
        self,
        requests: Requests,
        replies: Replies,
        relayed: Container[int],
        timed_out_reads: TimedOutReads,
        answer_seconds: float,
        cancel_request_of: Callable[[int], None],
    ) -> None:
        """`answer_seconds` is how long a request may wait; math.inf for ever.

        pyfuse3 keeps the time of those in `relayed`; `cancel_request_of(thread)` has it end that of a killed thread.
        """
        self._requests = requests
        self._replies = replies
        self._relayed = relayed
        self._timed_out_reads = timed_out_reads
        self._answer_seconds = answer_seconds
        self._cancel_request_of = cancel_request_of
        self._interrupted: set[int] = set()
        self._next_thread = 0

    async def keep(self) -> None:
        """Check every CHECK_SECONDS, until cancelled."""
        while True:
            await trio.sleep(CHECK_SECONDS)
            now = monotonic()
            self._timed_out_reads.forget_old(now)
            for unique, request in self._overdue(now):
                self._time_out(unique, request, now)
            self._end_killed()
            for unique in self._killed_without_interrupt(now):
                self._replies.fail(unique, errno.EINTR)

    def interrupt(self, unique: int | None) -> None:
        """Take an INTERRUPT: the thread that waits for this answer has a signal pending. The kernel says so once.

        A thread that the signal kills gets its answer at once. Others wait on: programs do not expect that reading a
        file is interrupted.
        """
        if unique is not None and unique in self._requests.waiting:
            self._interrupted.add(unique)
            self._end_killed()

    def _overdue(self, now: float) -> list[tuple[int, WaitingRequest]]:
        """Return the requests that have waited too long: (unique, request)."""
        found = []
        for unique, request in self._requests.waiting.items():
            if now - request[0] < self._answer_seconds:
                break
            if unique not in self._relayed:
                found.append((unique, WaitingRequest(*request)))
        return found

    def _time_out(self, unique: int, request: WaitingRequest, now: float) -> None:
        if request.opcode in _WITHOUT_DEADLINE:
            return
        name = protocol.OPERATIONS.get(request.opcode, f"a request (opcode {request.opcode})")
        if request.page_cache_bytes:
            end = request.offset + request.page_cache_bytes
            self._timed_out_reads.add(request.inode, request.offset, end, now)
        reason = f"{name} was not answered within {self._answer_seconds:g} s"
        self._replies.fail_with(unique, request.inode, name, RbdfsError(reason, errno.ETIMEDOUT))

    def _end_killed(self) -> None:
        """End the interrupted requests of killed threads. Called until they are answered: pyfuse3 may not have begun
        with them yet."""
        waiting = self._requests.waiting
        self._interrupted &= waiting.keys()
        killed = [(unique, thread) for unique in self._interrupted if is_killed(thread := waiting[unique][4])]
        for unique, thread in killed:
            if unique in self._relayed:
                self._cancel_request_of(thread)
            else:
                self._replies.fail(unique, errno.EINTR)

    def _killed_without_interrupt(self, now: float) -> list[int]:
        """Return the uniques of requests of killed threads, among as many threads as there is time to check.

        The kernel sends no INTERRUPT for direct reads (they go out as if by libaio, FUSE_ASYNC_DIO). So their threads
        are checked, one after the other.
        """
        waiting: dict[int, list[int]] = {}
        for unique, (began, _, _, _, thread, _) in self._requests.waiting.items():
            if now - began < KILL_CHECK_AFTER_SECONDS:
                break
            if unique not in self._relayed:
                waiting.setdefault(thread, []).append(unique)
        threads = sorted(waiting)
        start = self._next_thread if self._next_thread < len(threads) else 0
        self._next_thread = start + THREADS_CHECKED_AT_ONCE
        checked = threads[start : self._next_thread]
        return [unique for thread in checked if is_killed(thread) for unique in waiting[thread]]
