"""A map of where an image holds data, as far as is known. Pure.

A hole is what reads as zeros because nothing was ever written there. To take data for a hole loses bytes, to take a
hole for data costs time: so a hole is only what the cluster says is one.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from enum import Enum
from itertools import accumulate
from typing import NamedTuple

SEGMENTS_MAX = 1 << 18
"""The limit for one image, some 20 MB. Beyond it, the map keeps only what was learned last."""


class Kind(Enum):
    """What a byte of an image is, as far as is known."""

    DATA = "data"
    HOLE = "hole"
    UNKNOWN = "unknown"


class Segment(NamedTuple):
    """The bytes [start, end) of an image, all of one kind."""

    start: int
    end: int
    kind: Kind


class HoleMap:
    """The kinds of an image's bytes, from 0 to its size."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.is_asked = False
        """Whether a reader has asked for all holes, or is about to."""
        self.has_holes = False
        """Whether any hole is known."""
        self._starts = [0]
        self._kinds = [Kind.UNKNOWN]
        self._ranks: list[int] = []

    def learn(self, start: int, end: int, data: Iterable[tuple[int, int]]) -> None:
        """Enter what the bytes [start, end) are: those in `data` hold data, the rest is a hole.

        `data` is (offset, length) pairs in any order; they may overlap, touch and reach beyond the range.
        """
        starts: list[int] = []
        kinds: list[Kind] = []
        position = start
        for offset, length in sorted(data):
            first, last = max(offset, position), min(offset + length, end)
            if first >= last:
                continue
            if first > position:
                starts.append(position)
                kinds.append(Kind.HOLE)
            if not kinds or kinds[-1] is not Kind.DATA:
                starts.append(first)
                kinds.append(Kind.DATA)
            position = last
        if position < end:
            starts.append(position)
            kinds.append(Kind.HOLE)
        if end < self.size:
            starts.append(end)
            kinds.append(self.at(end).kind)
        first_index, last_index = bisect_left(self._starts, start), bisect_right(self._starts, end)
        self._starts[first_index:last_index] = starts
        self._kinds[first_index:last_index] = kinds
        if len(self._starts) > SEGMENTS_MAX:
            self._forget_all_but(start, end)
        self._ranks = []
        self.has_holes = Kind.HOLE in self._kinds

    def _forget_all_but(self, start: int, end: int) -> None:
        first, last = bisect_left(self._starts, start), bisect_left(self._starts, end)
        before, after = [0] if start else [], [end] if end < self.size else []
        self._starts = before + self._starts[first:last] + after
        self._kinds = [Kind.UNKNOWN] * len(before) + self._kinds[first:last] + [Kind.UNKNOWN] * len(after)

    @property
    def segments(self) -> int:
        """The number of segments, which is the memory that the map takes."""
        return len(self._starts)

    def at(self, offset: int) -> Segment:
        """Return the segment that a byte of the image is in."""
        index = bisect_right(self._starts, offset) - 1
        end = self._starts[index + 1] if index + 1 < len(self._starts) else self.size
        return Segment(self._starts[index], end, self._kinds[index])

    def between(self, start: int, end: int) -> Iterator[Segment]:
        """Yield the segments of the bytes [start, end), cut where these begin and end."""
        while start < end:
            _, stop, kind = self.at(start)
            yield Segment(start, min(stop, end), kind)
            start = stop

    def rank(self, offset: int) -> int:
        """Return how many bytes before an offset are not in a known hole."""
        if not self._ranks:
            self._ranks = list(accumulate(map(self._present_bytes, range(len(self._starts) - 1)), initial=0))
        index = bisect_right(self._starts, offset) - 1
        return self._ranks[index] + (0 if self._kinds[index] is Kind.HOLE else offset - self._starts[index])

    def present(self, start_rank: int, end_rank: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges [start, end) of the image between two ranks, without the known holes."""
        self.rank(0)
        index = bisect_right(self._ranks, start_rank) - 1
        while index < len(self._starts) and self._ranks[index] < end_rank:
            offset = self._starts[index] + max(0, start_rank - self._ranks[index])
            end = self._starts[index] + min(self._present_bytes(index), end_rank - self._ranks[index])
            if offset < end:
                yield offset, end
            index += 1

    def _present_bytes(self, index: int) -> int:
        """Return the rank that a segment adds."""
        if self._kinds[index] is Kind.HOLE:
            return 0
        end = self._starts[index + 1] if index + 1 < len(self._starts) else self.size
        return end - self._starts[index]

    def is_hole(self, offset: int, length: int) -> bool:
        """Return whether all of a range is in a known hole."""
        known = self.at(offset)
        return known.kind is Kind.HOLE and offset + length <= known.end

    def find(self, offset: int, kind: Kind) -> Segment | None:
        """Return the first segment at or after `offset` that is of this kind or unknown; None if there is none."""
        while offset < self.size:
            segment = self.at(offset)
            if segment.kind in (kind, Kind.UNKNOWN):
                return segment
            offset = segment.end
        return None
