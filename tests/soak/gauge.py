"""What the mount's process takes: memory, descriptors, threads."""

import re
import time
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import MIB

IDLE_SECONDS = 45.0
"""Idle threads end within 10 s, and kept images are closed within 5 s."""
RSS_SLACK_BYTES = 48 * MIB
FDS_SLACK, THREADS_SLACK = 6, 4


@dataclass(frozen=True, slots=True)
class Sample:
    """Of one moment."""

    rss_bytes: int
    fds: int
    threads: int

    def grown_since(self, begin: "Sample") -> list[str]:
        """What is not near where it began."""
        limits = {
            "RSS (MiB)": (self.rss_bytes // MIB, (begin.rss_bytes + RSS_SLACK_BYTES) // MIB),
            "descriptors": (self.fds, begin.fds + FDS_SLACK),
            "threads": (self.threads, begin.threads + THREADS_SLACK),
        }
        return [f"{what}: {value}, more than {limit}" for what, (value, limit) in limits.items() if value > limit]

    def __str__(self) -> str:
        return f"RSS {self.rss_bytes // MIB} MiB, {self.fds} descriptors, {self.threads} threads"


def sample(pid: int) -> Sample:
    """What it is now."""
    status = Path(f"/proc/{pid}/status").read_text()
    numbers = {name: int(number) for name, number in re.findall(r"(?m)^(\w+):\s+(\d+)", status)}
    return Sample(numbers["VmRSS"] << 10, len(list(Path(f"/proc/{pid}/fd").iterdir())), numbers["Threads"])


def idle_sample(pid: int, begin: Sample | None = None) -> Sample:
    """What it is once all is closed; with `begin`, as soon as it is near that."""
    deadline = time.monotonic() + (IDLE_SECONDS if begin else IDLE_SECONDS / 3)
    while True:
        now = sample(pid)
        if time.monotonic() > deadline or (begin and not now.grown_since(begin)):
            return now
        time.sleep(1)
