"""The process behind a request of the kernel, from /proc."""

import re
from pathlib import Path
from signal import SIGKILL
from typing import NamedTuple


class Process(NamedTuple):
    """A process as it was when it asked."""

    pid: int
    """0 if it is in a PID namespace that this one does not see."""
    command: str
    """Its name, as `ps -o comm` has it; empty if it is gone."""


def process_of(thread: int) -> Process:
    """Return the process of a thread: the kernel names only the thread."""
    try:
        status = Path(f"/proc/{thread}/status").read_text(errors="backslashreplace")
        found = re.search(r"^Tgid:\t(\d+)$", status, re.MULTILINE)
        pid = int(found[1]) if found else thread
        return Process(pid, Path(f"/proc/{pid}/comm").read_text(errors="backslashreplace").removesuffix("\n"))
    except OSError:
        return Process(thread, "")


def is_killed(thread: int) -> bool:
    """Return whether a thread has SIGKILL pending: the kernel turns any deadly signal into it (complete_signal)."""
    try:
        status = Path(f"/proc/{thread}/status").read_text(errors="backslashreplace")
    except OSError:
        return False
    pending = re.findall(r"^(?:SigPnd|ShdPnd):\t([0-9a-f]+)$", status, re.MULTILINE)
    return any(int(mask, 16) >> (SIGKILL - 1) & 1 for mask in pending)
