"""What the service manager hears of a mount: ready, status, stopping, and that it answers, as long as it does."""

import errno
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import PIPE

import pytest

from rbdfs.commands.systemd import ASKED_IN_TIME, ServiceManager
from tests.cluster import CHECKOUT, MIB, READ_ONLY_CAPS, Ceph, random_bytes, wait_until

WATCHDOG_SECONDS = 1.5
A_PING = WATCHDOG_SECONDS / ASKED_IN_TIME
NO_PING_SECONDS = 2 * WATCHDOG_SECONDS
"""By then systemd would have ended it."""


# Who is to be told.


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, ServiceManager()),
        ({"NOTIFY_SOCKET": "/run/x"}, ServiceManager("/run/x")),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1500000"}, ServiceManager("@x", 1.5)),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "7"}, ServiceManager("@x", 1.5)),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "8"}, ServiceManager("@x")),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "soon"}, ServiceManager("@x")),
        ({"NOTIFY_SOCKET": "vsock:2:1234"}, ServiceManager()),
        ({"WATCHDOG_USEC": "1500000"}, ServiceManager()),
    ],
)
def test_the_environment_says_who_waits_for_notifications(environment: dict[str, str], wanted: ServiceManager) -> None:
    assert ServiceManager.from_environment(environment, 7) == wanted
    assert environment == {}  # our children would speak for us


@pytest.mark.parametrize("is_abstract", [True, False])
def test_one_datagram_has_a_line_for_each_assignment(tmp_path: Path, *, is_abstract: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        name = f"rbdfs-test-{os.getpid()}" if is_abstract else str(tmp_path / "socket")
        receiver.bind(f"\0{name}" if is_abstract else name)
        ServiceManager(f"@{name}" if is_abstract else name).notify("READY=1", "STATUS=two\nlines, \udcff")
        assert receiver.recv(1000) == b"READY=1\nSTATUS=two lines, \\udcff"


def test_a_manager_that_is_gone_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager(str(tmp_path / "nobody")).notify("WATCHDOG=1")
    assert "cannot notify the service manager of WATCHDOG=1: [Errno 2]" in caplog.text


# A mount as a service: this process is the manager.


class Service:
    """A mount in the foreground, and all that it has told."""

    def __init__(self, ceph: Ceph, folder: Path, *arguments: str, module: str, **environment: str) -> None:
        self.path = folder / "mnt"
        self.path.mkdir()
        self.said: list[str] = []
        """Assignments, in order."""
        self.pings = 0
        self._heard = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(folder / "notify"))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "mount", "-f", *arguments, str(self.path)],
            env=os.environ
            | {
                "CEPH_CONF": str(ceph.conf),
                "PYTHONPATH": str(CHECKOUT),
                "NOTIFY_SOCKET": str(folder / "notify"),
                "WATCHDOG_USEC": str(int(WATCHDOG_SECONDS * 1e6)),
            }
            | environment,
            stderr=PIPE,
            text=True,
        )

    def receive(self, seconds: float) -> None:
        """Take in what comes within so long."""
        left = seconds
        while left > 0:
            began = time.monotonic()
            if select.select([self._socket], [], [], min(left, 0.1))[0]:
                message, ancillary, _, _ = self._socket.recvmsg(10_000, 1000)
                [(_, _, credentials)] = ancillary
                assert struct.unpack("iii", credentials)[0] == self.process.pid  # NotifyAccess=main takes no other's
                self.said += message.decode().split("\n")
                self.pings = self.said.count("WATCHDOG=1")
            left -= min(time.monotonic() - began, 0.15)  # not while this process, and maybe the other, stood still

    def wait_for(self, pattern: str, seconds: float = 30.0) -> None:
        """Until it tells what matches; what came before that has been waited for."""
        deadline = time.monotonic() + seconds
        while True:
            while self._heard < len(self.said):
                self._heard += 1
                if re.fullmatch(pattern, self.said[self._heard - 1]):
                    return
            assert time.monotonic() < deadline, f"{pattern} did not come; {self.said}"
            self.receive(0.05)

    def keeps_pinging(self) -> bool:
        """Whether systemd would leave it alone for a while longer."""
        before = self.pings
        self.receive(NO_PING_SECONDS)
        return self.pings - before >= 2

    def end(self) -> str:
        """What it wrote to stderr."""
        self.process.send_signal(signal.SIGTERM)
        _, stderr = self.process.communicate(timeout=20)
        self.receive(0.1)
        return stderr

    def close(self) -> None:
        """Whatever has become of it."""
        self.process.kill()
        subprocess.run(["umount", "-l", "-q", str(self.path)], check=False)
        self.process.communicate()
        self._socket.close()


Services = Callable[..., Service]


def unmount(path: Path) -> None:
    """Which is busy while the watchdog asks."""
    wait_until(lambda: subprocess.run(["umount", path], capture_output=True, check=False).returncode == 0)


@pytest.fixture
def services(ceph: Ceph, tmp_path: Path) -> Iterator[Services]:
    """Starts one that is ready."""
    started: list[Service] = []

    def start(*arguments: str, module: str = "rbdfs", **environment: str) -> Service:
        service = Service(ceph, tmp_path, *arguments, module=module, **environment)
        started.append(service)
        service.wait_for("READY=1")
        return service

    try:
        yield start
    finally:
        for service in started:
            service.close()


def test_it_is_ready_once_it_can_be_used_and_says_how_it_is_until_it_stops(ceph: Ceph, services: Services) -> None:
    name = ceph.unique("status")
    ceph.make_image(name, random_bytes(MIB))
    service = services("--pool", "rbd")
    assert (service.path / "rbd" / name).read_bytes() == random_bytes(MIB)
    assert service.said[0] == "STATUS=connecting to the cluster as client.admin"
    service.wait_for(f"STATUS=rbd on {service.path}, 0 open files")
    with (service.path / "rbd" / name).open("rb"):
        service.wait_for(f"STATUS=rbd on {service.path}, 1 open file")
    service.wait_for(f"STATUS=rbd on {service.path}, 0 open files")
    assert service.end() == ""
    assert service.process.returncode == 0
    assert [each for each in service.said if "WATCHDOG" not in each][-2:] == ["STOPPING=1", "STATUS=closing images"]


def test_it_stops_as_well_when_it_is_unmounted(services: Services) -> None:
    service = services()
    unmount(service.path)
    service.wait_for("STOPPING=1")
    assert service.process.wait(10) == 0


def test_a_mount_in_the_background_leaves_the_manager_to_the_process_that_started_it(
    ceph: Ceph, tmp_path: Path
) -> None:
    (tmp_path / "mnt").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)
        environment = {
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": "100000",
            "CEPH_CONF": str(ceph.conf),
        }
        command = [sys.executable, "-m", "rbdfs", "mount", str(tmp_path / "mnt")]
        subprocess.run(command, env=os.environ | environment | {"PYTHONPATH": str(CHECKOUT)}, check=True, timeout=60)
        subprocess.run(["umount", tmp_path / "mnt"], check=True)
        with pytest.raises(BlockingIOError):
            receiver.recv(1000)


# The watchdog: it asks the mount, and no cluster.


def test_the_watchdog_hears_nothing_from_a_stopped_mount_and_again_when_it_goes_on(services: Services) -> None:
    service = services()
    assert service.keeps_pinging()
    service.process.send_signal(signal.SIGSTOP)
    service.receive(A_PING)  # what was on its way
    before = service.pings
    service.receive(NO_PING_SECONDS)
    assert service.pings == before
    service.process.send_signal(signal.SIGCONT)
    assert service.keeps_pinging()


def test_the_watchdog_hears_nothing_while_the_thread_that_answers_hangs(
    ceph: Ceph, services: Services, tmp_path: Path
) -> None:
    hangs = tmp_path / "hangs"
    os.mkfifo(hangs)
    service = services(module="tests.hanging_mount", HANGS_UNTIL_WRITTEN=str(hangs))
    assert service.keeps_pinging()
    look = threading.Thread(target=lambda: (service.path / "rbd" / "hangs").exists())
    look.start()
    writers: list[int] = []

    def is_hanging() -> bool:
        with suppress(OSError):  # ENXIO: nobody opens it for reading yet
            writers.append(os.open(hangs, os.O_WRONLY | os.O_NONBLOCK))
        return writers != []

    wait_until(is_hanging)
    service.receive(A_PING)
    before = service.pings
    service.receive(NO_PING_SECONDS)
    assert service.pings == before
    os.write(writers[0], b"go on")
    os.close(writers[0])
    look.join(20)
    assert service.keeps_pinging()


def test_the_watchdog_hears_of_the_mount_while_the_whole_cluster_is_dead(ceph: Ceph, services: Services) -> None:
    name = ceph.unique("dead")
    ceph.make_image(name, random_bytes(8 * MIB))
    service = services("--osd-timeout", "3", "--direct-io")

    # More than all worker threads, each waiting for the monitor.
    def ask() -> None:
        with suppress(OSError):
            os.statvfs(service.path)

    askers = [threading.Thread(target=ask) for _ in range(60)]

    def read() -> None:
        with suppress(OSError):
            os.pread(file, 4096, 4 * MIB)

    reader = threading.Thread(target=read)
    file = os.open(service.path / "rbd" / name, os.O_RDONLY)
    for daemon in ("osd.0", "mon.a"):
        ceph.devcluster.kill_daemon(daemon)
    try:
        reader.start()
        reader.join(30)
        for thread in askers:
            thread.start()
        assert service.keeps_pinging()
        service.wait_for("STATUS=.*, 1 open file; trouble: .* was not answered .* \\(60 errors, and 1 more trouble\\)")
        assert service.keeps_pinging()
    finally:
        for daemon in ("mon.a", "osd.0"):
            ceph.devcluster.start_daemon(daemon)
        for thread in askers:
            thread.join(60)
        os.close(file)
    assert not any(thread.is_alive() for thread in askers)
    assert f"cannot read rbd/{name} at " in service.end()


def test_the_watchdog_hears_of_a_mount_that_no_path_leads_to(ceph: Ceph, services: Services) -> None:
    name = ceph.unique("lazy")
    ceph.make_image(name, random_bytes(2 * MIB))
    service = services("--direct-io")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", service.path], check=True)
    assert service.keeps_pinging()
    unmount(service.path)
    with (service.path / "rbd" / name).open("rb", buffering=0) as file:
        subprocess.run(["umount", "-l", service.path], check=True)
        assert service.keeps_pinging()
        assert os.pread(file.fileno(), MIB, MIB) == random_bytes(2 * MIB)[MIB:]
    assert service.process.wait(20) == 0


def test_without_a_watchdog_the_mount_is_not_asked(services: Services) -> None:
    service = services(WATCHDOG_PID="1")
    service.wait_for("STATUS=all pools on .*, 0 open files")
    service.receive(NO_PING_SECONDS)
    assert service.pings == 0


@contextmanager
def pings(service: Service) -> Iterator[None]:
    """At least three pings before the block ends."""
    before = service.pings
    yield
    while service.pings < before + 3:
        service.wait_for("WATCHDOG=1")


def test_the_watchdog_asks_the_cluster_nothing(ceph: Ceph, services: Services) -> None:
    # A key that may do nothing any more: any question to an OSD would be an error in the log.
    keyring = ceph.make_key(ceph.unique("asks"), *READ_ONLY_CAPS)
    service = services("--id", keyring.name.split(".")[1], "-k", str(keyring), "-d")
    with pings(service):
        pass
    with pytest.raises(OSError, match="No data") as caught:
        os.getxattr(service.path, "user.rbdfs.watchdog")
    assert caught.value.errno == errno.ENODATA
    assert "ERROR" not in service.end()
