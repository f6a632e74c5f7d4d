"""`rbdfs export` of a real image of a real cluster: the bytes and holes of `rbd export`, whatever comes between."""

import fcntl
import hashlib
import json
import os
import pty
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import rbd

from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.cli import main
from rbdfs.commands.export import ExportOptions, export
from tests.cluster import MIB, RBDFS, READ_ONLY_CAPS, Ceph, random_bytes, rbdfs, wait_until
from tests.truth import assert_same

ALL_FEATURES = 61
HOLED = bytes(6 * MIB) + random_bytes(5 * MIB) + bytes(16 * MIB) + random_bytes(MIB, seed=2) + bytes(5 * MIB) + b"end"


def write_holed(image: rbd.Image) -> None:
    """HOLED, with its holes."""
    image.write(HOLED[6 * MIB : 11 * MIB], 6 * MIB)
    image.write(HOLED[27 * MIB : 28 * MIB], 27 * MIB)
    image.write(b"end", len(HOLED) - 3)


def make_holed(ceph: Ceph, pool: str = "rbd", order: int = 22, **options: object) -> str:
    """An image that holds HOLED. Its name."""
    name = ceph.unique("export")
    options = {"features": ALL_FEATURES} | options
    with ceph.ioctx(pool) as ioctx:
        rbd.RBD().create(ioctx, name, len(HOLED), order=order, old_format=False, **options)
        with rbd.Image(ioctx, name) as image:
            write_holed(image)
    return name


def snapshot(ceph: Ceph, name: str) -> str:
    """Make one, write on, and its spec."""
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
        image.create_snap("s")
        image.write(b"written after the snapshot", 7 * MIB)
    return f"rbd/{name}@s"


def options(ceph: Ceph, spec: str, path: Path | None, **others: object) -> ExportOptions:
    """As the command line builds them."""
    return ExportOptions(ClusterOptions(conf=ceph.conf), spec, path, progress=False, **others)  # type: ignore[arg-type]


def rbd_export(ceph: Ceph, spec: str, path: Path) -> Path:
    """The independent copy."""
    ceph.run("rbd", "export", "--no-progress", spec, str(path))
    return path


def kinds(ceph: Ceph) -> Iterator[str]:
    """Images of all kinds, as specs."""
    yield f"rbd/{make_holed(ceph)}"
    yield f"rbd/{make_holed(ceph, features=1)}"
    yield f"rbd/{make_holed(ceph, order=16)}"
    yield f"rbd/{make_holed(ceph, order=25)}"
    yield f"rbd/{make_holed(ceph, order=20, stripe_unit=1 << 16, stripe_count=3)}"
    parent = make_holed(ceph)
    yield snapshot(ceph, parent)
    child = ceph.unique("clone")
    with ceph.ioctx() as ioctx:
        with rbd.Image(ioctx, parent) as image:
            image.protect_snap("s")
        rbd.RBD().clone(ioctx, parent, "s", ioctx, child, features=ALL_FEATURES)
        with rbd.Image(ioctx, child) as image:
            image.write(b"the clone's own", 20 * MIB)
            image.write(b"over its parent's", 8 * MIB)
    yield f"rbd/{child}"
    yield snapshot(ceph, child)
    yield f"rbd/{make_holed(ceph, features=ALL_FEATURES | rbd.RBD_FEATURE_JOURNALING)}"
    old, size = ceph.unique("format1"), f"{len(HOLED)}B"
    allow = ("env", "RBD_FORCE_ALLOW_V1=1")
    ceph.run(*allow, "rbd", "create", "--image-format", "1", "--size", size, f"rbd/{old}")
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, old) as image:
        write_holed(image)
    yield snapshot(ceph, old)
    yield f"rbd/{old}"
    pool = ceph.unique("datapool")
    ceph.make_pool(pool)
    yield f"rbd/{make_holed(ceph, data_pool=pool)}"
    with ceph.ioctx() as ioctx:
        rbd.RBD().namespace_create(ioctx, pool)
        ioctx.set_namespace(pool)
        rbd.RBD().create(ioctx, "vm1", len(HOLED), old_format=False)
        with rbd.Image(ioctx, "vm1") as image:
            write_holed(image)
    yield f"rbd/{pool}/vm1"
    empty = ceph.unique("empty")
    ceph.make_image(empty, b"")
    yield f"rbd/{empty}"
    source, moved = make_holed(ceph), ceph.unique("moved")
    ceph.run("rbd", "migration", "prepare", f"rbd/{source}", f"rbd/{moved}")
    yield f"rbd/{moved}"
    ceph.run("rbd", "migration", "abort", "--no-progress", f"rbd/{moved}")


def test_bytes_and_allocation_are_those_of_rbd_export_for_every_kind_of_image(ceph: Ceph, tmp_path: Path) -> None:
    for number, spec in enumerate(kinds(ceph)):
        theirs = rbd_export(ceph, spec, tmp_path / f"theirs{number}")
        ours = tmp_path / f"ours{number}"
        assert export(options(ceph, spec, ours)) == 0
        assert ours.read_bytes() == theirs.read_bytes(), spec
        assert ours.stat().st_blocks <= theirs.stat().st_blocks, spec
        theirs.unlink()
        ours.unlink()


def test_a_pipe_and_a_redirected_file_get_the_bytes_in_order_and_the_digest_is_of_all_of_them(
    ceph: Ceph, tmp_path: Path
) -> None:
    spec = snapshot(ceph, make_holed(ceph))
    command = (*RBDFS, "export", "--conf", str(ceph.conf), "--checksum", "sha256", "--no-progress", spec)
    piped = subprocess.run((*command, "-"), capture_output=True, check=True, timeout=60)
    assert piped.stdout == HOLED
    said = f"{hashlib.sha256(HOLED).hexdigest()}  "
    assert piped.stderr.decode() == f"{said}-\n"
    with (tmp_path / "redirected").open("wb") as file:
        file.write(b"before")
        file.flush()
        subprocess.run((*command, "-"), stdout=file, check=True, timeout=60, capture_output=False)
    assert (tmp_path / "redirected").read_bytes() == b"before" + HOLED
    assert (tmp_path / "redirected").stat().st_blocks * 512 <= 14 * MIB
    whole = subprocess.run((*command, str(tmp_path / "file")), capture_output=True, check=True, timeout=60, text=True)
    assert whole.stdout == f"{said}{tmp_path / 'file'}\n"
    assert whole.stderr == ""


def unread(pipe: int) -> int:
    """Bytes that wait in a pipe."""
    return int(struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0])


def test_a_slow_reader_of_a_pipe_gets_everything(ceph: Ceph) -> None:
    name = make_holed(ceph)
    with subprocess.Popen(
        (*RBDFS, "export", "--conf", str(ceph.conf), "--no-progress", f"rbd/{name}", "-"), stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        got = bytearray()
        pipe = process.stdout.fileno()
        wait_until(lambda: unread(pipe) == fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ))
        while piece := process.stdout.read(50_001):
            got += piece
        assert process.wait(20) == 0
    assert got == HOLED


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_an_export_that_a_signal_ends_is_resumed(
    ceph: Ceph, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    spec, path = snapshot(ceph, make_holed(ceph)), tmp_path / "copy"
    partial = tmp_path / "copy.partial"
    command = [*RBDFS, "export", "--conf", str(ceph.conf), spec, str(path)]
    with subprocess.Popen([*command, "--limit-rate", "4M"], stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: partial.exists() and partial.stat().st_blocks > 0)
        process.send_signal(number)
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(20) == status
    if number != signal.SIGKILL:
        assert said.count("\n") == 1
        assert f"stopped by {number.name}" in said
        assert "ended at offset" in said
        assert "--resume continues" in said
    assert not path.exists()
    again = rbdfs("export", spec, str(path), conf=ceph.conf)
    assert again.returncode == 1
    assert "--resume" in again.stderr
    assert export(options(ceph, spec, path, resume=True)) == 0
    assert path.read_bytes() == HOLED
    assert os.listdir(tmp_path) == ["copy"]


def test_of_a_head_nothing_is_kept_that_could_be_taken_for_a_copy(ceph: Ceph, tmp_path: Path) -> None:
    name = make_holed(ceph)
    command = [*RBDFS, "export", "--conf", str(ceph.conf), f"rbd/{name}", str(tmp_path / "copy")]
    with subprocess.Popen([*command, "--limit-rate", "4M"], stderr=subprocess.PIPE, text=True) as process:
        wait_until((tmp_path / "copy.partial").exists)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # as from an impatient user
        assert process.wait(20) == 143
    assert not os.listdir(tmp_path)
    resumed = rbdfs("export", "--resume", f"rbd/{name}", str(tmp_path / "copy"), conf=ceph.conf)
    assert resumed.returncode == 2
    assert "of a snapshot only" in resumed.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk_is_one_line_and_the_export_goes_on_when_there_is_room(ceph: Ceph, tmp_path: Path) -> None:
    spec = snapshot(ceph, make_holed(ceph))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], check=True)
    try:
        full = rbdfs("export", "--no-progress", spec, str(tmp_path / "copy"), conf=ceph.conf)
        assert full.returncode == 1
        assert full.stderr.count("\n") == 1
        assert "No space left on device" in full.stderr
        assert "offset" in full.stderr
        assert not (tmp_path / "copy").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", tmp_path], check=True)
        assert export(options(ceph, spec, tmp_path / "copy", resume=True)) == 0
        assert (tmp_path / "copy").read_bytes() == HOLED
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_fifty_exports_leak_nothing(ceph: Ceph, tmp_path: Path) -> None:
    name = ceph.unique("small")
    ceph.make_image(name, random_bytes(3 * MIB))

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def once() -> None:
        assert export(options(ceph, f"rbd/{name}", tmp_path / "copy", checksum="sha256")) == 0
        (tmp_path / "copy").unlink()

    for _ in range(5):
        once()
    before, memory = held(), resident()
    for _ in range(45):
        once()
    after = held()
    assert after[0] <= before[0]
    assert after[1] <= before[1] + 2  # trio's idle worker threads come and go
    assert resident() - memory < 20 * MIB
    assert ceph.watchers(name) == []


def lockers(ceph: Ceph, name: str) -> list[dict[str, str]]:
    """Who holds an image's lock."""
    found: list[dict[str, str]] = json.loads(ceph.run("rbd", "lock", "ls", f"rbd/{name}", "--format", "json"))
    return found


def test_a_head_that_others_write_to_is_copied_with_one_warning(ceph: Ceph, tmp_path: Path) -> None:
    name = make_holed(ceph)
    quiet = rbdfs("export", "--no-progress", f"rbd/{name}", str(tmp_path / "quiet"), conf=ceph.conf)
    assert (quiet.returncode, quiet.stderr) == (0, "")
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as writer:
        writer.write(b"x", 0)
        writer.flush()
        before = lockers(ceph, name)
        warned = rbdfs("export", "--no-progress", f"rbd/{name}", str(tmp_path / "copy"), conf=ceph.conf)
        assert lockers(ceph, name) == before != []
    assert warned.returncode == 0
    assert warned.stderr.count("\n") == 1
    assert f"rbd snap create rbd/{name}@NAME" in warned.stderr


def test_a_key_that_may_only_read_exports_too(ceph: Ceph, tmp_path: Path) -> None:
    name = make_holed(ceph)
    done = rbdfs("export", *ceph.credentials(READ_ONLY_CAPS), f"rbd/{name}", str(tmp_path / "copy"), conf=ceph.conf)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy").read_bytes() == HOLED


def test_each_error_is_one_line_and_leaves_nothing_behind(
    ceph: Ceph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, target = make_holed(ceph), tmp_path / "copy"
    (tmp_path / "there").write_text("there")
    no_rights = ("--connect-timeout", "5", *ceph.credentials(("mon", "profile rbd")))
    for arguments, status, sentence in (
        (("nope/vm1", target), 1, "there is no pool nope"),
        (("rbd/nope/vm1", target), 1, "nope"),
        (("rbd/nope", target), 1, "there is no image nope in rbd"),
        ((f"rbd/{name}@nope", target), 1, f"rbd/{name} has no snapshot nope"),
        ((*no_rights, f"rbd/{name}", target), 1, "osd 'profile rbd"),
        ((f"rbd/{name}", tmp_path / "there"), 1, "exists, and is not overwritten"),
        ((f"rbd/{name}", tmp_path / "no" / "copy"), 1, "there is no directory"),
        ((f"rbd/{name}@", target), 2, "is no image"),
        (("--resume", f"rbd/{name}@s", "-"), 2, "--resume"),
    ):
        assert main(["export", "--conf", str(ceph.conf), *map(str, arguments)]) == status
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1
        assert said.startswith("rbdfs: ")
    assert os.listdir(tmp_path) == ["there"]
    gone = subprocess.run(  # noqa: S602  (the reader of a pipe is what this is about)
        f"{' '.join(RBDFS)} export --conf {ceph.conf} --no-progress rbd/{name} - | head -c 1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert gone.returncode == 1
    assert gone.stderr.count("\n") == 1
    assert "Broken pipe" in gone.stderr


def test_force_writes_into_what_is_there(ceph: Ceph, tmp_path: Path) -> None:
    name, there = make_holed(ceph), tmp_path / "there"
    there.write_bytes(b"x" * (len(HOLED) + MIB))
    assert export(options(ceph, f"rbd/{name}", there, force=True)) == 0
    assert there.read_bytes() == HOLED
    assert export(options(ceph, f"rbd/{name}", tmp_path / "new", force=True)) == 0
    assert (tmp_path / "new").read_bytes() == HOLED
    assert export(options(ceph, f"rbd/{name}", Path("/dev/null"), force=True)) == 0


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/loop-control").exists(), reason="needs a loop device")
def test_a_block_device_gets_every_byte_zeros_included(ceph: Ceph, tmp_path: Path) -> None:
    name, backing = make_holed(ceph), tmp_path / "backing"
    backing.write_bytes(b"x" * (34 * MIB))
    device = subprocess.run(
        ["losetup", "--find", "--show", backing], check=True, capture_output=True, text=True
    ).stdout.strip()
    try:
        refused = rbdfs("export", f"rbd/{name}", device, conf=ceph.conf)
        assert "--force" in refused.stderr
        assert export(options(ceph, f"rbd/{name}", Path(device), force=True)) == 0
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert backing.read_bytes() == HOLED + b"x" * (34 * MIB - len(HOLED))


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/loop-control").exists(), reason="needs a loop device")
def test_a_block_device_that_is_mounted_is_refused_in_one_line_and_left_as_it_is(ceph: Ceph, tmp_path: Path) -> None:
    name, backing, mountpoint = make_holed(ceph), tmp_path / "backing", tmp_path / "mnt"
    mountpoint.mkdir()
    backing.write_bytes(bytes(48 * MIB))
    losetup = ["losetup", "--find", "--show", str(backing)]
    device = subprocess.run(losetup, check=True, capture_output=True, text=True).stdout.strip()
    try:
        # Else the kernel goes on with that when it is mounted.
        subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device], check=True)
        subprocess.run(["mount", device, mountpoint], check=True)
        (mountpoint / "file").write_text("of the file system")
        os.sync()
        before = Path(device).read_bytes()
        refused = rbdfs("export", "--force", f"rbd/{name}", device, conf=ceph.conf)
        assert_same(Path(device).read_bytes(), before)
        assert refused.returncode == 1
        assert (
            refused.stderr
            == f"rbdfs: cannot open {device}: it is in use, mounted or part of another device (see lsblk)\n"
        )
        subprocess.run(["umount", mountpoint], check=True)
        assert export(options(ceph, f"rbd/{name}", Path(device), force=True)) == 0
        assert Path(device).read_bytes()[: len(HOLED)] == HOLED
    finally:
        subprocess.run(["umount", "-q", mountpoint], check=False)
        subprocess.run(["losetup", "--detach", device], check=True)


def test_progress_is_a_bar_on_a_terminal_and_a_line_elsewhere(ceph: Ceph, tmp_path: Path) -> None:
    name = make_holed(ceph)
    command = [*RBDFS, "export", "--conf", str(ceph.conf), f"rbd/{name}", "--limit-rate", "30M"]
    lines = subprocess.run([*command, str(tmp_path / "a")], capture_output=True, text=True, check=True, timeout=60)
    assert lines.stderr.count("\n") == 1
    assert f"copied rbd/{name}, 33 MiB: 13 MiB of data" in lines.stderr
    terminal, slave = pty.openpty()
    with subprocess.Popen([*command, str(tmp_path / "b")], stderr=slave) as process:
        os.close(slave)
        shown = b""
        with suppress(OSError):  # EIO: the other end is closed
            while piece := os.read(terminal, 4096):
                shown += piece
        assert process.wait(20) == 0
    os.close(terminal)
    assert b"100%" in shown
    assert b"13.0M/13.0M" in shown
