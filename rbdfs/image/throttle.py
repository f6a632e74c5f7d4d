"""A limit on what is in flight towards the cluster, so that a mount can flood neither the cluster nor itself."""

from collections.abc import Callable, Hashable

Start = Callable[[], None]


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
        self._urgent: dict[Hashable, tuple[int, Start]] = {}
        self._later: dict[Hashable, tuple[int, Start]] = {}

    def submit(self, key: Hashable, nbytes: int, start: Start, *, urgent: bool) -> None:
        """Call `start` as soon as `nbytes` more may be in flight. Whoever started calls `done(nbytes)` in the end.

        More than `max_bytes` at once starts when nothing else is in flight.
        """
        if self._has_room(nbytes) and not self._urgent and (urgent or not self._later):
            self._begin(nbytes, start)
        else:
            (self._urgent if urgent else self._later)[key] = (nbytes, start)

    def hurry(self, key: Hashable) -> None:
        """Somebody waits for this now. Nothing happens if it was started already."""
        if key in self._later:
            self._urgent[key] = self._later.pop(key)

    def withdraw(self, key: Hashable) -> bool:
        """Forget what was not started yet; False if it was."""
        return (self._later.pop(key, None) or self._urgent.pop(key, None)) is not None

    def done(self, nbytes: int) -> None:
        """What was started with `nbytes` has ended, well or not."""
        self.ops -= 1
        self.bytes -= nbytes
        self._pump()

    def _pump(self) -> None:
        while queue := self._urgent or self._later:
            key = next(iter(queue))
            nbytes, start = queue[key]
            if not self._has_room(nbytes):
                return
            del queue[key]
            self._begin(nbytes, start)

    def _has_room(self, nbytes: int) -> bool:
        return not self.ops or (self.ops < self.max_ops and self.bytes + nbytes <= self.max_bytes)

    def _begin(self, nbytes: int, start: Start) -> None:
        self.ops += 1
        self.bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        start()
