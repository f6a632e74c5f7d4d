"""Ranges of bytes, found in any order. Pure."""

from typing import Final

KEPT_AT_MOST: Final = 1 << 18
"""Ranges that are remembered, some 50 MB; of more only the bytes are counted."""


class FoundRanges:
    """Ranges that do not overlap, joined where they touch."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self.left_out_bytes = 0
        """Of ranges that were too many to be remembered."""
        self._ends: dict[int, int] = {}
        self._starts: dict[int, int] = {}

    def add(self, start: int, end: int) -> None:
        """One more, [start, end)."""
        if start >= end:
            return
        self.total_bytes += end - start
        if len(self._ends) >= KEPT_AT_MOST and start not in self._starts and end not in self._ends:
            self.left_out_bytes += end - start
            return
        if start in self._starts:
            start = self._starts.pop(start)
        if end in self._ends:
            end = self._ends.pop(end)
        self._ends[start] = end
        self._starts[end] = start

    def in_order(self) -> list[tuple[int, int]]:
        """Those that are remembered: (start, end) pairs."""
        return sorted(self._ends.items())
