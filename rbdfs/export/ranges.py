"""Ranges of bytes: which are not zeros, which differ, and a collection of them. Pure."""

from collections.abc import Iterator
from typing import Final

GRAIN: Final = 4096
"""Bytes: what file systems allocate in."""

KEPT_AT_MOST: Final = 1 << 18
"""Ranges that are kept, some 50 MB; of all others only the bytes are counted."""

_ZEROS = bytes(GRAIN)


def data_runs(data: bytes, least_zeros: int) -> Iterator[tuple[int, int]]:
    """The (start, end) of the runs of `data` to write, in order: all but runs of at least `least_zeros` zeros.

    Runs start and end on multiples of 4 KiB of `data`, or at its end; zeros at its start and end are left out as well.
    `bytes.startswith` compares in place, by memcmp: 12 GB of random bytes in a second.
    """
    length = len(data)
    start = zeros = -1  # of the run of data, and of the zeros at its end
    for position in range(0, length, GRAIN):
        is_zero = data.startswith(_ZEROS, position) if position + GRAIN <= length else not any(data[position:])
        if not is_zero:
            if start < 0:
                start = position
            elif 0 <= zeros <= position - least_zeros:
                yield start, zeros
                start = position
            zeros = -1
        elif start >= 0 and zeros < 0:
            zeros = position
    if start >= 0:
        yield start, zeros if zeros >= 0 else length


def differing(old: bytes, data: bytes, grain: int) -> list[tuple[int, int]]:
    """Where `data` differs from `old`, which may be shorter: (start, end) pairs that do not touch, of whole pieces of
    `grain` bytes."""
    found: list[tuple[int, int]] = []
    if old == data:
        return found
    for start in range(0, len(data), grain):
        end = min(start + grain, len(data))
        if old[start:end] == data[start:end]:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


class FoundRanges:
    """Ranges that do not overlap, found in any order, joined where they touch."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self.left_out_bytes = 0
        """Bytes of the ranges that were too many to keep."""
        self._ends: dict[int, int] = {}
        self._starts: dict[int, int] = {}

    def add(self, start: int, end: int) -> None:
        """Add the range [start, end)."""
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
        """The ranges that are kept, as (start, end) pairs."""
        return sorted(self._ends.items())
