"""One daemon: starting it, waiting until it is ready, and why it is not."""

import contextlib
import json
import os
import re
import signal
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from rbdfs.devcluster.process import Process
from rbdfs.devcluster.programs import START_SECONDS, environment
from rbdfs.devcluster.signals import SIGNALS
from rbdfs.errors import RbdfsError

POLL_SECONDS = 0.02
# An error in a daemon's log. What a crash adds after its reason says less, and what we asked too early says nothing.
ERROR_LINE = re.compile(r"^\S+ +[0-9a-f]+ +-1 +((?!\*\*\* Caught|\S+ In function|asok\().*\S)")


class DaemonError(RbdfsError):
    """A daemon ended, or did not become ready."""


@dataclass(frozen=True, slots=True)
class Daemon:
    """A mon, a mgr or an OSD, whether it runs or not."""

    name: str
    """As Ceph writes it: `osd.0`."""
    conf: Path
    log: Path
    admin_socket: str

    def spawn(self) -> Process:
        """Start it. To be called, and the answer recorded, with signals blocked.

        Not a Popen: that wants to be waited for by the one who made it. `env` only changes the folder and becomes the
        daemon, whose pid and start time it has.
        """
        kind, _, ident = self.name.partition(".")
        command = ["env", "--chdir=/", f"ceph-{kind}", "-f", "--conf", str(self.conf), "--id", ident]
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        pid = os.posix_spawnp(
            command[0],
            command,
            environment(),
            setsid=True,
            setsigmask=(),
            setsigdef=(*SIGNALS, signal.SIGPIPE),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(self.log), flags, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
        )
        return Process.of(pid)

    def wait_until_ready(self, process: Process) -> None:
        """Asked at its admin socket: no other cluster's mon can be mistaken for ours there."""
        question, answer = ("mon_status", "leader") if self.name == "mon.a" else ("status", "active")
        deadline = time.monotonic() + START_SECONDS
        while _ask(self.admin_socket, question) != answer:
            if not process.alive(self.conf):
                raise self.error("ended")
            if time.monotonic() > deadline:
                raise self.error(f"was not ready in {START_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)

    def error(self, what: str) -> DaemonError:
        """What happened to it, with the reason from its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        errors = [match[1] for line in lines if (match := ERROR_LINE.match(line))]
        said = (errors or [line.strip() for line in lines if line.strip()] or ["it wrote nothing"])[-1]
        return DaemonError(f"{self.name} {what}: {said}; see {self.log}")


def _ask(socket_path: str, question: str) -> str:
    """The `state` that a daemon reports at its admin socket; empty as long as it does not answer."""
    with socket.socket(socket.AF_UNIX) as admin, contextlib.suppress(OSError, ValueError, struct.error):
        admin.settimeout(START_SECONDS)
        admin.connect(socket_path)
        admin.sendall(json.dumps({"prefix": question}).encode() + b"\0")
        with admin.makefile("rb") as answer:
            (length,) = struct.unpack(">I", answer.read(4))
            return str(json.loads(answer.read(length)).get("state", ""))
    return ""
