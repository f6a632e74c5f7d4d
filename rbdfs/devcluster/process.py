"""A recorded process: whether a pid is still the one that we started, and stopping it and no other."""

import contextlib
import errno
import os
import select
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rbdfs.errors import RbdfsError

STOP_SECONDS = 5.0  # after SIGTERM; then SIGKILL


@dataclass(frozen=True, slots=True)
class Process:
    """The start time (clock ticks since boot) tells a process from a later one with the same pid."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "Process":
        """The process that has this pid now, dead or alive."""
        return cls(pid, _state_and_start(pid)[1])

    def alive(self, conf: Path) -> bool:
        """Whether this is still that daemon, of that configuration. Reaps it if it was our child and ended."""
        try:
            if _state_and_start(self.pid)[1] != self.started:
                return False
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)
            return os.fsencode(conf) in _command_line(self.pid)
        except OSError:
            return False


def stop(processes: Iterable[Process], conf: Path, first: signal.Signals) -> None:
    """Signal these daemons and wait until they are gone. By pidfd: a pid might change hands meanwhile."""
    poll = select.poll()
    left: dict[int, Process] = {}
    with contextlib.ExitStack() as descriptors:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                if process.alive(conf):
                    descriptor = os.pidfd_open(process.pid)
                    descriptors.callback(os.close, descriptor)
                    if process.alive(conf):
                        poll.register(descriptor, select.POLLIN)
                        left[descriptor] = process
        for signum in (first, signal.SIGKILL):
            for descriptor in left:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signum)
            deadline = time.monotonic() + STOP_SECONDS
            while left and (ended := poll.poll(max(0.0, deadline - time.monotonic()) * 1000)):
                for descriptor, _ in ended:
                    poll.unregister(descriptor)
                    left.pop(descriptor).alive(conf)  # reaps it if it was our child
    if left:
        raise RbdfsError(f"{conf.parent}: {len(left)} daemons did not end in {2 * STOP_SECONDS:.0f} s", errno.EBUSY)


def _state_and_start(pid: int) -> tuple[str, int]:
    """Fields 3 and 22 (clock ticks since boot) of proc(5)'s stat; field 2, the name, may hold anything."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _command_line(pid: int) -> list[bytes]:
    """Empty for a zombie, and for some microseconds of an exec: that is waited for."""
    line = b""
    while not line and _state_and_start(pid)[0] not in "ZXI":
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    return line.split(b"\0")
