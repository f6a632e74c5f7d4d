"""Limits what is in flight to the cluster, so that a mount can flood neither the cluster nor itself."""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(slots=True)
class Total:
    """Bytes that several throttles have in flight together. A throttle with nothing in flight may always start one."""

    max_bytes: float = math.inf
    bytes: int = 0
    peak_bytes: int = 0


class Throttle:
    """Starts work at once if there is room, later otherwise; urgent work goes before readahead.

    Ceph's models are `rbd_concurrent_management_ops` (what `rbd export` keeps in flight) and the objecter's
    `objecter_inflight_op_bytes`. Theirs block the calling thread; this one queues.
    """

    def __init__(self, max_ops: int, max_bytes: int, total: Total | None = None) -> None:
        """`total` is shared by all throttles whose bytes count together."""
        self.max_ops = max_ops
        self.max_bytes = max_bytes
        self.ops = 0
        self.bytes = 0
        self._total = total or Total()
        self._urgent: dict[Hashable, tuple[int, Callable[..., None]]] = {}
        self._later: dict[Hashable, tuple[int, Callable[..., None]]] = {}
        self._is_starting = False

    def submit(self, key: Key, nbytes: int, start: Callable[[Key], None], *, urgent: bool) -> None:
        """Call `start(key)` as soon as `nbytes` more may be in flight. The caller calls `done(nbytes)` at its end.

        Work of more than `max_bytes` starts when nothing else is in flight. `start` must not raise; it may call `done`.
        """
        # As in _start_queued; inline, since each read that is not cached comes here.
        total = self._total
        if (
            not self._urgent
            and (urgent or not self._later)
            and (
                not self.ops
                or (
                    self.ops < self.max_ops
                    and self.bytes + nbytes <= self.max_bytes
                    and total.bytes + nbytes <= total.max_bytes
                )
            )
        ):
            self.ops += 1
            self.bytes += nbytes
            total.bytes += nbytes
            total.peak_bytes = max(total.peak_bytes, total.bytes)
            start(key)
        else:
            (self._urgent if urgent else self._later)[key] = (nbytes, start)

    def _has_room(self, nbytes: int) -> bool:
        return not self.ops or (
            self.ops < self.max_ops
            and self.bytes + nbytes <= self.max_bytes
            and self._total.bytes + nbytes <= self._total.max_bytes
        )

    def _count(self, nbytes: int) -> None:
        total = self._total
        self.ops += 1
        self.bytes += nbytes
        total.bytes += nbytes
        total.peak_bytes = max(total.peak_bytes, total.bytes)

    @property
    def queued(self) -> int:
        """Work that was submitted and has not started."""
        return len(self._urgent) + len(self._later)

    def promote(self, key: Hashable) -> None:
        """Make it urgent. Nothing happens if it was started already."""
        if key in self._later:
            self._urgent[key] = self._later.pop(key)

    def cancel(self, key: Hashable) -> bool:
        """Drop it if it was not started yet; return False if it was."""
        return (self._later.pop(key, None) or self._urgent.pop(key, None)) is not None

    def done(self, nbytes: int) -> None:
        """Note that work of `nbytes` has ended, well or not."""
        self.ops -= 1
        self.bytes -= nbytes
        self._total.bytes -= nbytes
        # Work that ends in its own `start` is started in a loop: a long queue would be too deep a recursion.
        if (self._urgent or self._later) and not self._is_starting:
            self._is_starting = True
            try:
                self._start_queued()
            finally:
                self._is_starting = False

    def _start_queued(self) -> None:
        while queue := self._urgent or self._later:
            key = next(iter(queue))
            nbytes, start = queue[key]
            if not self._has_room(nbytes):
                return
            del queue[key]
            self._count(nbytes)
            start(key)
