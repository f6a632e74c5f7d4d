"""How far a copy is: a bar on a terminal, now and then a line elsewhere."""

import sys
from typing import TYPE_CHECKING

import trio
from tqdm import tqdm

from rbdfs.image.copy import Copy

if TYPE_CHECKING:
    Bar = tqdm[None]
else:
    Bar = tqdm

REDRAW_SECONDS = 0.2
LINE_SECONDS = 30.0
"""Between two lines in a log."""


class _Bar(Bar):
    """Without the thread that looks after bars which nobody redraws."""

    monitor_interval = 0


async def show_progress(copy: Copy, name: str) -> None:
    """Show it until cancelled, on stderr."""
    if sys.stderr.isatty():
        await _draw_bar(copy, name)
    else:
        await _print_lines(copy, name)


async def _draw_bar(copy: Copy, name: str) -> None:
    with _Bar(desc=name, total=0, unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True) as bar:
        try:
            while True:
                _update(bar, copy)
                await trio.sleep(REDRAW_SECONDS)
        finally:
            _update(bar, copy)
            bar.refresh()


def _update(bar: Bar, copy: Copy) -> None:
    bar.total = copy.data_bytes + copy.unknown_bytes
    bar.update(copy.copied_bytes - bar.n)


async def _print_lines(copy: Copy, name: str) -> None:
    began = trio.current_time()
    while True:
        await trio.sleep(LINE_SECONDS)
        seconds = trio.current_time() - began
        print(f"rbdfs: {name}: {_how_far(copy, seconds)}", file=sys.stderr, flush=True)


def _how_far(copy: Copy, seconds: float) -> str:
    total = copy.data_bytes + copy.unknown_bytes
    rate = copy.copied_bytes / seconds
    left = f", {(total - copy.copied_bytes) / rate:.0f} s left" if rate else ""
    return f"{in_units(copy.copied_bytes)} of {in_units(total)} of data, {in_units(rate)}/s{left}"


def summary(copy: Copy, name: str, seconds: float) -> str:
    """What was done, as a line."""
    rate = in_units(copy.copied_bytes / max(seconds, 0.001))
    data = f"{in_units(copy.copied_bytes)} of data in {seconds:.1f} s, {rate}/s"
    return f"copied {name}, {in_units(copy.size)}: {data}"


def in_units(count: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
