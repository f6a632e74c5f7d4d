"""A real Ceph to test against, and a real mount of it."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import rados
import rbd

from rbdfs.catalog import Namespace
from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.ceph.image.ceph_image import CephImage
from rbdfs.commands.status_socket import name_of, peer_of
from rbdfs.devcluster.cluster import Devcluster, DevclusterOptions
from rbdfs.devcluster.state import Store
from rbdfs.fuse.mountinfo import mounted_on
from rbdfs.spec import ImageSpec

READ_ONLY_CAPS = ("mon", "profile rbd", "osd", "profile rbd-read-only")
SOON_BACK = {"objecter_timeout": "1", "objecter_tick_interval": "0.5"}
"""Where an OSD is that was restarted, librados asks the monitors once an operation is 10 s old, by default."""

RBDFS = (sys.executable, "-m", "rbdfs")
CHECKOUT = Path(__file__).resolve().parent.parent
MIB = 1 << 20


def random_bytes(size: int, seed: int = 1) -> bytes:
    """Bytes that no hole, no shift and no swap can be mistaken for."""
    return random.Random(seed).randbytes(size)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Poll for what no event tells; fail if it does not come."""
    deadline = time.monotonic() + seconds
    while True:
        is_late = time.monotonic() >= deadline
        if condition():
            return
        assert not is_late, "this did not come true in time"
        os.sched_yield()
        slept = time.monotonic()
        time.sleep(0.02)
        deadline += max(0.0, time.monotonic() - slept - 0.1)  # while this machine stood still, nothing else went on


class Ceph:
    """A cluster, as client.admin has it."""

    def __init__(self, devcluster: Devcluster) -> None:
        self.devcluster = devcluster
        self.conf = devcluster.conf
        self.rados = rados.Rados(conffile=os.fspath(self.conf), conf=SOON_BACK)
        self.rados.connect()
        self._names = 0

    def close(self) -> None:
        """Disconnect; the cluster stays."""
        self.rados.shutdown()

    def unique(self, prefix: str) -> str:
        """A name that no other test uses."""
        self._names += 1
        return f"{prefix}{self._names}"

    def run(self, *command: str) -> str:
        """Run one of Ceph's own commands; its output."""
        environment = os.environ | {"CEPH_CONF": os.fspath(self.conf)}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
        return os.fsdecode(done.stdout)

    def tell_mon(self, command: str, **arguments: object) -> bytes:
        """As the command `ceph` does, which takes half a second to start."""
        status, answer, error = self.rados.mon_command(json.dumps({"prefix": command, **arguments}), b"")
        assert status == 0, error
        return bytes(answer)

    @contextmanager
    def ioctx(self, pool: str = "rbd") -> Iterator[rados.Ioctx]:
        """A pool, to work on images in."""
        ioctx = self.rados.open_ioctx(pool)
        try:
            yield ioctx
        finally:
            ioctx.close()

    def make_pool(self, name: str) -> None:
        """A pool with the rbd application."""
        self.tell_mon("osd pool create", pool=name, pg_num=8)
        with self.ioctx(name) as ioctx:
            rbd.RBD().pool_init(ioctx, True)

    def remove_pool(self, name: str) -> None:
        """And all that is in it."""
        self.tell_mon("osd pool rm", pool=name, pool2=name, yes_i_really_really_mean_it=True)

    def make_image(
        self, name: str, content: bytes, object_size: int = 4 * MIB, *, pool: str = "rbd", **options: object
    ) -> None:
        """An image with this content."""
        with self.ioctx(pool) as ioctx:
            options.setdefault("old_format", False)
            rbd.RBD().create(ioctx, name, len(content), order=object_size.bit_length() - 1, **options)
            if content:
                self.write_image(name, content, pool=pool)

    def write_image(self, name: str, content: bytes, offset: int = 0, *, pool: str = "rbd") -> None:
        """Write as a client of its own, and be gone."""
        with self.ioctx(pool) as ioctx, rbd.Image(ioctx, name) as image:
            for start in range(0, len(content), 32 * MIB):
                image.write(content[start : start + 32 * MIB], offset + start)
            image.flush()

    def resize_image(self, name: str, size: int) -> None:
        """Grow or shrink."""
        with self.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
            image.resize(size)

    def remove_image(self, name: str, pool: str = "rbd") -> None:
        """As `rbd rm`."""
        with self.ioctx(pool) as ioctx:
            rbd.RBD().remove(ioctx, name)

    def exported(self, name: str) -> bytes:
        """The image as `rbd export` has it: the independent reader."""
        environment = os.environ | {"CEPH_CONF": os.fspath(self.conf)}
        command = ("rbd", "export", "--no-progress", f"rbd/{name}", "-")
        return subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120).stdout

    def watchers(self, name: str, pool: str = "rbd") -> list[str]:
        """Who watches an image's header."""
        status = json.loads(self.run("rbd", "status", f"{pool}/{name}", "--format", "json"))
        return [watcher["address"] for watcher in status.get("watchers", [])]

    def make_key(self, name: str, *caps: str) -> Path:
        """A key for client.`name` with these caps; the keyring that holds it."""
        keyring = self.conf.parent / f"test.{name}.keyring"
        keyring.write_bytes(self.tell_mon("auth get-or-create", entity=f"client.{name}", caps=caps))
        return keyring

    def credentials(self, caps: Sequence[str] | None) -> tuple[str, ...]:
        """The options that mount with a key of these caps; none for client.admin."""
        if caps is None:
            return ()
        name = self.unique("key")
        return ("--id", name, "--keyring", os.fspath(self.make_key(name, *caps)))


@contextmanager
def silent(ceph: Ceph, *daemons: str) -> Iterator[None]:
    """These daemons say nothing; their connections stay."""
    pids = [pid for daemon in daemons if (pid := ceph.devcluster.status().pids[daemon])]
    assert len(pids) == len(daemons)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def running_ceph(osds: int = 1, store: Store = "bluestore", parent: Path | None = None) -> Iterator[Ceph]:
    """A cluster in a folder of its own (in `parent`, or where temporary ones are), until the end of the block."""
    folder = Path(tempfile.mkdtemp(prefix="rbdfs-test-", dir=parent))
    devcluster = Devcluster(DevclusterOptions(folder, osds, store))
    try:
        devcluster.up()
        ceph = Ceph(devcluster)
        try:
            yield ceph
        finally:
            ceph.close()
    finally:
        devcluster.down()
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def connected(ceph: Ceph, **options: Any) -> AsyncIterator[Cluster]:
    """rbdfs's own connection, until the end of the block; the options are those of `ClusterOptions`."""
    cluster = await Cluster.connect(ClusterOptions(conf=ceph.conf, **options))
    try:
        yield cluster
    finally:
        await cluster.aclose()


async def open_image(cluster: Cluster, name: str, snapshot: str | None = None) -> CephImage:
    """An image of pool rbd, or a snapshot, by name; to be closed by the caller."""
    image = await cluster.image(Namespace(await cluster.pool("rbd")), name)
    ref = image if snapshot is None else await cluster.snapshot(image, snapshot)
    return await cluster.open_image(ImageSpec("rbd", name), ref)


def rbdfs(*arguments: str, conf: Path | None = None, module: str = "rbdfs") -> subprocess.CompletedProcess[str]:
    """Run a command of rbdfs to its end."""
    environment = {key: value for key, value in os.environ.items() if key != "CEPH_CONF"} | {
        "PYTHONPATH": os.fspath(CHECKOUT)
    }
    if conf is not None:
        environment["CEPH_CONF"] = os.fspath(conf)
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def server_of(mountpoint: Path) -> int:
    """The process that answers `rbdfs status` of a mount."""
    mounted = mounted_on(mountpoint)
    assert mounted is not None
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(name_of(mounted.device_number))
        return peer_of(connection)[0]


class Mount:
    """A mount in a process of its own, as a user starts it."""

    def __init__(self, ceph: Ceph, folder: Path, arguments: Sequence[str], module: str) -> None:
        self.path = folder / "mnt"
        self.path.mkdir(parents=True)
        self.log_file = folder / "rbdfs.log"
        self._allowed: set[str] = set()
        done = rbdfs(
            "mount", "-v", "--log-file", str(self.log_file), *arguments, str(self.path), conf=ceph.conf, module=module
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        self.pid = server_of(self.path)

    def image(self, name: str, pool: str = "rbd") -> Path:
        """The file of an image."""
        return self.path / pool / name

    @property
    def status(self) -> dict[str, Any]:
        """What `rbdfs status --json` says of it."""
        [found] = json.loads(rbdfs("status", "--json", str(self.path)).stdout)
        return dict(found)

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self.log_file.read_text()

    def expect(self, *levels: str) -> None:
        """Log records of these levels are what this test is about."""
        self._allowed.update(levels)

    @property
    def is_mounted(self) -> bool:
        """Whether the kernel has it."""
        return f" {self.path} fuse.rbdfs " in Path("/proc/self/mounts").read_text()

    @property
    def is_running(self) -> bool:
        """Whether its process is there, and no zombie."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    @property
    def waits(self) -> list[str]:
        """Where in the kernel each of its threads is."""
        return [path.read_text().strip() for path in Path(f"/proc/{self.pid}/task").glob("*/wchan")]

    def end(self) -> None:
        """Unmount, wait for the process, and fail on warnings that the test did not expect."""
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=True)
        try:
            wait_until(lambda: not self.is_running)
        except AssertionError:
            raise AssertionError(
                f"the mount's process lives on; its threads wait in {self.waits}; {self.log}"
            ) from None
        unexpected = [
            line
            for line in self.log.splitlines()
            if any(f" {level} " in line for level in {"WARNING", "ERROR", "CRITICAL"} - self._allowed)
            or ("Traceback" not in self._allowed and line.startswith("Traceback"))
        ]
        assert not unexpected, self.log
