"""An image's allocation in one line: a cell for each range of objects, shaded by its data. Pure."""

from collections.abc import Iterable
from typing import NamedTuple


class Shades(NamedTuple):
    """The characters of a bar."""

    hole: str
    data: str
    """From a cell with little data to one full of data."""
    parent: str


UNICODE = Shades("·", "░▒▓█", "o")
ASCII = Shades(".", "-=#", "o")


class AllocationBar:
    """Cells for the image's bytes [start, end), at most `width`, each of whole objects."""

    def __init__(self, start: int, end: int, object_size: int, width: int) -> None:
        start -= start % object_size
        objects = -(-(end - start) // object_size)
        self.cell_bytes = max(1, -(-objects // max(1, width))) * object_size
        self._end = end
        self._cells = range(start, end, self.cell_bytes)
        self._data = [0] * len(self._cells)
        self._other = [0] * len(self._cells)

    def add(self, offset: int, length: int, *, is_data: bool) -> None:
        """Add a range of data, or of the other kind that is no hole."""
        filled = self._data if is_data else self._other
        cells, cell_bytes = self._cells, self.cell_bytes
        position, end = max(offset, cells.start), min(offset + length, cells.start + len(cells) * cell_bytes)
        while position < end:
            number = (position - cells.start) // cell_bytes
            stop = min(end, cells.start + (number + 1) * cell_bytes)
            filled[number] += stop - position
            position = stop

    def draw(self, encoding: str) -> str:
        """The line; `encoding` is that of the output."""
        shades = _shades(encoding)
        drawn = []
        for number, cell in enumerate(self._cells):
            share = self._data[number] / min(self.cell_bytes, self._end - cell)
            if self._data[number]:
                drawn.append(shades.data[min(int(share * len(shades.data)), len(shades.data) - 1)])
            else:
                drawn.append(shades.parent if self._other[number] else shades.hole)
        return "".join(drawn)


def draw_bar(
    start: int,
    end: int,
    object_size: int,
    data: Iterable[tuple[int, int]],
    parent: Iterable[tuple[int, int]],
    width: int,
    encoding: str,
) -> tuple[str, int]:
    """The bar as a line, and the bytes of a cell. `data` and `parent` are (offset, length) pairs."""
    bar = AllocationBar(start, end, object_size, width)
    for offset, length in data:
        bar.add(offset, length, is_data=True)
    for offset, length in parent:
        bar.add(offset, length, is_data=False)
    return bar.draw(encoding), bar.cell_bytes


def legend(encoding: str, cell: str, kinds: tuple[str, str, str] = ("data", "parent", "hole")) -> str:
    """The meaning of the characters."""
    shades, (data, other, neither) = _shades(encoding), kinds
    return (
        f"{shades.data[0]} to {shades.data[-1]} {data}, {shades.parent} {other}, {shades.hole} {neither}; "
        f"a cell is {cell}"
    )


def _shades(encoding: str) -> Shades:
    return UNICODE if encoding.lower().replace("-", "") == "utf8" else ASCII
