"""Those who show an image as a file: how each is started, where its files are, and how it is ended."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rbdfs.devcluster.signals import signals_blocked
from tests.benchmarks.machine import CHECKOUT
from tests.benchmarks.site import Image, Site, unmount

START_SECONDS = 30.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.01

_numbers = itertools.count()


class PeerError(Exception):
    """A peer could not do its work: this measurement has no figure, the others go on."""


@dataclass(frozen=True, slots=True)
class Server:
    """A program that goes to the background when asked to serve, and whose command line names the mount point."""

    program: str
    command: str
    """With {mountpoint}, {conf}, {pool}, {image} and {arguments} (rbdfs's own) to fill in."""
    file: str
    """Where an image is."""
    on_a_file: bool = False
    """The mount point is a file and not a folder."""


RBDFS_COMMAND = f"{sys.executable} -m rbdfs"
RBDFS = Server(
    program=sys.executable,
    command=f"{RBDFS_COMMAND} mount --conf {{conf}} {{arguments}} {{mountpoint}}",
    file="{mountpoint}/{pool}/{image}",
)
RBD_FUSE = Server(
    program="rbd-fuse",
    # It lists the pool anew in each open and getattr, and answers ENOENT to others that ask meanwhile
    # (rbd-fuse.cc, enumerate_images): without the timeouts, many jobs could not open one file.
    command="rbd-fuse -c {conf} -p {pool} -o entry_timeout=3600,attr_timeout=3600 {mountpoint}",
    file="{mountpoint}/{image}",
)
QEMU_STORAGE_DAEMON = Server(
    program="qemu-storage-daemon",
    command="qemu-storage-daemon --daemonize --blockdev driver=rbd,node-name=image,pool={pool},image={image},"
    "conf={conf},read-only=on --export type=fuse,id=export,node-name=image,mountpoint={mountpoint}",
    file="{mountpoint}",
    on_a_file=True,
)


@dataclass(frozen=True, slots=True)
class Served:
    """A mount that can be used."""

    server: Server
    mountpoint: Path
    pid: int
    start_seconds: float
    """From the start of the command until the mount answered."""

    def file(self, image: Image) -> Path:
        """The file of an image."""
        return Path(self.server.file.format(mountpoint=self.mountpoint, pool=image.pool, image=image.name))

    @property
    def cpu_seconds(self) -> float:
        """User and system time that the process has used so far: fields 14 and 15 of proc(5)'s stat."""
        fields = self._proc("stat").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def peak_rss_bytes(self) -> int:
        """The most memory that the process has had so far."""
        return int(self._proc("status").partition("VmHWM:")[2].split()[0]) * 1024

    def _proc(self, name: str) -> str:
        try:
            return Path(f"/proc/{self.pid}/{name}").read_text()
        except OSError:
            raise PeerError("the process that served the mount has ended") from None


@contextlib.contextmanager
def served(server: Server, site: Site, conf: Path, image: Image) -> Iterator[Served]:
    """A fresh mount: nothing of an earlier one is in any cache of the client, the kernel's page cache included."""
    mountpoint = site.folder / f"mount{next(_numbers)}"
    if server.on_a_file:
        mountpoint.touch()
    else:
        mountpoint.mkdir()
    command = server.command.format(
        mountpoint=mountpoint,
        conf=conf,
        pool=image.pool,
        image=image.name,
        arguments=" ".join(site.rbdfs_arguments),
    ).split()
    started_at = time.monotonic()
    try:
        started = subprocess.run(
            command,
            env=environment(conf),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        if started.returncode != 0:
            raise PeerError(f"{Path(server.program).name}: {started.stderr.strip() or 'could not be started'}")
        wait_until(lambda: is_usable(mountpoint), f"{server.program} has not mounted {mountpoint}")
        start_seconds = time.monotonic() - started_at
        yield Served(server, mountpoint, _server_pid(mountpoint), start_seconds)
    except subprocess.TimeoutExpired:
        raise PeerError(f"{server.program}: did not start within {START_SECONDS:.0f} s") from None
    finally:
        with signals_blocked():
            _end(mountpoint)


def by_baseline(command: str, python: str) -> str:
    """Our command, run by another interpreter, with the rbdfs that is installed there."""
    # -I: without the PYTHONPATH that names this checkout, and without the current directory.
    return command.replace(RBDFS_COMMAND, f"{python} -I -m rbdfs")


def baseline_server(python: str) -> Server:
    """The mount of another rbdfs."""
    return replace(RBDFS, program=python, command=by_baseline(RBDFS.command, python))


def environment(conf: Path) -> Mapping[str, str]:
    """Of every program that we start: this cluster, this checkout, messages that can be parsed."""
    return os.environ | {"CEPH_CONF": os.fspath(conf), "PYTHONPATH": os.fspath(CHECKOUT), "LC_ALL": "C.UTF-8"}


def is_mounted(mountpoint: Path) -> bool:
    """Whether the kernel has it."""
    return f" {mountpoint} fuse" in Path("/proc/self/mounts").read_text()


def is_usable(mountpoint: Path) -> bool:
    """Whether the kernel has it, and the server answers: some go to the background before they can."""
    try:
        mountpoint.stat()
    except OSError:
        return False
    return is_mounted(mountpoint)


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    """Poll for what no event tells."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise PeerError(otherwise)
        time.sleep(POLL_SECONDS)


def _servers(mountpoint: Path) -> list[int]:
    """Pids of the living processes whose command line names this mount point, which no one else's does."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_bytes()  # empty for a zombie
            if os.fsencode(mountpoint) in arguments.replace(b"=", b"\0").split(b"\0"):
                found.append(int(folder.name))
    return found


def _server_pid(mountpoint: Path) -> int:
    """After a daemon's fork its parent may still be there for a moment."""
    wait_until(lambda: len(_servers(mountpoint)) == 1, f"no single process serves {mountpoint}")
    return _servers(mountpoint)[0]


def _end(mountpoint: Path) -> None:
    """Unmount; most end with that, the others are told to."""
    if is_mounted(mountpoint):
        unmount(mountpoint)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _servers(mountpoint):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + STOP_SECONDS
        while _servers(mountpoint) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    if mountpoint.is_dir():
        mountpoint.rmdir()
    else:
        mountpoint.unlink()
