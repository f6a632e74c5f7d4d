"""How far a copy is: a bar on a terminal, now and then a line elsewhere."""

import os
import sys

import trio

from rbdfs.commands.units import in_units
from rbdfs.export.copy import Copy

REDRAW_SECONDS = 0.2
LINE_SECONDS = 30.0
"""Between two lines in a log."""


def load_bar() -> None:
    """Raise ImportError where the bar will be needed and cannot be had: better now than in the midst of a copy."""
    if sys.stderr.isatty():
        import tqdm  # noqa: F401, PLC0415  (takes a tenth of the time of a small export)


async def show_progress(copy: Copy, name: str) -> None:
    """Show it until cancelled, on stderr."""
    if sys.stderr.isatty():
        await _draw_bar(copy, name)
    else:
        await _print_lines(copy, name)


async def _draw_bar(copy: Copy, name: str) -> None:
    from tqdm import tqdm  # noqa: PLC0415  (see load_bar)

    tqdm.monitor_interval = 0  # no thread that looks after bars which nobody redraws
    columns = os.get_terminal_size(sys.stderr.fileno()).columns
    shape = {"dynamic_ncols": True} if columns else {"ncols": 80, "nrows": 24}  # a serial line does not say
    with tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1024, **shape) as bar:

        def redraw() -> None:
            bar.total = copy.data_bytes + copy.unknown_bytes
            bar.update(copy.copied_bytes - bar.n)

        try:
            while True:
                redraw()
                await trio.sleep(REDRAW_SECONDS)
        finally:
            redraw()
            bar.refresh()


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
