"""`rbdfs status`: what it shows of real mounts, also while no OSD answers, and that nobody can speak for another."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from rbdfs.commands import status, status_server
from rbdfs.commands.formatting import format_seconds
from rbdfs.commands.status import ANSWER_SECONDS, Found, StatusOptions, _answer_of, _as_json, _as_text, _ask
from rbdfs.commands.status_socket import name_of
from rbdfs.errors import MountError
from rbdfs.fuse.mountinfo import MountInfo, mountinfo
from rbdfs.fuse.mounting import TYPE
from rbdfs.fuse.process import Process, process_of
from tests.cluster import MIB, Ceph, Mount, random_bytes, rbdfs, wait_until
from tests.in_trio import with_a_clock

Mounts = Callable[..., Mount]

NUMBER = (999_999, os.getpid())
"""No device has it."""
ROOT, NOBODY = 0, 65534

REPORT = {
    "version": "0.1.0",
    "fsid": "489effc2",
    "client": "client.backup",
    "started": 0.0,
    "connected": True,
    "osds_answer": False,
    "trouble": "cannot read rbd/vm1 at 4096 (+4096): timed out (3 errors)",
    "cache": {"bytes": 3 * MIB, "budget_bytes": 256 * MIB, "hits": 12031, "misses": 1},
    "in_flight": {"reads": 2, "bytes": 8 * MIB, "queued": 1},
    "open_files": 22,
    "open": [{"image": "rbd/vm1", "pid": 15903, "command": "c\np", "seconds": 41.24}] * 22,
    "requests_waiting": 2,
    "waiting": [
        {"operation": "read", "image": "rbd/vm1", "offset": 4096, "seconds": 8.44},
        {"operation": "lookup", "image": None, "offset": None, "seconds": 1.0},
    ],
    "errors": [{"at": 0.0, "operation": "read", "message": "cannot read rbd/vm1 at 0 (+4096): timed out"}],
}


def shown(*arguments: object, exit_status: int = 0) -> list[dict[str, Any]]:
    """What `rbdfs status --json` says."""
    done = rbdfs("status", "--json", *map(str, arguments))
    assert done.returncode == exit_status, done.stderr
    assert done.stderr == ""
    return list(json.loads(done.stdout))


def of(mount: Mount) -> dict[str, Any]:
    """What it says of one mount."""
    [found] = shown(mount.path)
    assert found["mountpoint"] == str(mount.path)
    return found


def made_up(owner: int) -> MountInfo:
    """A mount whose process is played by the test."""
    return MountInfo(1, NUMBER, b"/mnt/x", TYPE, owner)


# As text.


def test_a_report_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    found = Found(made_up(0), 15861, REPORT, "")
    monkeypatch.setattr(time, "time", lambda: 11520.0)
    assert list(_as_text(found)) == [
        "/mnt/x",
        "  cluster      489effc2 as client.backup: no OSD answers",
        "  trouble      cannot read rbd/vm1 at 4096 (+4096): timed out (3 errors)",
        "  process      15861, up 3 h 12 min, rbdfs 0.1.0",
        "  cache        3 MiB of 256 MiB, hits 12,031, misses 1",
        "  in flight    2 reads, 8 MiB; 1 queued",
        "  open         rbd/vm1 by c\np (15903), for 41.2 s",
        *["               rbd/vm1 by c\np (15903), for 41.2 s"] * 19,
        "               and 2 more: rbdfs status --json",
        "  waiting      read of rbd/vm1 at 4096, for 8.4 s",
        "               lookup, for 1 s",
        "  last errors  1970-01-01 00:00:00 read: cannot read rbd/vm1 at 0 (+4096): timed out",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0 s"), (59.9, "59.9 s"), (60, "1 min"), (3599, "59 min"), (3600, "1 h 0 min"), (90000, "1 d 1 h")],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


# Who answers, and who may ask.


@contextmanager
def answering(answer: bytes, user: int = ROOT) -> Iterator[int]:
    """A process of some user that listens where the mount's would, and answers everybody so; its pid."""
    script = (
        "import socket, sys\n"
        "listener = socket.socket(socket.AF_UNIX)\n"
        f"listener.bind({name_of(NUMBER)!r})\n"
        "listener.listen()\n"
        "print(flush=True)\n"
        "while True:\n"
        "    connection, _ = listener.accept()\n"
        f"    connection.sendall({answer!r})\n"
        "    connection.close()\n"
    )
    with subprocess.Popen(["/usr/bin/python3", "-c", script], user=user, cwd="/", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


@pytest.mark.parametrize(("user", "owner"), [(ROOT, ROOT), (ROOT, NOBODY), (NOBODY, NOBODY)])
def test_root_and_who_has_mounted_it_are_believed(user: int, owner: int) -> None:
    with answering(json.dumps(REPORT).encode(), user) as pid:
        assert _answer_of(made_up(owner)) == (pid, REPORT)


@pytest.mark.parametrize("owner", [ROOT, 1000])
def test_a_process_that_took_the_name_of_another_users_mount_is_not_believed(owner: int) -> None:
    with answering(json.dumps(REPORT).encode(), NOBODY) as pid:
        found = _ask(made_up(owner))
    assert found.report is None
    assert found.reason == f"process {pid} of user {NOBODY} answers in its place, and has not mounted it"
    assert list(_as_text(found)) == ["/mnt/x", f"  does not answer: {found.reason}"]


@pytest.mark.parametrize(
    "answer",
    [
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"version": "9"}',
        b"\xff",
        b'{"cache": 1, "in_flight": {}}',
        json.dumps(REPORT | {"errors": [{"at": 1e300, "operation": "", "message": ""}]}).encode(),
    ],
)
def test_an_answer_that_is_not_understood_is_an_error_that_says_so(answer: bytes) -> None:
    with (
        answering(answer),
        pytest.raises(MountError, match=r"process \d+ is not understood; it may run another version"),
    ):
        _answer_of(made_up(ROOT))


@pytest.mark.parametrize(("user", "who"), [(ROOT, "root"), (NOBODY, f"root and user {NOBODY}")])
def test_a_user_who_gets_no_answer_may_not_ask(user: int, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(b"", user):
        with pytest.raises(MountError, match=r"process \d+ has hung up$"):
            _answer_of(made_up(user))
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(MountError, match=rf"process \d+ answers only {who}$"):
            _answer_of(made_up(user))


def test_what_it_claims_to_be_is_not_believed() -> None:
    with answering(json.dumps(REPORT | {"mountpoint": "/mnt/y", "pid": 1, "answers": False}).encode(), NOBODY) as pid:
        found = _as_json(_ask(made_up(NOBODY)))
    assert (found["mountpoint"], found["pid"], found["answers"]) == ("/mnt/x", pid, True)


def test_a_mount_without_a_process_does_not_answer() -> None:
    assert "nobody listens" in _ask(made_up(ROOT)).reason


def test_another_user_hears_nothing(mount: Mount) -> None:
    [number] = {each.device_number for each in mountinfo() if each.path == os.fsencode(mount.path)}
    ask = (
        "import socket\n"
        "asking = socket.socket(socket.AF_UNIX)\n"
        f"asking.connect({name_of(number)!r})\n"
        "print(len(asking.recv(1000)))"
    )
    for user, hears in ((NOBODY, False), (ROOT, True)):
        command = ["/usr/bin/python3", "-c", ask]
        said = subprocess.run(
            command, user=user, cwd="/", capture_output=True, text=True, check=True, timeout=20
        ).stdout
        assert (int(said) > 0) is hears


# Real mounts.


def test_it_shows_the_open_file_and_the_process_that_has_it_open(ceph: Ceph, mount: Mount) -> None:
    name = ceph.unique("open")
    content = random_bytes(4 * MIB)
    ceph.make_image(name, content)
    assert of(mount)["open"] == []
    with mount.image(name).open("rb") as file:
        assert file.read() == content
        found = of(mount)
        text = rbdfs("status", str(mount.path)).stdout
    command = Path("/proc/self/comm").read_text().rstrip()
    [opened] = found["open"]
    assert (opened["image"], opened["pid"], opened["command"]) == (f"rbd/{name}", os.getpid(), command)
    assert 0 <= opened["seconds"] < 60
    assert found["pid"] == mount.pid
    assert found["fsid"] == ceph.rados.get_fsid()
    assert found["client"] == "client.admin"
    assert found["connected"]
    assert found["osds_answer"]
    assert found["cache"]["budget_bytes"] == 256 * MIB
    assert found["cache"]["bytes"] == 4 * MIB
    assert found["requests_waiting"] == 0
    assert 0 <= time.time() - found["started"] < 120
    assert f"  open         rbd/{name} by {command} ({os.getpid()}), for " in text
    assert "  waiting      none\n" in text
    wait_until(lambda: of(mount)["open"] == [])


def test_all_mounts_are_shown_each_once(mounts: Mounts, tmp_path: Path) -> None:
    first, second = mounts(), mounts()
    (tmp_path / "bound").mkdir()
    subprocess.run(["mount", "--bind", first.path, tmp_path / "bound"], check=True)
    try:
        paths = [found["mountpoint"] for found in shown()]
        link = tmp_path / "link"
        link.symlink_to(first.path)
        assert [each["pid"] for each in shown(tmp_path / "bound")] == [first.pid]
        assert [each["pid"] for each in shown(link)] == [first.pid]
    finally:
        subprocess.run(["umount", tmp_path / "bound"], check=True)
    assert paths.count(str(first.path)) == paths.count(str(second.path)) == 1
    assert str(tmp_path / "bound") not in paths


def test_while_no_osd_answers_it_says_at_once_what_waits(ceph: Ceph, mounts: Mounts) -> None:
    name = ceph.unique("waiting")
    ceph.make_image(name, random_bytes(4 * MIB))
    mount = mounts("--osd-timeout", "12", "--direct-io", module="tests.patient_mount")
    mount.expect("ERROR", "WARNING")
    reader = (
        "import os, sys\n"
        "file = os.open(sys.argv[1], os.O_RDONLY)\n"
        "print(flush=True)\n"
        "input()\n"
        "os.pread(file, 4096, 1 << 20)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", reader, str(mount.image(name))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        ceph.devcluster.kill_daemon("osd.0")
        try:
            process.stdin.write("\n")
            process.stdin.flush()
            wait_until(lambda: of(mount)["requests_waiting"] == 1)
            found = of(mount)

            def latest() -> dict[str, Any]:
                found.update(of(mount))
                return found

            [waiting] = found["waiting"]
            assert (waiting["operation"], waiting["image"], waiting["offset"]) == ("read", f"rbd/{name}", MIB)
            assert found["in_flight"]["reads"] == 1
            assert [opened["pid"] for opened in found["open"]] == [process.pid]
            wait_until(lambda: not latest()["osds_answer"])
            assert found["waiting"][0]["seconds"] > waiting["seconds"]
            assert " no OSD answers\n" in rbdfs("status", str(mount.path)).stdout
            wait_until(lambda: of(mount)["errors"] != [])
            text = rbdfs("status", str(mount.path)).stdout
            assert re.search(
                rf"  last errors  [\d-]+ [\d:]+ read: cannot read rbd/{name} at 1048576 \(\+4096\): ", text
            )
            assert re.search(rf"  trouble      cannot read rbd/{name} at 1048576 ", text)
        finally:
            ceph.devcluster.start_daemon("osd.0")
        process.stdin.close()
        assert process.wait(60) == 1  # TimeoutError


def test_a_mount_that_is_stopped_does_not_answer_in_time(mount: Mount) -> None:
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        [found] = shown(mount.path, exit_status=1)
        done = rbdfs("status", str(mount.path))
    finally:
        os.kill(mount.pid, signal.SIGCONT)
    assert time.monotonic() - began >= 2 * ANSWER_SECONDS
    assert found["answers"] is False
    assert found["reason"] == f"no answer within 2 s by process {mount.pid}"
    assert (done.returncode, done.stdout) == (1, f"{mount.path}\n  does not answer: {found['reason']}\n")
    assert of(mount)["answers"] is True


def test_a_mount_whose_process_was_killed_does_not_answer(mount: Mount) -> None:
    os.kill(mount.pid, signal.SIGKILL)
    wait_until(lambda: not mount.is_running)
    [found] = shown(mount.path, exit_status=1)
    assert "nobody listens: its process is gone" in found["reason"]


def test_without_a_mount_it_says_so(tmp_path: Path) -> None:
    done = rbdfs("status", str(tmp_path))
    reason = "is no rbdfs mount; rbdfs status shows all mounts of this host"
    assert (done.returncode, done.stderr) == (1, f"rbdfs: {tmp_path} {reason}\n")
    done = rbdfs("status", str(tmp_path / "missing"))
    assert (done.returncode, done.stderr) == (
        1,
        f"rbdfs: cannot look at {tmp_path}/missing: No such file or directory\n",
    )


def test_a_host_without_mounts_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(status, "mountinfo", lambda: (each for each in mountinfo() if each.type != TYPE))
    assert status.status(StatusOptions(None, as_json=False)) == 0
    assert status.status(StatusOptions(None, as_json=True)) == 0
    assert capsys.readouterr().out == "there is no rbdfs mount on this host\n[]\n"


def test_a_name_that_is_taken_costs_the_status_and_not_the_mount(mount: Mount) -> None:
    [number] = {each.device_number for each in mountinfo() if each.path == os.fsencode(mount.path)}
    clock = trio.testing.MockClock(autojump_threshold=0)
    assert trio.run(status_server.listen_for_status, number, clock=clock) is None
    assert of(mount)["pid"] == mount.pid


@with_a_clock
async def test_a_mount_that_has_ended_may_have_the_name_for_a_moment_longer() -> None:
    old = await status_server.listen_for_status(NUMBER)
    assert old is not None
    async with trio.open_nursery() as nursery:

        async def end() -> None:
            await trio.sleep(status_server.BIND_SECONDS / 2)
            old.close()

        nursery.start_soon(end)
        new = await status_server.listen_for_status(NUMBER)
    assert new is not None
    new.close()
    assert await status_server.listen_for_status(None) is None


# Who has asked.


def test_the_process_of_a_thread_is_found() -> None:
    command = Path("/proc/self/comm").read_text().rstrip()
    threads = [int(path.name) for path in Path("/proc/self/task").iterdir()]
    assert {process_of(thread) for thread in threads} == {Process(os.getpid(), command)}
    assert process_of(0) == Process(0, "")
