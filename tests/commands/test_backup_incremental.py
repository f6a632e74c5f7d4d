"""`examples/backup-incremental.sh`: each file is its image's newest backup, whatever fails, and is restored from."""

import fcntl
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import rbd

from tests.cluster import MIB, Ceph, random_bytes, wait_until
from tests.commands.test_examples import EXAMPLES, ext4, run

SCRIPT = EXAMPLES / "backup-incremental.sh"
SNAPSHOT = r"backup-\d{8}-\d{6}"
ODD = "two\nwörds"
SLOW = ("--", "--limit-rate", "2M")

Environment = dict[str, str]


@pytest.fixture
def pool(ceph: Ceph) -> Iterator[str]:
    """The name of one for this test alone."""
    name = ceph.unique("backup")
    ceph.make_pool(name)
    yield name
    ceph.remove_pool(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the backups go."""
    folder = tmp_path / "backups"
    folder.mkdir()
    return folder


def snapshots(ceph: Ceph, pool: str, name: str) -> list[str]:
    with ceph.ioctx(pool) as ioctx, rbd.Image(ioctx, name, read_only=True) as image:
        return [snapshot["name"] for snapshot in image.list_snaps()]


def exported(ceph: Ceph, spec: str, folder: Path) -> bytes:
    """As `rbd export` has it."""
    path = folder / "exported"
    path.unlink(missing_ok=True)
    ceph.run("rbd", "export", "--no-progress", spec, str(path))
    return path.read_bytes()


def assert_backed_up(ceph: Ceph, pool: str, name: str, folder: Path) -> bytes:
    """The file is its newest snapshot, the only one. Its content."""
    (snapshot,) = snapshots(ceph, pool, name)
    assert re.fullmatch(SNAPSHOT, snapshot)
    content = (folder / f"{name}.raw").read_bytes()
    assert content == exported(ceph, f"{pool}/{name}@{snapshot}", folder.parent)
    return content


def history(folder: Path, name: str) -> list[bytes]:
    """The oldest first."""
    paths = sorted((folder / "history" / name).iterdir())
    assert all(re.fullmatch(rf"{SNAPSHOT}\.raw", path.name) for path in paths)
    return [path.read_bytes() for path in paths]


def test_a_pool_is_backed_up_night_by_night_and_restored_in_four_ways(
    ceph: Ceph, pool: str, environment: Environment, folder: Path, tmp_path: Path
) -> None:
    content = random_bytes(2 * MIB) + bytes(6 * MIB)
    ceph.make_image(ODD, content, pool=pool)
    ceph.make_image("vm1", ext4(tmp_path), pool=pool)
    backup = (SCRIPT, "--keep", 2, pool, folder)
    nights = []
    for night in range(3):
        images = [ODD, "vm1"][: 1 if night else None]
        said = run(*backup, *images, environment=environment).splitlines()
        assert len(said) == len(images) + 1
        figures = r"changed \d.*B, read \d.*B, written \d.*B, \d+ s"
        for name, line in zip(images, said[:-1], strict=True):
            shown = re.escape(name.replace("\n", "?"))
            assert re.fullmatch(f"{shown}: {SNAPSHOT}, {figures}", line)
        assert re.fullmatch(f"{len(images)} of {len(images)} images backed up, 0 FAILED; {figures}", said[-1])
        if night:
            assert "changed 4.0KiB, read 4.0KiB, written 4.0KiB" in said[0]
        nights.append(assert_backed_up(ceph, pool, ODD, folder))
        assert history(folder, ODD) == nights[-2:]
        ceph.write_image(ODD, random_bytes(4096, night), (3 + night) * MIB, pool=pool)
    assert nights[0] == content
    assert len(set(nights)) == 3
    assert (folder / f"{ODD}.raw").stat().st_blocks * 512 < 3 * MIB

    path = folder / "vm1.raw"
    disk = assert_backed_up(ceph, pool, "vm1", folder)
    run("rbd", "import", "--no-progress", path, f"{pool}/restored", environment=environment)
    assert exported(ceph, f"{pool}/restored", tmp_path) == disk
    run("cp", "--sparse=always", path, tmp_path / "vm1.raw", environment=environment)
    assert (tmp_path / "vm1.raw").read_bytes() == disk
    inside = tmp_path / "inside"
    inside.mkdir()
    run("mount", "-o", "loop,ro,noload", path, inside, environment=environment)
    try:
        assert (inside / "random").read_bytes() == random_bytes(3 * MIB)
    finally:
        run("umount", inside, environment=environment)
    qcow2 = tmp_path / "vm1.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", path, qcow2, environment=environment)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", path, qcow2, environment=environment)
    # None of it has changed the file: the next one goes on from it.
    again = run(*backup, "vm1", environment=environment)
    assert "changed 0B" in again
    assert "compared" not in again


def test_an_image_that_fails_is_reported_and_the_others_are_backed_up(
    ceph: Ceph, pool: str, environment: Environment, folder: Path
) -> None:
    names = ("gone", "held", "spoiled")
    for name in names:
        ceph.make_image(name, random_bytes(2 * MIB), pool=pool)
    run(SCRIPT, pool, folder, environment=environment)
    (before,) = snapshots(ceph, pool, "held")
    old = (folder / "held.raw").read_bytes()
    for name in names:
        ceph.write_image(name, random_bytes(9000, seed=2), MIB, pool=pool)
    with ceph.ioctx(pool) as ioctx:
        rbd.RBD().create(ioctx, "a/b@c", MIB, old_format=False)
        with rbd.Image(ioctx, "gone") as image:
            image.remove_snap(snapshots(ceph, pool, "gone")[0])
        rbd.RBD().remove(ioctx, "gone")
    with (folder / "spoiled.raw").open("r+b") as file:
        file.write(b"by another program")
    with (folder / "held.raw").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = run(SCRIPT, pool, folder, environment=environment, status=1)
    lines = dict(line.split(": ", 1) for line in said.splitlines()[:-1])
    assert "nor a name with / or @ in it" in lines["a/b@c"]
    assert lines["held"].startswith("FAILED: another export or verify uses")
    assert "compared as a whole: " in lines["spoiled"]
    assert lines["spoiled"].endswith("was written to since rbdfs made it (its modification time says so)")
    assert lines["gone"] == f"not in {pool} any more, {folder}/gone.raw stays"
    assert said.splitlines()[-1].startswith("1 of 3 images backed up, 2 FAILED; ")
    assert_backed_up(ceph, pool, "spoiled", folder)
    assert snapshots(ceph, pool, "held") == [before]
    assert (folder / "held.raw").read_bytes() == old
    run(SCRIPT, "--keep", 1, pool, folder, "held", environment=environment)
    assert history(folder, "held") == [assert_backed_up(ceph, pool, "held", folder)]


def test_of_snapshots_only_its_own_go_and_the_newest_stay(
    ceph: Ceph, pool: str, environment: Environment, folder: Path
) -> None:
    ceph.make_image("vm1", random_bytes(MIB), pool=pool)
    others = ["backup-of-mine", "backup-20200101-000000", "other-20200101-000000"]
    with ceph.ioctx(pool) as ioctx, rbd.Image(ioctx, "vm1") as image:
        for name in others:
            image.create_snap(name)
        image.protect_snap("backup-20200101-000000")
    for count in (1, 2, 2):
        run(SCRIPT, "--snapshots", 2, pool, folder, environment=environment)
        found = snapshots(ceph, pool, "vm1")
        assert found[:3] == others
        assert len(found) == 3 + count
    # Where nothing is written, no snapshot is left, and those that are there stay.
    said = run(SCRIPT, pool, folder, "--", "--id", "nobody", environment=environment, status=1)
    assert "FAILED: cannot connect to the cluster" in said
    assert snapshots(ceph, pool, "vm1") == found


def interrupted(
    command: Sequence[object], environment: Environment, begun: Callable[[], bool], how: signal.Signals
) -> str:
    """Run it until something has begun, and end it; SIGKILL also ends its children. What it said."""
    words = [str(word) for word in command]
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        wait_until(begun, 60)
        if how == signal.SIGKILL:
            os.killpg(process.pid, how)
        else:
            process.send_signal(how)
        said, _ = process.communicate(timeout=20)
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how), said
    return said


def test_what_was_interrupted_the_next_run_goes_on_with(
    ceph: Ceph, pool: str, environment: Environment, folder: Path
) -> None:
    content = random_bytes(16 * MIB)
    ceph.make_image("vm1", content, MIB, pool=pool)
    ceph.make_image("vm2", b"", pool=pool)
    file, partial = folder / "vm1.raw", folder / "vm1.raw.partial"

    def changed(content: bytes) -> Callable[[], bool]:
        return lambda: file.exists() and file.read_bytes() != content

    backup = (SCRIPT, "--keep", 3, pool, folder)
    interrupted(
        (*backup, *SLOW), environment, lambda: partial.exists() and partial.stat().st_blocks > 0, signal.SIGKILL
    )
    (first,) = snapshots(ceph, pool, "vm1")
    ceph.write_image("vm1", random_bytes(12 * MIB, seed=2), pool=pool)
    # The first export goes on with its snapshot, and then comes what has changed since.
    said = interrupted((*backup, *SLOW), environment, changed(content), signal.SIGTERM)
    assert "vm1: FAILED: stopped by SIGTERM" in said
    assert "0 of 2 images backed up, 1 FAILED, 1 not tried; " in said
    assert snapshots(ceph, pool, "vm1")[0] == first
    assert len(snapshots(ceph, pool, "vm1")) == 2
    assert snapshots(ceph, pool, "vm2") == []
    interrupted((*backup, *SLOW), environment, changed(file.read_bytes()), signal.SIGKILL)
    assert len(snapshots(ceph, pool, "vm1")) == 3
    assert not (folder / "history").exists()
    ceph.write_image("vm1", b"later", 15 * MIB, pool=pool)
    said = run(*backup, environment=environment)
    assert "compared" not in said
    newest = assert_backed_up(ceph, pool, "vm1", folder)
    assert newest[15 * MIB :].startswith(b"later")
    assert history(folder, "vm1") == [newest]
    assert not partial.exists()


def test_one_folder_is_for_one_pool_and_one_run_at_a_time(
    ceph: Ceph, pool: str, environment: Environment, folder: Path
) -> None:
    ceph.make_image("vm1", random_bytes(MIB), pool=pool)
    run(SCRIPT, pool, folder, environment=environment)
    assert f"{folder} has backups of " in run(SCRIPT, "rbd", folder, environment=environment, status=2)
    with (folder / ".backup-incremental").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is at work" in run(SCRIPT, pool, folder, environment=environment, status=1)
    for wrong in ((), (pool,), (pool, folder / "none"), ("--keep",), ("--keep", "x", pool, folder), ("--what", pool)):
        assert "see --help" in run(SCRIPT, *wrong, environment=environment, status=2)
    assert "listing images failed" in run(SCRIPT, f"{pool}/none", folder, environment=environment, status=1)
    assert_backed_up(ceph, pool, "vm1", folder)


def test_systemd_has_nothing_to_say_against_the_units(tmp_path: Path) -> None:
    units = []
    for unit in ("rbdfs-backup.service", "rbdfs-backup.timer"):
        text = (EXAMPLES / unit).read_text().replace("/usr/local/bin/backup-incremental.sh", str(SCRIPT))
        units.append(tmp_path / unit)
        units[-1].write_text(text)
    assert str(SCRIPT) in units[0].read_text()
    assert run("systemd-analyze", "verify", "--man=no", *units, environment=dict(os.environ)) == ""
