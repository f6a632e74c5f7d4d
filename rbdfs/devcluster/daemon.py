"""One daemon: starting it, waiting until it is ready, why it is not, and stopping it and no other process."""

import contextlib
import errno
import json
import os
import re
import select
import signal
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rbdfs.devcluster.programs import START_SECONDS, environment
from rbdfs.devcluster.signals import SIGNALS, signals_blocked
from rbdfs.errors import RbdfsError

POLL_SECONDS = 0.02
STOP_SECONDS = 5.0  # after SIGTERM; then SIGKILL
# An error in a daemon's log. What a crash adds after its reason says less, and what we asked too early says nothing.
ERROR_LINE = re.compile(r"^\S+ +[0-9a-f]+ +-1 +((?!\*\*\* Caught|\S+ In function|asok\().*\S)")


class DaemonError(RbdfsError):
    """A daemon ended, or did not become ready."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """A mon, a mgr or an OSD, whether it runs or not."""

    name: str
    """As Ceph writes it: `osd.0`."""
    folder: Path
    run_dir: Path

    @property
    def log(self) -> Path:
        """Its log, with what it says before it has one."""
        return self.folder / "log" / f"{self.name}.log"

    def start(self) -> None:
        """It goes into the background by itself, in a session of its own that a terminal's Ctrl-C does not reach.

        Signals wait for that: a daemon that ends at once is none that nobody stops.
        """
        kind, _, ident = self.name.partition(".")
        # In /, where Debian 13's OSD looks for its object classes: their folder's name is relative there.
        command = ["env", "--chdir=/", f"ceph-{kind}", "--conf", str(self.folder / "ceph.conf"), "--id", ident]
        with signals_blocked():
            launcher = os.posix_spawnp(
                command[0],
                command,
                environment(),
                setsid=True,
                setsigmask=(),
                setsigdef=(*SIGNALS, signal.SIGPIPE),
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, str(self.log), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
            )
            if os.waitpid(launcher, 0)[1]:
                raise self.error("ended")

    def wait_until_ready(self) -> None:
        """Asked at its admin socket: no other cluster's mon can be mistaken for ours there."""
        question, answer = ("mon_status", "leader") if self.name == "mon.a" else ("status", "active")
        deadline = time.monotonic() + START_SECONDS
        while self._ask(question) != answer:
            if self.name not in running(self.folder):
                raise self.error("ended")
            if time.monotonic() > deadline:
                raise self.error(f"was not ready in {START_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)

    def _ask(self, question: str) -> str:
        """The `state` that it reports; empty as long as it does not answer."""
        with socket.socket(socket.AF_UNIX) as admin, contextlib.suppress(OSError, ValueError, struct.error):
            admin.settimeout(START_SECONDS)
            admin.connect(str(self.run_dir / f"ceph-{self.name}.asok"))
            admin.sendall(json.dumps({"prefix": question}).encode() + b"\0")
            with admin.makefile("rb") as answer:
                (length,) = struct.unpack(">I", answer.read(4))
                return str(json.loads(answer.read(length)).get("state", ""))
        return ""

    def error(self, what: str) -> DaemonError:
        """What happened to it, with the reason from its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        errors = [match[1] for line in lines if (match := ERROR_LINE.match(line))]
        said = (errors or [line.strip() for line in lines if line.strip()] or ["it wrote nothing"])[-1]
        return DaemonError(f"{self.name} {what}: {said}; see {self.log}")


def running(folder: Path) -> dict[str, int]:
    """The pids of a folder's daemons by name. A mgr may change its pid, so they are known by their command line.

    In a container the same path may be another folder.
    """
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            program, *arguments = os.fsdecode((process / "cmdline").read_bytes()).split("\0")[:-1] or [""]
            if (
                arguments[:-1] == ["--conf", str(folder / "ceph.conf"), "--id"]
                and process.stat().st_uid == os.geteuid()
                and (process / "root" / folder.relative_to("/")).samefile(folder)
            ):
                found[f"{program.removeprefix('ceph-')}.{arguments[-1]}"] = int(process.name)
    return found


def stop(folder: Path, names: Sequence[str], first: signal.Signals) -> None:
    """Signal these daemons and wait until they are gone. By pidfd: a pid might change hands meanwhile."""
    for signum in (first, signal.SIGKILL, signal.SIGKILL):
        with contextlib.ExitStack() as stack:
            poll, left = select.poll(), 0
            for pid in [pid for name, pid in running(folder).items() if name in names]:
                with contextlib.suppress(ProcessLookupError):
                    descriptor = os.pidfd_open(pid)
                    stack.callback(os.close, descriptor)
                    signal.pidfd_send_signal(descriptor, signum)
                    poll.register(descriptor, select.POLLIN)
                    left += 1
            deadline = time.monotonic() + STOP_SECONDS
            while left and (ended := poll.poll(max(0.0, deadline - time.monotonic()) * 1000)):
                for descriptor, _ in ended:
                    poll.unregister(descriptor)
                    left -= 1
    if left:
        raise RbdfsError(f"{folder}: {left} daemons did not end in {3 * STOP_SECONDS:.0f} s", errno.EBUSY)
