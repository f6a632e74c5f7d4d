"""`rbdfs export --update`: after any history, however interrupted, the file is what `rbd export` makes of it."""

import hashlib
import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import rbd

from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.commands.export import ExportOptions, export
from rbdfs.commands.update import LATE_WRITES_SECONDS
from rbdfs.errors import TargetError
from rbdfs.export.file import LEAST_ZEROS, FileTarget
from rbdfs.export.ranges import GRAIN
from tests.cluster import MIB, RBDFS, Ceph, random_bytes, rbdfs, wait_until
from tests.histories import KINDS, History

SEED = 20_261_127
HISTORIES = 3
SNAPSHOTS = 5


def update(ceph: Ceph, spec: str, path: Path, **others: object) -> int:
    """As the command line does. The exit status."""
    cluster = ClusterOptions(conf=ceph.conf)
    return export(ExportOptions(cluster, spec, path, progress=False, update=True, **others))  # type: ignore[arg-type]


class Interrupted:
    """Have an update fail at some write, as a disk that is full or a process that is killed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self._left = -1
        for name in ("write", "skip"):
            patch.setattr(FileTarget, name, self._counted(getattr(FileTarget, name)))

    def after(self, writes: int) -> None:
        """Fail after so many; never if negative."""
        self._left = writes

    def _counted(self, method: Callable[..., None]) -> Callable[..., None]:
        def counted(target: FileTarget, *arguments: object) -> None:
            if not self._left:
                raise TargetError("interrupted")
            self._left -= 1
            method(target, *arguments)

        return counted


def assert_is(ceph: Ceph, spec: str, path: Path, told: object) -> None:
    theirs = path.with_name("theirs")
    theirs.unlink(missing_ok=True)
    ceph.run("rbd", "export", "--no-progress", spec, str(theirs))
    ours, right = path.read_bytes(), theirs.read_bytes()
    assert len(ours) == len(right), (spec, told)
    if ours != right:
        wrong = [at for at in range(0, len(right), 4096) if ours[at : at + 4096] != right[at : at + 4096]]
        pytest.fail(f"{spec}: {len(wrong)} pages differ, the first at {wrong[0]}: {told}")
    assert needless_bytes(path) <= needless_bytes(theirs), (spec, told)


def needless_bytes(path: Path) -> int:
    """What takes room, and is a run of zeros of which an export would make a hole."""
    found = end = 0
    with path.open("rb", buffering=0) as file, suppress(OSError):
        while True:
            start = file.seek(end, os.SEEK_DATA)
            end = file.seek(start, os.SEEK_HOLE)
            file.seek(start)
            zeros = 0
            for at in range(start, end, GRAIN):
                zeros = 0 if any(file.read(min(GRAIN, end - at))) else zeros + GRAIN
                found += GRAIN if zeros >= LEAST_ZEROS else 0
    return found


@pytest.mark.filterwarnings("ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_after_any_history_the_file_is_what_rbd_export_makes_of_the_snapshot(
    ceph: Ceph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    interrupted = Interrupted(monkeypatch)
    for number in range(int(os.environ.get("HISTORIES", HISTORIES))):
        seed = SEED + number
        source = random.Random(f"{seed} {kind}")
        history = History.begin(ceph, source, kind)
        path = tmp_path / f"{history.name}.img"
        told: list[object] = [seed, kind]
        for index in range(SNAPSHOTS):
            told.append(history.go_on(source.randrange(1, 6)))
            snapshot = f"s{index}"
            history.snap(snapshot)
            spec = f"rbd/{history.name}@{snapshot}"
            if index and source.random() < 0.5:
                left = source.randrange(0, 6)
                told.append(f"interrupted after {left}")
                interrupted.after(left)
                if update(ceph, spec, path) == 0:
                    told.append("not at all")
                elif source.random() < 0.5:
                    continue  # a later one goes on with it
                elif source.random() < 0.3:
                    history.remove_snap(snapshot)
                    told.append("removed")
                    continue
                interrupted.after(-1)
            interrupted.after(-1)
            assert update(ceph, spec, path) == 0, told
            assert_is(ceph, spec, path, told)


BASE = random_bytes(6 * MIB) + bytes(10 * MIB)
CHANGED_AT = 12 * MIB + 1000


def make_chain(ceph: Ceph, prefix: str = "update", **options: object) -> str:
    """An image with snapshots s1 and s2, between which 5,000 bytes were written and 1 MiB discarded."""
    name = ceph.unique(prefix)
    ceph.make_image(name, b"", **options)  # type: ignore[arg-type]
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
        image.resize(len(BASE))
        image.write(BASE[: 6 * MIB], 0)
        image.create_snap("s1")
        image.write(random_bytes(5000, seed=2), CHANGED_AT)
        image.discard(MIB, MIB)
        image.create_snap("s2")
    return name


def command(ceph: Ceph, *arguments: str) -> subprocess.CompletedProcess[str]:
    """As a person types it."""
    return rbdfs("export", "--update", "--no-progress", *arguments, conf=ceph.conf)


def test_only_what_has_changed_is_read_and_written(ceph: Ceph, tmp_path: Path) -> None:
    name, path = make_chain(ceph), tmp_path / "vm1.img"
    first = json.loads(command(ceph, "--json", f"rbd/{name}@s1", str(path)).stdout)
    assert first["from_snap"] is None
    assert first["read_bytes"] == 8 * MIB
    before = path.stat().st_ino
    done = command(ceph, "--json", "--checksum", "sha256", f"rbd/{name}@s2", str(path))
    figures = json.loads(done.stdout)
    assert path.stat().st_ino == before
    assert_is(ceph, f"rbd/{name}@s2", path, figures)
    assert done.stderr == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path}\n"
    assert figures["from_snap"] == "s1"
    assert figures["size"] == len(BASE)
    assert figures["changed_bytes"] == MIB + 8192
    assert figures["written_bytes"] == 8192
    assert figures["read_bytes"] <= MIB + 8192
    again = command(ceph, "--json", f"rbd/{name}@s2", str(path))
    assert json.loads(again.stdout)["changed_bytes"] == 0
    with_words = rbdfs("export", "--update", f"rbd/{name}@s2", str(path), conf=ceph.conf)
    assert with_words.stderr == f"rbdfs: {path} is a copy of rbd/{name}@s2 already\n"


def test_what_is_not_a_copy_of_an_earlier_snapshot_is_refused_and_left_as_it_was(ceph: Ceph, tmp_path: Path) -> None:
    name, other, path = make_chain(ceph), make_chain(ceph), tmp_path / "vm1.img"

    def refused(spec: str, *words: str) -> None:
        before = path.read_bytes(), path.stat().st_mtime_ns
        done = command(ceph, spec, str(path))
        assert done.returncode == 3, done.stderr
        assert len(done.stderr.splitlines()) == 1
        for word in (*words, "--full compares all of it", f"{path} is as it was"):
            assert word in done.stderr
        assert (path.read_bytes(), path.stat().st_mtime_ns) == before

    path.write_bytes(BASE)
    refused(f"rbd/{name}@s2", "is not known to be a copy", "it has no label")
    path.unlink()
    assert command(ceph, f"rbd/{name}@s1", str(path)).returncode == 0
    refused(f"rbd/{other}@s2", f"is a copy of rbd/{name}", f"and not of rbd/{other}")
    label = os.getxattr(path, "user.rbdfs.copy")
    copy = tmp_path / "copy.img"
    copy.write_bytes(path.read_bytes())
    os.setxattr(copy, "user.rbdfs.copy", label)
    os.utime(copy, ns=(0, path.stat().st_mtime_ns))
    path, kept = copy, path
    refused(f"rbd/{name}@s2", "is not the file that rbdfs made, but a copy of it")
    path = kept
    mtime_ns = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.write(b"by another program")
    refused(f"rbd/{name}@s2", "was written to since")
    os.truncate(path, 5 * MIB)
    refused(f"rbd/{name}@s2", "it has 5242880 bytes")
    path.write_bytes(BASE)
    os.utime(path, ns=(0, mtime_ns))
    os.setxattr(path, "user.rbdfs.copy", b"{}")
    refused(f"rbd/{name}@s2", "cannot be read")
    # --full takes it as it is.
    assert command(ceph, "--full", f"rbd/{name}@s2", str(path)).returncode == 0
    assert_is(ceph, f"rbd/{name}@s2", path, "full")
    refused(f"rbd/{name}@s1", "which is not earlier than")


def test_a_snapshot_or_an_image_of_the_same_name_is_not_the_same(ceph: Ceph, tmp_path: Path) -> None:
    name, path = make_chain(ceph), tmp_path / "vm1.img"
    assert command(ceph, f"rbd/{name}@s1", str(path)).returncode == 0
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
        image.remove_snap("s1")
        image.create_snap("s1")
        image.create_snap("s3")
    done = command(ceph, f"rbd/{name}@s3", str(path))
    assert (done.returncode, "which was removed, and another snapshot has its name now" in done.stderr) == (3, True)
    with ceph.ioctx() as ioctx:
        with rbd.Image(ioctx, name) as image:
            for snapshot in ("s1", "s2", "s3"):
                image.remove_snap(snapshot)
        rbd.RBD().remove(ioctx, name)
        rbd.RBD().create(ioctx, name, len(BASE), old_format=False)
        with rbd.Image(ioctx, name) as image:
            image.create_snap("s2")
    done = command(ceph, f"rbd/{name}@s2", str(path))
    assert (done.returncode, "that was another image of the same name" in done.stderr) == (3, True)
    # A renamed snapshot is the same.
    name, path = make_chain(ceph), tmp_path / "vm2.img"
    assert command(ceph, f"rbd/{name}@s1", str(path)).returncode == 0
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
        image.rename_snap("s1", "renamed")
    assert command(ceph, f"rbd/{name}@s2", str(path)).returncode == 0
    assert_is(ceph, f"rbd/{name}@s2", path, "renamed")


def test_a_killed_update_is_gone_on_with_by_the_same_command_and_by_a_later_snapshot(
    ceph: Ceph, tmp_path: Path
) -> None:
    for then in ("s2", "s3"):
        name, path = ceph.unique("killed"), tmp_path / f"{then}.img"
        content = random_bytes(48 * MIB)
        ceph.make_image(name, content)
        with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
            image.create_snap("s1")
        assert command(ceph, f"rbd/{name}@s1", str(path)).returncode == 0
        ceph.write_image(name, random_bytes(48 * MIB, seed=2))
        with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
            image.create_snap("s2")
            image.write(content[: 4 * MIB], 0)  # as it was
            image.create_snap("s3")
        slow = (
            *RBDFS,
            "export",
            "--update",
            "--conf",
            str(ceph.conf),
            "--limit-rate",
            "8M",
            f"rbd/{name}@s2",
            str(path),
        )
        with subprocess.Popen(slow, stderr=subprocess.DEVNULL) as process:
            wait_until(lambda path=path, content=content: path.read_bytes() != content, 60)  # type: ignore[misc]
            process.kill()
            process.wait()
        refused = command(ceph, f"rbd/{name}@s1", str(path))
        assert (refused.returncode, "which is not earlier" in refused.stderr) == (3, True)
        assert command(ceph, f"rbd/{name}@{then}", str(path)).returncode == 0
        assert_is(ceph, f"rbd/{name}@{then}", path, "killed")


def test_where_an_interrupted_one_was_going_may_be_gone_then_all_is_compared(
    ceph: Ceph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    name, path = make_chain(ceph), tmp_path / "vm1.img"
    assert update(ceph, f"rbd/{name}@s1", path) == 0
    interrupted = Interrupted(monkeypatch)
    interrupted.after(1)
    assert update(ceph, f"rbd/{name}@s2", path) == 1
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
        image.rollback_to_snap("s1")
        image.remove_snap("s2")
        image.create_snap("s3")
    for writes in (0, -1):
        interrupted.after(writes)
        assert update(ceph, f"rbd/{name}@s3", path) == (1 if not writes else 0)
        assert "which was removed: all of it is compared" in capfd.readouterr().err
    assert_is(ceph, f"rbd/{name}@s3", path, "compared")
    assert path.read_bytes() == BASE


def test_an_unfinished_first_export_is_gone_on_with_too(ceph: Ceph, tmp_path: Path) -> None:
    name, path = make_chain(ceph), tmp_path / "vm1.img"
    partial = tmp_path / "vm1.img.partial"
    slow = (*RBDFS, "export", "--update", "--conf", str(ceph.conf), "--limit-rate", "1M", f"rbd/{name}@s1", str(path))
    for snapshot in ("s1", "s2"):
        with subprocess.Popen(slow, stderr=subprocess.DEVNULL) as process:
            wait_until(lambda: partial.exists() and partial.stat().st_blocks > 0, 60)
            process.kill()
            process.wait()
        assert command(ceph, f"rbd/{name}@{snapshot}", str(path)).returncode == 0
        assert_is(ceph, f"rbd/{name}@{snapshot}", path, snapshot)
        path.unlink()
        assert list(tmp_path.glob("*.partial*")) == []


def test_without_extended_attributes_the_label_is_a_file_beside_it(ceph: Ceph, tmp_path: Path) -> None:
    name = make_chain(ceph)
    folder = tmp_path / "ramfs"  # which has none, and no holes
    folder.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", str(folder)], check=True)
    try:
        path = folder / "vm1.img"
        assert command(ceph, f"rbd/{name}@s1", str(path)).returncode == 0
        assert json.loads((folder / "vm1.img.rbdfs").read_text())["of"]["snapshot"] == "s1"
        assert command(ceph, f"rbd/{name}@s2", str(path)).returncode == 0
        assert path.read_bytes() == ceph.exported(f"{name}@s2")
        assert sorted(each.name for each in folder.iterdir()) == ["vm1.img", "vm1.img.rbdfs"]
        with path.open("r+b") as file:
            file.write(b"by another program")
        assert command(ceph, f"rbd/{name}@s2", str(path)).returncode == 3
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_block_device_has_no_label_and_all_of_it_is_compared(ceph: Ceph, tmp_path: Path) -> None:
    name, disk = make_chain(ceph), tmp_path / "disk"
    disk.write_bytes(random_bytes(20 * MIB, seed=3))
    device = subprocess.run(["losetup", "--find", "--show", str(disk)], check=True, capture_output=True, text=True)
    path = device.stdout.strip()
    try:
        assert command(ceph, f"rbd/{name}@s2", path).returncode == 3
        done = command(ceph, "--full", "--json", f"rbd/{name}@s2", path)
        assert done.returncode == 0, done.stderr
        again = json.loads(command(ceph, "--full", "--json", f"rbd/{name}@s2", path).stdout)
        assert again["written_bytes"] == 0
        small = tmp_path / "small.img"
        small.write_bytes(b"")
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)
    assert disk.read_bytes()[: len(BASE)] == ceph.exported(f"{name}@s2")
    assert disk.read_bytes()[len(BASE) :] == random_bytes(20 * MIB, seed=3)[len(BASE) :]


def test_export_into_an_existing_file_gives_it_a_new_label(ceph: Ceph, tmp_path: Path) -> None:
    name, path = make_chain(ceph), tmp_path / "vm1.img"
    assert command(ceph, f"rbd/{name}@s1", str(path)).returncode == 0
    plain = rbdfs("export", "--force", "--no-progress", f"rbd/{name}", str(path), conf=ceph.conf)
    assert plain.returncode == 0
    assert "user.rbdfs.copy" not in os.listxattr(path)
    forced = rbdfs("export", "--force", "--no-progress", f"rbd/{name}@s1", str(path), conf=ceph.conf)
    assert forced.returncode == 0
    assert command(ceph, f"rbd/{name}@s2", str(path)).returncode == 0
    assert_is(ceph, f"rbd/{name}@s2", path, "forced")


def test_what_shows_through_a_clone_is_right_after_its_parent_was_moved(ceph: Ceph, tmp_path: Path) -> None:
    parent, child, path = make_chain(ceph, "parent"), ceph.unique("child"), tmp_path / "vm1.img"
    ceph.run("rbd", "clone", "--rbd-default-clone-format", "2", f"rbd/{parent}@s1", f"rbd/{child}")
    ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{child}@s1")
    assert command(ceph, f"rbd/{child}@s1", str(path)).returncode == 0
    moved = ceph.unique("moved")
    ceph.run("rbd", "migration", "prepare", f"rbd/{parent}", f"rbd/{moved}")
    ceph.run("rbd", "migration", "execute", "--no-progress", f"rbd/{moved}")
    ceph.run("rbd", "migration", "commit", "--no-progress", "--force", f"rbd/{moved}")
    ceph.write_image(child, b"the clone's own", 3 * MIB)
    ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{child}@s2")
    assert command(ceph, f"rbd/{child}@s2", str(path)).returncode == 0
    assert_is(ceph, f"rbd/{child}@s2", path, "moved")


def test_a_snapshot_that_may_still_be_filled_is_no_ground_to_go_on_from(ceph: Ceph, tmp_path: Path) -> None:
    name, path = make_chain(ceph), tmp_path / "vm1.img"
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as copier:
        copier.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)  # as who makes a deep copy
        done = command(ceph, f"rbd/{name}@s1", str(path))
        assert (done.returncode, "may be being filled" in done.stderr) == (1, True)
        assert rbdfs("export", "--no-progress", f"rbd/{name}@s1", str(path), conf=ceph.conf).returncode == 0
        assert "user.rbdfs.copy" not in os.listxattr(path)
        copier.lock_release()
    assert command(ceph, f"rbd/{name}@s2", str(path)).returncode == 3


def test_a_client_that_takes_no_lock_is_given_time_to_hear_of_the_snapshot(ceph: Ceph, tmp_path: Path) -> None:
    name, path = make_chain(ceph, features=rbd.RBD_FEATURE_LAYERING), tmp_path / "vm1.img"
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name):  # open for writing
        began = time.monotonic()
        assert command(ceph, f"rbd/{name}@s1", str(path)).returncode == 0
        assert time.monotonic() - began >= LATE_WRITES_SECONDS
    assert command(ceph, f"rbd/{name}@s2", str(path)).returncode == 0
    assert_is(ceph, f"rbd/{name}@s2", path, "no lock")


def test_usage_that_cannot_be_meant_is_refused(ceph: Ceph, tmp_path: Path) -> None:
    name, path = make_chain(ceph), str(tmp_path / "vm1.img")
    for arguments, word in (
        ((f"rbd/{name}", path), "--update takes a snapshot"),
        ((f"rbd/{name}@s1", "-"), "it does not go with -"),
        (("--force", f"rbd/{name}@s1", path), "it does not go with -"),
    ):
        done = command(ceph, *arguments)
        assert (done.returncode, word in done.stderr) == (2, True), done.stderr
    done = rbdfs("export", "--full", f"rbd/{name}@s1", path, conf=ceph.conf)
    assert (done.returncode, "--full goes with --update only" in done.stderr) == (2, True)
