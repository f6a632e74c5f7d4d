"""`rbdfs verify`: finds every byte in which a file or device differs from an image, and writes nothing."""

import fcntl
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import rbd
from hypothesis import given
from hypothesis import strategies as st

from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.commands.export import export
from rbdfs.commands.verify import VerifyOptions, verify
from rbdfs.errors import TargetError
from rbdfs.export.compared_file import ComparedFile
from rbdfs.export.forced_file import ForcedFile
from rbdfs.export.ranges import FoundRanges
from rbdfs.export.updated_file import UpdatedFile
from tests.cluster import MIB, RBDFS, READ_ONLY_CAPS, Ceph, random_bytes, rbdfs, wait_until
from tests.commands.test_export import HOLED, kinds, make_holed, options, rbd_export, snapshot
from tests.commands.test_update import Interrupted, update


def verified(ceph: Ceph, spec: str, path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The answer, as a script reads it, and the exit status."""
    capsys.readouterr()
    status = verify(VerifyOptions(ClusterOptions(conf=ceph.conf), spec, path, progress=False, as_json=True))
    found = json.loads(capsys.readouterr().out)
    found["ranges"] = [(each["offset"], each["length"]) for each in found["ranges"]]
    assert found["differing_bytes"] == sum(length for _, length in found["ranges"])
    assert status == (0 if found["same"] else 1)
    return found


def changed(path: Path, offset: int, data: bytes = b"\xa5") -> None:
    """Write into a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_copy_by_rbd_export_is_the_same_for_every_kind_of_image_and_a_changed_byte_is_found(
    ceph: Ceph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, spec in enumerate(kinds(ceph)):
        path = rbd_export(ceph, spec, tmp_path / f"copy{number}")
        assert verified(ceph, spec, path, capsys)["same"], spec
        size = path.stat().st_size
        if size:
            for offset in (0, 7 * MIB + 1234, size - 1):
                before = path.read_bytes()[offset : offset + 1]
                changed(path, offset, bytes([before[0] ^ 1]))
                sector = offset - offset % 512
                found = verified(ceph, spec, path, capsys)
                assert found["ranges"] == [(sector, min(512, size - sector))], (spec, offset)
                changed(path, offset, before)
            assert verified(ceph, spec, path, capsys)["same"], spec
        path.unlink()


def test_what_is_data_in_the_file_and_a_hole_in_the_image_is_found_and_so_is_the_reverse(
    ceph: Ceph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = make_holed(ceph)
    path = rbd_export(ceph, f"rbd/{name}", tmp_path / "copy")
    changed(path, 13 * MIB, bytes(3 * MIB))  # zeros that take room are no difference
    assert verified(ceph, f"rbd/{name}", path, capsys)["same"]
    changed(path, 15 * MIB + 700, b"x" * 600)
    changed(path, 8 * MIB, bytes(MIB))
    found = verified(ceph, f"rbd/{name}", path, capsys)
    assert found["ranges"] == [(8 * MIB, MIB), (15 * MIB + 512, 1024)]
    path.write_bytes(b"")
    os.truncate(path, len(HOLED))
    found = verified(ceph, f"rbd/{name}", path, capsys)
    assert found["ranges"] == [(6 * MIB, 5 * MIB), (27 * MIB, MIB), (33 * MIB, 3)]


def test_a_file_must_have_the_size_of_the_image(ceph: Ceph, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = make_holed(ceph)
    path = rbd_export(ceph, f"rbd/{name}", tmp_path / "copy")
    os.truncate(path, len(HOLED) + 5)
    found = verified(ceph, f"rbd/{name}", path, capsys)
    assert (found["path_size"], found["size"]) == (len(HOLED) + 5, len(HOLED))
    assert found["ranges"] == [(len(HOLED), 5)]
    os.truncate(path, 10 * MIB)
    assert verified(ceph, f"rbd/{name}", path, capsys)["ranges"] == [(10 * MIB, len(HOLED) - 10 * MIB)]
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
        image.resize(10 * MIB)
    assert verified(ceph, f"rbd/{name}", path, capsys)["same"]
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
        image.resize(20 * MIB)
    os.truncate(path, 20 * MIB)
    assert verified(ceph, f"rbd/{name}", path, capsys)["same"]
    empty = ceph.unique("empty")
    ceph.make_image(empty, b"")
    (tmp_path / "empty").touch()
    assert verified(ceph, f"rbd/{empty}", tmp_path / "empty", capsys)["same"]


def test_words_and_exit_status_tell_same_different_and_failed_apart(ceph: Ceph, tmp_path: Path) -> None:
    name = make_holed(ceph)
    path = rbd_export(ceph, f"rbd/{name}", tmp_path / "copy")
    key = ceph.credentials(READ_ONLY_CAPS)

    def said(*arguments: object) -> tuple[int, str, str]:
        done = rbdfs("verify", *key, *map(str, arguments), conf=ceph.conf)
        return done.returncode, done.stdout, done.stderr

    assert said(f"rbd/{name}", path) == (0, f"{path} is the same as rbd/{name}, 33 MiB\n", "")
    for offset in range(6 * MIB, 6 * MIB + 150 * 1024, 1024):
        changed(path, offset)
    status, out, err = said(f"rbd/{name}", path)
    first, second, *_, left_out, last = out.splitlines()
    assert (status, err, out.count("\n")) == (1, "", 103)
    assert (first.split(), second.split()) == (["OFFSET", "LENGTH"], [str(6 * MIB), "512"])
    assert left_out == "and 50 more ranges: --json has them"
    assert last == f"{path} differs from rbd/{name}: {150 * 512} bytes, in sectors of 512 bytes"
    os.mkfifo(tmp_path / "pipe")
    for image, other, sentence in (
        ("rbd/nope", path, "there is no image nope in rbd; 'rbd ls rbd' lists them"),
        (f"rbd/{name}", tmp_path / "nope", f"cannot open {tmp_path}/nope: No such file or directory"),
        (f"rbd/{name}", tmp_path / "pipe", f"{tmp_path}/pipe is neither a file nor a block device"),
        (f"rbd/{name}", tmp_path, f"{tmp_path} is neither a file nor a block device"),
    ):
        assert said(image, other) == (1, "", f"rbdfs: {sentence}\n")
    assert said(f"rbd/{name}@", path)[0] == 2
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert said(f"rbd/{name}", path) == (1, "", f"rbdfs: an export writes to {path} now\n")


def test_of_a_head_that_others_write_to_it_warns(ceph: Ceph, tmp_path: Path) -> None:
    name = make_holed(ceph)
    path = rbd_export(ceph, f"rbd/{name}", tmp_path / "copy")
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as writer:
        writer.write(HOLED[6 * MIB : 6 * MIB + 1], 6 * MIB)
        done = rbdfs("verify", f"rbd/{name}", str(path), conf=ceph.conf)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert f"verify rbd/{name}@NAME" in done.stderr


def test_a_mixture_is_never_whole_and_a_copy_of_another_snapshot_is_recognized(
    ceph: Ceph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, path = make_holed(ceph), tmp_path / "copy"
    old = snapshot(ceph, name)
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
        image.write(random_bytes(MIB, seed=9), 20 * MIB)
        image.create_snap("t")
    new = f"rbd/{name}@t"
    assert update(ceph, old, path) == 0
    content = path.read_bytes()
    assert verified(ceph, old, path, capsys)["same"]
    verify(VerifyOptions(ClusterOptions(conf=ceph.conf), new, path, progress=False))
    said = capsys.readouterr()
    assert f"{path} says that it is a copy of rbd/{name}@s (snapshot " in said.err
    assert said.err.count("\n") == 1
    assert "differs from" in said.out

    interrupted = Interrupted(monkeypatch)
    interrupted.after(0)
    assert update(ceph, new, path) == 1
    capsys.readouterr()
    assert path.read_bytes() == content  # nothing was written, but it says that something may have been
    assert verify(VerifyOptions(ClusterOptions(conf=ceph.conf), old, path, progress=False)) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert f"{path} is not whole, but between rbd/{name}@s (snapshot " in said.err
    assert f"'rbdfs export --update {new} {path}' continues it" in said.err
    assert said.out == f"all bytes are those of {old} (33 MiB), but {path} is not known to be whole\n"
    found = verified(ceph, old, path, capsys)
    assert (found["is_mixture"], found["ranges"]) == (True, [])
    interrupted.after(-1)
    assert update(ceph, new, path) == 0
    assert verified(ceph, new, path, capsys)["same"]
    assert path.read_bytes() == ceph.exported(f"{name}@t")

    changed(path, 0)  # what it says of itself is not believed any more, but its bytes are
    changed(path, 0, b"\0")
    done = rbdfs("verify", new, str(path), conf=ceph.conf)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert "was written to since rbdfs made it" in done.stderr


@contextmanager
def loop_device(backing: Path) -> Iterator[Path]:
    command = ["losetup", "--find", "--show", str(backing)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/loop-control").exists(), reason="needs a loop device")
def test_a_device_may_be_larger_than_the_image_but_not_smaller(
    ceph: Ceph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, backing = make_holed(ceph), tmp_path / "backing"
    backing.write_bytes(HOLED + b"x" * (40 * MIB - len(HOLED)))
    with loop_device(backing) as device:
        assert verified(ceph, f"rbd/{name}", device, capsys)["same"]
    changed(backing, 12 * MIB + 5)  # in a hole of the image
    changed(backing, len(HOLED) - 1)
    with loop_device(backing) as device:
        end = len(HOLED) - len(HOLED) % 512
        assert verified(ceph, f"rbd/{name}", device, capsys)["ranges"] == [(12 * MIB, 512), (end, len(HOLED) - end)]
    backing.write_bytes(HOLED[: 16 * MIB])
    with loop_device(backing) as device:
        assert verified(ceph, f"rbd/{name}", device, capsys)["ranges"] == [(16 * MIB, len(HOLED) - 16 * MIB)]


def test_no_verdict_is_given_on_an_image_or_snapshot_that_is_removed_during_the_comparison(
    ceph: Ceph, tmp_path: Path
) -> None:
    name = make_holed(ceph)
    spec = snapshot(ceph, name)
    path = rbd_export(ceph, spec, tmp_path / "copy")
    command = [*RBDFS, "verify", "--conf", str(ceph.conf), "--limit-rate", "1M", "--concurrency", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, spec, str(path)], **pipes) as process:  # type: ignore[call-overload]
        wait_until_locked(path, process.pid)
        with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
            image.remove_snap("s")
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.count("\n") == 1
    assert "was removed" in err
    assert "was compared to offset" in err


def wait_until_locked(path: Path, pid: int) -> None:
    """Until a process reads it, which then has it locked. To try a lock would keep that process from it."""
    process = Path(f"/proc/{pid}")

    def is_locked() -> bool:
        for descriptor in (process / "fd").iterdir():
            with suppress(FileNotFoundError):
                if descriptor.readlink() == path:
                    return "FLOCK" in (process / "fdinfo" / descriptor.name).read_text()
        return False

    wait_until(is_locked)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_one_line(ceph: Ceph, tmp_path: Path, number: signal.Signals) -> None:
    name = make_holed(ceph)
    path = rbd_export(ceph, f"rbd/{name}", tmp_path / "copy")
    command = [*RBDFS, "verify", "--conf", str(ceph.conf), "--limit-rate", "1M", f"rbd/{name}", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until_locked(path, process.pid)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err.count("\n")) == (128 + number, "", 1)
    assert f"stopped by {number.name}" in err


def test_while_it_is_compared_no_update_writes_to_it_and_it_is_opened_for_reading_only(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    compared = ComparedFile(path, 1)
    try:
        opened = [fd for fd in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{fd}") == str(path)]
        (descriptor,) = map(int, opened)
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        with pytest.raises(TargetError, match="another export or verify uses"):
            UpdatedFile(path)
        with pytest.raises(TargetError, match="another export or verify uses"):
            ForcedFile(path, 1, 1)
        ComparedFile(path, 1).close()  # but others may compare
    finally:
        compared.close()


def test_an_export_of_ours_is_the_same_without_a_word(
    ceph: Ceph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, path = make_holed(ceph, order=20, stripe_unit=1 << 16, stripe_count=3), tmp_path / "copy"
    assert export(options(ceph, f"rbd/{name}", path)) == 0
    assert verify(VerifyOptions(ClusterOptions(conf=ceph.conf), f"rbd/{name}", path, progress=False)) == 0
    assert capsys.readouterr().err == ""


@given(st.permutations(range(40)), st.sets(st.integers(0, 39)))
def test_ranges_found_in_any_order_are_joined_where_they_touch(order: list[int], absent: set[int]) -> None:
    found = FoundRanges()
    present = [number for number in order if number not in absent]
    for number in present:
        found.add(number * 10, number * 10 + 10)
    ranges = found.in_order()
    covered = {at for start, end in ranges for at in range(start, end)}
    assert covered == {at for number in present for at in range(number * 10, number * 10 + 10)}
    assert all(end < start for (_, end), (start, _) in pairwise(ranges))
    assert found.total_bytes == len(covered)
