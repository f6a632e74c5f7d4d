"""A limit on what is in flight towards the cluster, so that a mount can flood neither the cluster nor itself."""

from collections.abc import Callable, Hashable
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


class Throttle:
    """Starts work at once while there is room, later otherwise; who is waited for goes before what is read ahead.

    Ceph's models are `rbd_concurrent_management_ops` (what `rbd export` keeps in flight) and the objecter's
    `objecter_inflight_op_bytes`. Theirs block the calling thread; this one queues.
    """

    def __init__(self, max_ops: int, max_bytes: int) -> None:
        self.max_ops = max_ops
        self.max_bytes = max_bytes
        self.ops = 0
        self.bytes = 0
        self.peak_bytes = 0
        self._urgent: dict[Hashable, tuple[int, Callable[..., None]]] = {}
        self._later: dict[Hashable, tuple[int, Callable[..., None]]] = {}

    def submit(self, key: Key, nbytes: int, start: Callable[[Key], None], *, urgent: bool) -> None:
        """Call `start(key)` as soon as `nbytes` more may be in flight; then call `done(nbytes)` when it has ended.

        More than `max_bytes` at once starts when nothing else is in flight.
        """
        if (
            not self._urgent
            and (urgent or not self._later)
            and (not self.ops or (self.ops < self.max_ops and self.bytes + nbytes <= self.max_bytes))
        ):
            self.ops += 1
            self.bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.bytes)
            start(key)
        else:
            (self._urgent if urgent else self._later)[key] = (nbytes, start)

    def promote(self, key: Hashable) -> None:
        """Somebody waits for this now. Nothing happens if it was started already."""
        if key in self._later:
            self._urgent[key] = self._later.pop(key)

    def cancel(self, key: Hashable) -> bool:
        """Forget what was not started yet; False if it was."""
        return (self._later.pop(key, None) or self._urgent.pop(key, None)) is not None

    def done(self, nbytes: int) -> None:
        """What was started with `nbytes` has ended, well or not."""
        self.ops -= 1
        self.bytes -= nbytes
        if self._urgent or self._later:
            self._start_queued()

    def _start_queued(self) -> None:
        while queue := self._urgent or self._later:
            key = next(iter(queue))
            nbytes, start = queue[key]
            if self.ops and (self.ops >= self.max_ops or self.bytes + nbytes > self.max_bytes):
                return
            del queue[key]
            self.ops += 1
            self.bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.bytes)
            start(key)
