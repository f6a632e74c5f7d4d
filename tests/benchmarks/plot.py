"""The ratios of a run as a picture: one bar for each row, on a logarithmic axis."""

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

from tests.benchmarks.report import TIMES, Results, Row, times

WIDTH, LABELS, VALUES = 980, 370, 70
"""Of the picture, of the labels left of the bars and of the figures right of them, in pixels."""
LINE, BAR, TOP, BOTTOM = 40, 18, 70, 60
"""The height of a row, of the bar in it, and of what is above and below the rows."""
FONT = "font-family='system-ui, DejaVu Sans, sans-serif'"
GRID = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
COLOURS = {"aim reached": "#2a7f62", "bar reached": "#5b9bd5", "missed": "#c8553d"}
"""By verdict."""
NO_BAR = "#9a9a9a"


def as_svg(results: Results) -> str:
    """One bar for each row that has a ratio, in the order of the table."""
    rows = [row for row in results.rows if row.ratio is not None]
    return "\n".join(_svg(rows, f"{results.machine.date}, {results.machine.cores} cores of {results.machine.cpu}"))


def _svg(rows: Sequence[Row], when: str) -> Iterator[str]:
    values = [value for row in rows for value in (row.ratio, row.bar, row.aim, 1.0) if value]
    least, most = min(values, default=1.0) / 1.3, max(values, default=1.0) * 1.1
    height = TOP + LINE * len(rows) + BOTTOM

    def x(ratio: float) -> float:
        return LABELS + (WIDTH - LABELS - VALUES) * math.log(ratio / least) / math.log(most / least)

    yield f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' {FONT} font-size='13'>"
    yield f"<rect width='{WIDTH}' height='{height}' fill='white'/>"
    yield "<text x='16' y='26' font-size='17' font-weight='bold'>How many times better rbdfs is</text>"
    yield f"<text x='16' y='46' fill='#666'>{escape(when)}; logarithmic; right of 1 rbdfs is ahead</text>"
    for ratio in (mark for mark in GRID if least <= mark <= most):
        bottom = height - BOTTOM + 6
        yield (
            f"<line x1='{x(ratio):.1f}' x2='{x(ratio):.1f}' y1='{TOP - 6}' y2='{bottom}' "
            f"stroke='{'#333' if ratio == 1 else '#ddd'}'/>"
        )
        yield f"<text x='{x(ratio):.1f}' y='{bottom + 16}' text-anchor='middle' fill='#666'>{ratio:g}{TIMES}</text>"
    for number, row in enumerate(rows):
        yield from (_bar(row, row.ratio, TOP + LINE * number, x) if row.ratio else ())
    yield from _legend(height - 10)
    yield "</svg>\n"


def _bar(row: Row, ratio: float, top: float, x: Callable[[float], float]) -> Iterator[str]:
    colour = COLOURS.get(row.verdict.partition(",")[0], NO_BAR)
    middle = top + LINE / 2
    yield f"<text x='{LABELS - 12}' y='{middle - 3}' text-anchor='end'>{escape(row.work)}</text>"
    yield (
        f"<text x='{LABELS - 12}' y='{middle + 12}' text-anchor='end' font-size='11' fill='#666'>"
        f"against {escape(row.against)}</text>"
    )
    start, end = sorted((x(1), x(ratio)))
    yield (
        f"<rect x='{start:.1f}' y='{middle - BAR / 2}' width='{end - start:.1f}' height='{BAR}' rx='2' "
        f"fill='{colour}'/>"
    )
    for mark, width in ((row.bar, 3), (row.aim, 1)):
        if mark:
            yield (
                f"<line x1='{x(mark):.1f}' x2='{x(mark):.1f}' y1='{middle - BAR / 2 - 4}' y2='{middle + BAR / 2 + 4}' "
                f"stroke='#111' stroke-width='{width}'/>"
            )
    beside = max(end, *(x(mark) for mark in (row.bar, row.aim) if mark), 0) + 8
    yield f"<text x='{beside:.1f}' y='{middle + 5}' font-weight='bold'>{times(ratio)}</text>"


def _legend(y: float) -> Iterator[str]:
    at = 16
    for word, colour in (*COLOURS.items(), ("no bar set", NO_BAR)):
        yield f"<rect x='{at}' y='{y - 10}' width='12' height='12' rx='2' fill='{colour}'/>"
        yield f"<text x='{at + 18}' y='{y}' fill='#666'>{word}</text>"
        at += 120
    for word, width in (("at least", 3), ("aim", 1)):
        yield f"<line x1='{at}' x2='{at}' y1='{y - 12}' y2='{y + 3}' stroke='#111' stroke-width='{width}'/>"
        yield f"<text x='{at + 10}' y='{y}' fill='#666'>{word}</text>"
        at += 90
