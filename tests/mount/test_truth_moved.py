"""What is migrated, or taken to the trash and back: right bytes or an error, and the first open() afterwards works."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import rados
import rbd

from tests.cluster import MIB, RBDFS, READ_ONLY_CAPS, Ceph, Mount, random_bytes, rbdfs, wait_until
from tests.mount.test_changes import Mounts
from tests.truth import (
    FEATURES,
    OBJECT,
    READ_ONLY_MODES,
    TWO_MODES,
    assert_reads_right,
    assert_same,
    cat,
    describe,
    idle,
    image_id,
    looping,
    make_clone,
    migrate,
    migrating,
    opened,
    read_all,
)

GOLDEN = random_bytes(8 * MIB, seed=2)
NEW = random_bytes(MIB, seed=3)
STEPS = ("execute", "commit")


@pytest.fixture
def golden(ceph: Ceph) -> str:
    """An image with the content `GOLDEN`."""
    name = ceph.unique("golden")
    ceph.make_image(name, GOLDEN, OBJECT, features=FEATURES)
    return name


# Root cause 1: the parents of what is open are migrated


@TWO_MODES
@pytest.mark.parametrize("generation", ["parent", "grandparent"])
def test_a_clone_and_its_snapshot_are_right_after_each_step_of_a_migration_above_them(
    ceph: Ceph, mode_mount: Mount, golden: str, generation: str, tmp_path: Path
) -> None:
    child = make_clone(ceph, golden)
    if generation == "grandparent":
        ceph.write_image(child, NEW, 6 * MIB)
        child = make_clone(ceph, child)
    with opened(ceph, child) as image:
        image.write(NEW, 3 * MIB)
        image.create_snap("s")
        image.write(NEW, 5 * MIB)
    contents = {name: ceph.exported(name) for name in (child, f"{child}@s")}
    paths = {name: mode_mount.image(name) for name in contents}
    with contextlib.ExitStack() as stack:
        older = {name: stack.enter_context(idle(path)) for name, path in paths.items()}
        with migrating(ceph, golden, f"{golden}-new") as step:
            for number, after in enumerate(("prepare", *STEPS)):
                if after in STEPS:
                    step(after)
                for name, content in contents.items():
                    start = (1 + 2 * number) * MIB  # what nobody has read yet, so that no cache has it
                    with contextlib.suppress(OSError):
                        assert_same(os.pread(older[name], MIB, start), content[start : start + MIB])
                    with idle(paths[name]) as newer:
                        start += MIB
                        assert_same(read_all(newer, MIB, start), content[start : start + MIB])
        for name, content in contents.items():
            assert_reads_right(ceph, paths[name], name, tmp_path)
            assert ceph.exported(name) == content


@pytest.mark.parametrize("name", ["{}", "{}@s"], ids=["HEAD", "snapshot"])
def test_an_export_that_runs_while_the_parent_is_migrated_is_right_or_fails(
    ceph: Ceph, golden: str, name: str, tmp_path: Path
) -> None:
    child = make_clone(ceph, golden)
    with opened(ceph, child) as image:
        image.create_snap("s")
    copy = tmp_path / "copy"
    command = [*RBDFS, "export", "--no-progress", "--concurrency", "1", "--limit-rate", "256K"]
    environment = os.environ | {"CEPH_CONF": os.fspath(ceph.conf)}
    command += [f"rbd/{name.format(child)}", os.fspath(copy)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as exporting:
        try:
            wait_until(lambda: any(path.stat().st_size for path in tmp_path.iterdir()))
            migrate(ceph, golden, f"{golden}-new")
            assert exporting.poll() is None, "the export was done too soon"
            _, error = exporting.communicate(timeout=60)
        finally:
            exporting.kill()
    if exporting.returncode == 0:
        assert_same(copy.read_bytes(), GOLDEN)
    else:
        assert not copy.exists()
        assert error.count(b"\n") == 1


# Root cause 8: holes of an image in migration


@TWO_MODES
@pytest.mark.parametrize("stays_open", [True, False], ids=["older descriptor", "opened again"])
def test_an_image_in_migration_is_copied_right_after_each_step(
    ceph: Ceph, mode_mount: Mount, tmp_path: Path, *, stays_open: bool
) -> None:
    name = ceph.unique("sparse")
    ceph.make_image(name, bytes(8 * MIB), OBJECT, features=FEATURES)
    ceph.write_image(name, NEW, 3 * MIB)
    target = f"{name}-new"
    with migrating(ceph, name, target) as step:
        path = mode_mount.image(target)
        wait_until(path.exists)
        assert_reads_right(ceph, path, target, tmp_path)
        with idle(path) if stays_open else contextlib.nullcontext():
            ceph.write_image(target, NEW, 6 * MIB)
            assert_reads_right(ceph, path, target, tmp_path)
            for name in STEPS:
                step(name)
                assert_reads_right(ceph, path, target, tmp_path)


@contextlib.contextmanager
def importing(ceph: Ceph, source: Path) -> Iterator[str]:
    """An image that is being imported from a file; it is given up at the end."""
    name = ceph.unique("imported")
    spec = json.dumps({"type": "raw", "stream": {"type": "file", "file_path": os.fspath(source)}})
    ceph.run("rbd", "migration", "prepare", "--import-only", "--source-spec", spec, f"rbd/{name}")
    try:
        yield name
    finally:

        def aborted() -> bool:
            with contextlib.suppress(subprocess.CalledProcessError):
                ceph.run("rbd", "migration", "abort", "--no-progress", f"rbd/{name}")
                return True
            return False

        wait_until(aborted, 40)  # the watch of a mount that died holds it up for 30 s


@TWO_MODES
def test_an_image_that_is_imported_from_a_file_is_copied_right_and_ends_no_mount(
    ceph: Ceph, mode_mount: Mount, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    content = NEW + bytes(6 * MIB) + NEW
    source.write_bytes(content)
    with importing(ceph, source) as name:
        path = mode_mount.image(name)
        wait_until(path.exists)
        with path.open("rb", buffering=0) as file:
            assert file.seek(0, os.SEEK_DATA) == 0
            assert file.seek(2 * MIB, os.SEEK_HOLE) > 2 * MIB - 1
        assert_reads_right(ceph, path, name, tmp_path)
        ceph.run("rbd", "migration", "execute", "--no-progress", f"rbd/{name}")
        assert_reads_right(ceph, path, name, tmp_path)
    assert mode_mount.is_running


# Root cause 9: replaced while reads wait


@dataclass
class Answers:
    """What many readers got."""

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[int] = field(default_factory=list)

    @property
    def count(self) -> int:
        """All answers."""
        return self.right + len(self.wrong) + len(self.errors)


@contextlib.contextmanager
def many_reads(mount: Mount, name: str, content: bytes, threads: int = 24) -> Iterator[Answers]:
    """So many readers of random objects that most of them wait. At the end each has got its answer."""
    stop, answers = threading.Event(), Answers()
    file = os.open(mount.image(name), os.O_RDONLY)

    def read(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            offset = chance.randrange(0, len(content), OBJECT)
            os.posix_fadvise(file, offset, OBJECT, os.POSIX_FADV_DONTNEED)
            try:
                data, right = read_all(file, OBJECT, offset), content[offset : offset + OBJECT]
                if data == right:
                    answers.right += 1
                else:
                    answers.wrong.append(f"at {offset}: {describe(data, right=right)}")
            except OSError as error:
                answers.errors.append(error.errno or 0)
                stop.wait(0.01)

    readers = [threading.Thread(target=read, args=(seed,), daemon=True) for seed in range(threads)]
    for reader in readers:
        reader.start()
    try:
        yield answers
    finally:
        stop.set()
        deadline = time.monotonic() + 20
        for reader in readers:
            reader.join(max(0.0, deadline - time.monotonic()))
        hung = sum(reader.is_alive() for reader in readers)
        if hung:  # nothing else ends them, and so this process
            os.kill(mount.pid, signal.SIGKILL)
        assert not hung, f"{hung} reads were never answered"
        with contextlib.suppress(OSError):
            os.close(file)


@contextlib.contextmanager
def without_object(ceph: Ceph, name: str) -> Iterator[None]:
    """An object of pool rbd is not there for a while."""
    with ceph.ioctx() as ioctx:
        data = ioctx.read(name, MIB)
        with rados.ReadOpCtx() as read:
            found, _ = ioctx.get_omap_vals(read, "", "", 1000)
            ioctx.operate_read_op(read, name)
            values = dict(found)
        ioctx.remove_object(name)
        try:
            yield
        finally:
            with rados.WriteOpCtx() as write:
                write.write_full(data)
                ioctx.set_omap(write, tuple(values), tuple(values.values()))
                ioctx.operate_write_op(write, name)


@pytest.mark.parametrize("image_format", [1, 2])
def test_an_image_in_migration_whose_source_is_gone_is_an_error_and_the_mount_lives_on(
    ceph: Ceph, mounts: Mounts, image_format: int
) -> None:
    # librbd 16 would end the process.
    mount, name, other = mounts(*ceph.credentials(READ_ONLY_CAPS)), ceph.unique("source"), ceph.unique("other")
    mount.expect("ERROR")
    create = ("rbd", "create", "--image-format", str(image_format), "--size", "8M", f"rbd/{name}")
    ceph.run("env", "RBD_FORCE_ALLOW_V1=1", *create)
    ceph.write_image(name, GOLDEN)
    ceph.make_image(other, GOLDEN, OBJECT)
    header = f"{name}.rbd" if image_format == 1 else f"rbd_header.{image_id(ceph, name)}"
    with migrating(ceph, name, f"{name}-new"):
        path = mount.image(f"{name}-new")
        assert path.read_bytes() == GOLDEN
        with without_object(ceph, header):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                path.read_bytes()
            assert "it is in migration: is its source, image " in mount.log
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                os.getxattr(path, "user.rbd.watchers")
            mapped = rbdfs("map", f"rbd/{name}-new", conf=ceph.conf)
            assert mapped.returncode == 1
            assert "it is in migration: is its source, image " in mapped.stderr
            assert mount.image(other).read_bytes() == GOLDEN
        assert path.read_bytes() == GOLDEN


def test_an_image_in_migration_whose_source_the_key_may_not_read_says_so_at_open(ceph: Ceph, mounts: Mounts) -> None:
    pool, name, other = ceph.unique("elsewhere"), ceph.unique("target"), ceph.unique("other")
    ceph.make_pool(pool)
    ceph.make_image("source", GOLDEN, OBJECT, pool=pool)
    ceph.make_image(other, GOLDEN, OBJECT)
    ceph.run("rbd", "migration", "prepare", f"{pool}/source", f"rbd/{name}")
    try:
        mount = mounts(*ceph.credentials(("mon", "profile rbd", "osd", "profile rbd-read-only pool=rbd")))
        mount.expect("ERROR")
        with pytest.raises(PermissionError):
            mount.image(name).read_bytes()
        assert "it is in migration: the key must be allowed to read its source as well" in mount.log
        assert mount.image(other).read_bytes() == GOLDEN
    finally:
        ceph.run("rbd", "migration", "abort", "--no-progress", f"rbd/{name}")
        ceph.remove_pool(pool)


@contextlib.contextmanager
def slow_osd(ceph: Ceph) -> Iterator[None]:
    """Each message to the mounts that are made here takes up to 10 ms, so that reads wait for each other.

    With 30 ms, librbd opens the source of a migration for long enough to see it removed, at which librbd 16 ends the
    process.
    """
    settings = "--ms-inject-delay-type=osd --ms-inject-delay-max=0.01 --ms-inject-delay-probability=1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CEPH_ARGS", settings)
        yield


def replace(ceph: Ceph, name: str, how: str, answers: Answers) -> None:
    """Migrate an image, or take it to the trash and back."""
    if how == "migrated":
        migrate(ceph, name, name)
    elif how == "committed":
        ceph.run("rbd", "migration", "commit", "--no-progress", f"rbd/{name}")
    else:
        image = image_id(ceph, name)
        with ceph.ioctx() as ioctx:
            rbd.RBD().trash_move(ioctx, name)
            wait_until(lambda: bool(answers.errors))
            rbd.RBD().trash_restore(ioctx, image, name)


def open_and_close(path: Path) -> None:
    """An open() gets what older reads wait for replaced, if that is gone."""
    with contextlib.suppress(OSError):
        os.close(os.open(path, os.O_RDONLY))


def can_be_read(path: Path) -> bool:
    """Open a file and read a little."""
    try:
        with path.open("rb", buffering=0) as file:
            return bool(file.read(MIB))
    except OSError:
        return False


@pytest.mark.parametrize("how", ["migrated", "committed", "trash"])
@pytest.mark.parametrize("arguments", [("--cache-size", "512K", "--direct-io"), ()], ids=["tiny cache", "default"])
def test_each_read_is_answered_when_an_image_is_replaced_while_many_wait(
    ceph: Ceph, mounts: Mounts, golden: str, how: str, arguments: tuple[str, ...]
) -> None:
    with slow_osd(ceph):
        mount = mounts(*arguments, *ceph.credentials(READ_ONLY_CAPS))
    mount.expect("ERROR", "WARNING")
    if how == "committed":
        ceph.run("rbd", "migration", "prepare", f"rbd/{golden}", f"rbd/{golden}")
        ceph.run("rbd", "migration", "execute", "--no-progress", f"rbd/{golden}")
    path, other = mount.image(golden), ceph.unique("other")
    ceph.make_image(other, GOLDEN, OBJECT)
    # What is read of the other is in flight while nothing of the first one is, but waits.
    with many_reads(mount, other, GOLDEN) as of_other, many_reads(mount, golden, GOLDEN) as answers:
        wait_until(lambda: answers.right > 20)
        with looping(*[partial(open_and_close, path)] * 2):
            replace(ceph, golden, how, answers)
            count = answers.count
            wait_until(lambda: answers.count > count + 100, 60)
    assert mount.is_running, mount.log
    assert not answers.wrong, answers.wrong[:5]
    assert not of_other.wrong, of_other.wrong[:5]
    assert not of_other.errors
    wait_until(partial(can_be_read, path), 5)
    assert_same(cat(path), GOLDEN)


# Root cause 10: the first open() afterwards

BEFORE = ["stat", "open", "stays open", "noticed"]


@READ_ONLY_MODES
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("how", ["migrated", "trash", "trash, tried"])
def test_the_first_open_of_a_path_whose_image_was_away_works(
    ceph: Ceph, mode_mount: Mount, golden: str, before: str, how: str
) -> None:
    path, image = mode_mount.image(golden), image_id(ceph, golden)
    with contextlib.ExitStack() as stack, ceph.ioctx() as ioctx:
        if before == "open":
            cat(path)
        file = stack.enter_context(idle(path)) if before in ("stays open", "noticed") else None
        assert path.stat().st_size == 8 * MIB
        if how == "migrated":
            migrate(ceph, golden, golden)
        else:
            rbd.RBD().trash_move(ioctx, golden)
        if how == "trash, tried":
            with contextlib.suppress(OSError):
                path.read_bytes()
        if before == "noticed" and file is not None:
            wait_until(partial(fails, file))
        if how != "migrated":
            rbd.RBD().trash_restore(ioctx, image, golden)
        assert_same(path.read_bytes(), GOLDEN)


def fails(file: int) -> bool:
    """Whether a read of what was not read before is an error."""
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        os.pread(file, MIB, random.randrange(7) * MIB)
    except OSError:
        return True
    return False
