"""The progress of a copy: a bar on a terminal, a line now and then elsewhere."""

import os
import sys
from collections.abc import Awaitable, Callable

import trio

from rbdfs.commands.formatting import format_bytes
from rbdfs.errors import RbdfsError
from rbdfs.export.copy import Copy

REDRAW_SECONDS = 0.2
LINE_SECONDS = 30.0
"""Time between two lines in a log."""


def load_bar() -> None:
    """Raise ImportError if a bar will be needed and its module is missing: better now than during the copy."""
    if sys.stderr.isatty():
        import tqdm  # noqa: F401, PLC0415  (takes a tenth of the time of a small export)


async def with_progress(work: Callable[[], Awaitable[None]], copy: Copy, name: str, *, shown: bool) -> None:
    """Do the work and show the progress of its copy on stderr, if `shown`. Raises the RbdfsError of the work."""
    failure: RbdfsError | None = None
    async with trio.open_nursery() as nursery:
        if shown:
            nursery.start_soon(_draw_bar if sys.stderr.isatty() else _print_lines, copy, name)
        try:
            await work()
        except RbdfsError as error:  # the nursery might wrap one that leaves it
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _draw_bar(copy: Copy, name: str) -> None:
    from tqdm import tqdm  # noqa: PLC0415  (see load_bar)

    tqdm.monitor_interval = 0  # starts no thread: we redraw the bar ourselves
    columns = os.get_terminal_size(sys.stderr.fileno()).columns
    shape = {"dynamic_ncols": True} if columns else {"ncols": 80, "nrows": 24}  # a serial line has no size
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
        print(f"rbdfs: {name}: {_progress_of(copy, seconds)}", file=sys.stderr, flush=True)


def _progress_of(copy: Copy, seconds: float) -> str:
    total = copy.data_bytes + copy.unknown_bytes
    rate = copy.copied_bytes / seconds
    left = f", {(total - copy.copied_bytes) / rate:.0f} s left" if rate else ""
    return f"{format_bytes(copy.copied_bytes)} of {format_bytes(total)} of data, {format_bytes(rate)}/s{left}"


def summary(copy: Copy, name: str, seconds: float) -> str:
    """A line about a copy that has ended."""
    rate = format_bytes(copy.copied_bytes / max(seconds, 0.001))
    data = f"{format_bytes(copy.copied_bytes)} of data in {seconds:.1f} s, {rate}/s"
    return f"copied {name}, {format_bytes(copy.size)}: {data}"
