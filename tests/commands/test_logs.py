"""Where a mount logs to, with which levels and fields, and what a rotated log file does to it."""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest

from rbdfs.commands import logs
from rbdfs.commands.logs import journal_fields, priority
from rbdfs.errors import NOTICE
from rbdfs.spec import ImageSpec
from tests.cluster import CHECKOUT, Ceph, Mount, wait_until

WITHOUT_THE_PACKAGE = "import sys\nsys.modules['systemd'] = None\n"

SERVICE = r"""
set -euo pipefail
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/journal
mount --bind "$1" /run/systemd/journal
shift
"$@"
"""
"""Runs a command with a journal of our own."""

USE = r"""
set -euo pipefail
python=$1 folder=$2 image=$3
trap 'umount -l "$folder"' EXIT
"$python" -m rbdfs mount -v "$folder"
! cat "$folder/rbd/$image"
"""
"""Mounts, has the open() of a broken image fail, and unmounts."""


@pytest.fixture
def broken(ceph: Ceph) -> str:
    """An image that cannot be opened."""
    name = ceph.unique("broken")
    ceph.make_image(name, b"content")
    with ceph.ioctx() as ioctx:
        id_ = bytes(ioctx.read(f"rbd_id.{name}"))[4:].decode()
        ioctx.remove_object(f"rbd_header.{id_}")
    return name


def environment(ceph: Ceph, *path: Path, **more: str) -> dict[str, str]:
    """What a mount is started with."""
    python_path = os.pathsep.join(map(str, (*path, CHECKOUT)))
    return os.environ | {"CEPH_CONF": str(ceph.conf), "PYTHONPATH": python_path} | more


# A file.


def test_after_a_rotation_the_log_goes_on_in_a_new_file(mount: Mount, broken: str) -> None:
    mount.expect("ERROR")
    assert "mounted on" in mount.log
    rotated = mount.log_file.with_suffix(".1")
    mount.log_file.rename(rotated)
    assert subprocess.run(["cat", mount.image(broken)], capture_output=True, check=False).returncode
    assert f"cannot open rbd/{broken}" in mount.log
    assert f"cannot open rbd/{broken}" not in rotated.read_text()


def test_a_log_file_whose_folder_is_gone_does_not_end_the_mount(ceph: Ceph, mount: Mount, broken: str) -> None:
    mount.expect("ERROR")
    fine = ceph.unique("fine")
    ceph.make_image(fine, b"content")
    folder = mount.log_file.parent
    away = folder.with_name(f"{folder.name}-away")
    folder.rename(away)
    mounted = away / "mnt"
    try:
        assert subprocess.run(["cat", mounted / "rbd" / broken], capture_output=True, check=False).returncode
        assert (mounted / "rbd" / fine).read_bytes() == b"content"
    finally:
        away.rename(folder)
    subprocess.run(["umount", mount.path], check=True)
    wait_until(lambda: not mount.is_running)
    assert "cannot open" not in mount.log  # that line had no place


# The journal.


@contextmanager
def journal(folder: Path) -> Iterator[list[dict[str, str]]]:
    """A socket as journald has it. What was sent to it, at the end of the block."""
    folder.mkdir()
    received: list[dict[str, str]] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(folder / "socket"))
        yield received
        receiver.setblocking(False)
        try:
            while True:
                lines = receiver.recv(1 << 20).decode().splitlines()
                received.append(dict(line.split("=", 1) for line in lines if "=" in line))
        except BlockingIOError:
            pass


def test_in_the_background_the_journal_has_levels_and_the_image(ceph: Ceph, tmp_path: Path, broken: str) -> None:
    (tmp_path / "mnt").mkdir()
    with journal(tmp_path / "journal") as received:
        use = ["bash", "-c", USE, "bash", sys.executable, str(tmp_path / "mnt"), broken]
        service = ["unshare", "--mount", "bash", "-c", SERVICE, "bash", str(tmp_path / "journal"), *use]
        subprocess.run(service, env=environment(ceph), check=True, capture_output=True, timeout=60)
    assert {each["SYSLOG_IDENTIFIER"] for each in received} == {"rbdfs"}
    [mounted] = [each for each in received if each["MESSAGE"].startswith("mounted on ")]
    assert (mounted["PRIORITY"], mounted["LOGGER"]) == ("6", "rbdfs.fuse.session")
    assert "RBDFS_IMAGE" not in mounted
    [failed] = [each for each in received if each["MESSAGE"].startswith(f"cannot open rbd/{broken}: ")]
    assert (failed["PRIORITY"], failed["RBDFS_IMAGE"], failed["RBDFS_POOL"]) == ("3", f"rbd/{broken}", "rbd")


def test_in_the_foreground_lines_have_levels_if_stderr_is_the_journal(ceph: Ceph, tmp_path: Path, broken: str) -> None:
    said = served_in_the_foreground(ceph, tmp_path, broken, is_journal=True)
    assert f"<6>mounted on {tmp_path / 'mnt'}" in said
    assert any(line.startswith(f"<3>cannot open rbd/{broken}: ") for line in said)
    assert all(line.startswith("<") for line in said)


def test_in_the_foreground_a_terminal_has_the_time_and_the_names_of_levels(
    ceph: Ceph, tmp_path: Path, broken: str
) -> None:
    said = served_in_the_foreground(ceph, tmp_path, broken, is_journal=False)
    assert any(line.endswith(f"INFO rbdfs.fuse.session: mounted on {tmp_path / 'mnt'}") for line in said)
    assert any(f"ERROR rbdfs.fuse.trouble_log: cannot open rbd/{broken}: " in line for line in said)


def served_in_the_foreground(ceph: Ceph, folder: Path, broken: str, *, is_journal: bool) -> list[str]:
    """The lines on stderr of a mount in which an open() failed; without python3-systemd."""
    (folder / "sitecustomize.py").write_text(WITHOUT_THE_PACKAGE)
    (folder / "mnt").mkdir()
    read, write = os.pipe()
    status = os.fstat(write)
    stream = f"{status.st_dev}:{status.st_ino if is_journal else 0}"
    command = [sys.executable, "-m", "rbdfs", "mount", "-f", "-v", str(folder / "mnt")]
    with subprocess.Popen(command, env=environment(ceph, folder, JOURNAL_STREAM=stream), stderr=write) as process:
        os.close(write)
        try:
            wait_until(lambda: (folder / "mnt" / "rbd").is_dir())
            assert subprocess.run(["cat", folder / "mnt" / "rbd" / broken], stderr=PIPE, check=False).returncode
            process.terminate()
            with os.fdopen(read) as lines:
                return lines.read().splitlines()
        finally:
            process.kill()
            subprocess.run(["umount", "-l", "-q", folder / "mnt"], check=False)


def test_why_it_cannot_start_is_an_error_in_the_journal_as_well(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w+") as stderr:
        status = os.fstat(stderr.fileno())
        stream = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}", "PYTHONPATH": str(CHECKOUT)}
        command = [sys.executable, "-m", "rbdfs", "mount", "-f", str(tmp_path / "missing")]
        assert subprocess.run(command, env=os.environ | stream, stderr=stderr, check=False).returncode == 1
        stderr.seek(0)
        assert stderr.read().startswith(f"<3>rbdfs: {tmp_path}/missing does not exist; make it with: ")


@pytest.mark.parametrize(
    ("record", "image"),
    [
        ({"image": ImageSpec("rbd", "vm1", "team", "monday")}, "rbd/team/vm1@monday"),
        ({"image": None, "args": (1, ImageSpec("rbd", "vm1"))}, "rbd/vm1"),
        ({"args": (ImageSpec("rbd", "vm\udcff"),)}, "rbd/vm\\udcff"),
        ({"args": {"name": "value"}}, None),
        ({}, None),
    ],
)
def test_the_journal_has_the_image_that_a_record_is_about(record: dict[str, object], image: str | None) -> None:
    fields = journal_fields({"LOGGER": "rbdfs", "levelno": NOTICE, "msg": "text", **record})
    assert fields.get("RBDFS_IMAGE") == image
    assert fields.get("RBDFS_POOL") == (image and "rbd")
    assert set(fields) - {"RBDFS_IMAGE", "RBDFS_POOL"} == {"LOGGER", "PRIORITY"}
    assert fields["PRIORITY"] == 5


def test_each_level_has_its_priority() -> None:
    levels = (logging.CRITICAL, logging.ERROR, logging.WARNING, NOTICE, logging.INFO, logging.DEBUG)
    assert [priority(level) for level in levels] == [2, 3, 4, 5, 6, 7]


# Syslog.


def test_syslog_has_levels_and_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "SYSLOG", tmp_path / "log")
    monkeypatch.setattr(logs, "JOURNAL", tmp_path / "none")
    monkeypatch.setattr(logging, "basicConfig", lambda **options: made.append(options["handlers"][0]))
    made: list[logging.Handler] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "log"))
        logs.log_to(None, logging.INFO, foreground=False)
        [handler] = made
        for level in (logging.ERROR, NOTICE):
            handler.handle(logging.LogRecord("rbdfs", level, "", 0, "rbd/%s", ("vm\udcff",), None))
        daemon = 3 << 3
        text = f"rbdfs[{os.getpid()}]: rbd/vm\\udcff\0"
        assert [receiver.recv(1000).decode() for _ in range(2)] == [f"<{daemon + 3}>{text}", f"<{daemon + 5}>{text}"]
        handler.close()
