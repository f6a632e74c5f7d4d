"""Who has sent a request of the kernel."""

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
    """The process of a thread: that is what the kernel names."""
    try:
        status = Path(f"/proc/{thread}/status").read_text(errors="backslashreplace")
        found = re.search(r"^Tgid:\t(\d+)$", status, re.MULTILINE)
        pid = int(found[1]) if found else thread
        return Process(pid, Path(f"/proc/{pid}/comm").read_text(errors="backslashreplace").removesuffix("\n"))
    except OSError:
        return Process(thread, "")


def is_killed(thread: int) -> bool:
    """Whether a thread has SIGKILL pending: of any deadly signal the kernel makes that (complete_signal)."""
    try:
        status = Path(f"/proc/{thread}/status").read_text(errors="backslashreplace")
    except OSError:
        return False
    pending = re.findall(r"^(?:SigPnd|ShdPnd):\t([0-9a-f]+)$", status, re.MULTILINE)
    return any(int(mask, 16) >> (SIGKILL - 1) & 1 for mask in pending)
