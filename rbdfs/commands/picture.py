"""An image's allocation in one line: a cell for each object range, shaded by what it holds. Pure."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Shades(NamedTuple):
    """The characters of a picture."""

    hole: str
    data: str
    """From a little to all of a cell."""
    parent: str


UNICODE = Shades("·", "░▒▓█", "o")
ASCII = Shades(".", "-=#", "o")


def picture(
    start: int,
    end: int,
    object_size: int,
    data: Iterable[tuple[int, int]],
    parent: Iterable[tuple[int, int]],
    width: int,
    encoding: str,
) -> tuple[str, int]:
    """The cells of the image's bytes [start, end), at most `width`, and the bytes each stands for: whole objects.

    `data` and `parent` are (offset, length) pairs; `encoding` is that of where it is printed.
    """
    start -= start % object_size
    objects = -(-(end - start) // object_size)
    cell_bytes = max(1, -(-objects // max(1, width))) * object_size
    cells = range(start, end, cell_bytes)
    own, theirs = _filled(data, cells), _filled(parent, cells)
    shades = _shades(encoding)
    drawn = []
    for number, cell in enumerate(cells):
        share = own[number] / min(cell_bytes, end - cell)
        if own[number]:
            drawn.append(shades.data[min(int(share * len(shades.data)), len(shades.data) - 1)])
        else:
            drawn.append(shades.parent if theirs[number] else shades.hole)
    return "".join(drawn), cell_bytes


def legend(encoding: str, cell: str) -> str:
    """What the characters mean."""
    shades = _shades(encoding)
    return f"{shades.data[0]} to {shades.data[-1]} data, {shades.parent} parent, {shades.hole} hole; a cell is {cell}"


def _shades(encoding: str) -> Shades:
    return UNICODE if encoding.lower().replace("-", "") == "utf8" else ASCII


def _filled(ranges: Iterable[tuple[int, int]], cells: range) -> Sequence[int]:
    """The bytes of each cell that are in the ranges."""
    filled = [0] * len(cells)
    for offset, length in ranges:
        position, end = max(offset, cells.start), min(offset + length, cells.start + len(cells) * cells.step)
        while position < end:
            number = (position - cells.start) // cells.step
            stop = min(end, cells.start + (number + 1) * cells.step)
            filled[number] += stop - position
            position = stop
    return filled
