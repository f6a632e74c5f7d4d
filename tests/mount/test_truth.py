"""An open() sees all that was done before it: bytes, size and holes, in every mode of a mount."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import rbd

from tests.cluster import MIB, Ceph, Mount, random_bytes, wait_until
from tests.truth import (
    FEATURES,
    OBJECT,
    TWO_MODES,
    assert_reads_right,
    assert_same,
    blocks_of,
    cat,
    idle,
    image_id,
    in_modes,
    make_clone,
    migrate,
    opened,
    watching,
    write_object,
)

GOLDEN = random_bytes(8 * MIB, seed=2)
"""No object ends with a zero, which would be taken for a removal and looked at for 5 s where others write."""
NEW = random_bytes(MIB, seed=3)
MANY = 160
"""Images in a directory: with names of 200 bytes the kernel asks for them in several requests."""


@pytest.fixture
def golden(ceph: Ceph) -> str:
    """An image with the content `GOLDEN`."""
    name = ceph.unique("golden")
    ceph.make_image(name, GOLDEN, OBJECT, features=FEATURES)
    return name


@pytest.fixture
def child(ceph: Ceph, golden: str) -> str:
    """A clone of it."""
    return make_clone(ceph, golden)


# The rows of the table


def test_what_was_written_beyond_the_old_end_is_there_while_an_older_descriptor_is_open(
    ceph: Ceph, mode_mount: Mount, tmp_path: Path
) -> None:
    name = ceph.unique("grown")
    ceph.make_image(name, bytes(8 * MIB), OBJECT, features=FEATURES)
    with idle(mode_mount.image(name)):
        ceph.resize_image(name, 16 * MIB)
        ceph.write_image(name, NEW, 12 * MIB)
        assert_reads_right(ceph, mode_mount.image(name), name, tmp_path)


def test_a_clone_that_was_shrunk_and_grown_has_no_bytes_of_its_parent_there(
    ceph: Ceph, mode_mount: Mount, child: str, tmp_path: Path
) -> None:
    with idle(mode_mount.image(child)):
        ceph.resize_image(child, 4 * MIB)
        ceph.resize_image(child, 8 * MIB)
        assert_reads_right(ceph, mode_mount.image(child), child, tmp_path, parent=GOLDEN)


@pytest.mark.parametrize("size", [12 * MIB, 5 * MIB + 12_345], ids=["grown", "shrunk"])
def test_an_open_within_a_second_of_a_stat_reads_to_the_new_end(
    ceph: Ceph, mode_mount: Mount, golden: str, size: int
) -> None:
    path = mode_mount.image(golden)
    assert path.stat().st_size == 8 * MIB
    with opened(ceph, golden) as image:
        image.resize(size)
        image.write(NEW, size - MIB)
    with path.open("rb", buffering=0) as file:
        told = os.fstat(file.fileno()).st_size
        assert_same(file.read(), GOLDEN.ljust(size, b"\0")[: size - MIB] + NEW, before=GOLDEN)
        assert told == size


def test_what_was_discarded_after_a_flatten_is_zeros_and_not_the_former_parents(
    ceph: Ceph, mode_mount: Mount, child: str, tmp_path: Path
) -> None:
    with idle(mode_mount.image(child)):
        with opened(ceph, child) as image:
            image.flatten()
            image.discard(2 * MIB, MIB)
        assert_reads_right(ceph, mode_mount.image(child), child, tmp_path, parent=GOLDEN)


def test_a_clone_and_its_snapshot_are_right_after_the_parents_migration(
    ceph: Ceph, mode_mount: Mount, golden: str, child: str
) -> None:
    with opened(ceph, child) as image:
        image.write(NEW, 3 * MIB)
        image.create_snap("s")
        image.write(NEW, 5 * MIB)
    snapshot = GOLDEN[: 3 * MIB] + NEW + GOLDEN[4 * MIB :]
    head = snapshot[: 5 * MIB] + NEW + snapshot[6 * MIB :]
    path, of_snapshot = mode_mount.image(child), mode_mount.image(f"{child}@s")
    with idle(path) as file, idle(of_snapshot) as snapshot_file:
        migrate(ceph, golden, f"{golden}-new")
        assert ceph.exported(child) == head
        assert_same(cat(path), head)
        assert_same(cat(of_snapshot), snapshot)
        for descriptor, content in ((file, head), (snapshot_file, snapshot)):
            with contextlib.suppress(OSError):
                assert_same(os.pread(descriptor, MIB, 6 * MIB), content[6 * MIB : 7 * MIB])


@pytest.fixture(scope="module")
def many(ceph: Ceph) -> Iterator[str]:
    """A namespace with many images of long names."""
    namespace = ceph.unique("many")
    with ceph.ioctx() as ioctx:
        rbd.RBD().namespace_create(ioctx, namespace)
        ioctx.set_namespace(namespace)
        names = [f"{number:0200}" for number in range(MANY)]
        for name in names:
            rbd.RBD().create(ioctx, name, MIB, old_format=False, features=rbd.RBD_FEATURE_LAYERING)
        yield namespace
        for name in names:
            rbd.RBD().remove(ioctx, name)


def test_a_listing_that_is_read_on_later_does_not_set_back_the_size_of_an_open_file(
    ceph: Ceph, mode_mount: Mount, many: str
) -> None:
    folder = mode_mount.path / "rbd" / many
    late = f"{MANY - 1:0200}"
    with ceph.ioctx() as ioctx, os.scandir(folder) as listing:
        names = [next(listing).name]
        ioctx.set_namespace(many)
        with rbd.Image(ioctx, late) as image:
            size = image.size() + MIB
            image.resize(size)
            image.write(NEW, size - MIB)
        with (folder / late).open("rb", buffering=0) as file:
            assert os.fstat(file.fileno()).st_size == size
            names += [entry.name for entry in listing]
            assert names[0] != late
            assert late in names
            assert os.fstat(file.fileno()).st_size == size
            assert_same(file.read()[-MIB:], NEW)


def of_a_moment(content: bytes, right: bytes) -> bool:
    """Whether this may be read of what is being filled: of each block what is right, or zeros."""
    return set(blocks_of(content, right=right)) <= {"right", "zeros"}


@contextlib.contextmanager
def stopped(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """A process that does nothing for a while, in the middle of its work."""
    process.send_signal(signal.SIGSTOP)
    try:
        assert process.poll() is None, "it was done too soon"
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def deep_copying(ceph: Ceph, source: str, target: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A deep copy that takes its time, ended at the end; it has made the target's snapshot `s` and fills it."""
    slow = ["--ms-inject-delay-type=osd", "--ms-inject-delay-max=0.02", "--ms-inject-delay-probability=1"]
    command = ["rbd", "deep", "cp", "--no-progress", "--rbd-concurrent-management-ops", "1", *slow]
    environment = os.environ | {"CEPH_CONF": os.fspath(ceph.conf)}
    copying = subprocess.Popen([*command, f"rbd/{source}", f"rbd/{target}"], env=environment)

    def has_snapshot() -> bool:
        assert copying.poll() is None
        try:
            with ceph.ioctx() as ioctx, rbd.Image(ioctx, target, read_only=True) as image:
                return [snapshot["name"] for snapshot in image.list_snaps()] == ["s"]
        except rbd.ImageNotFound:
            return False

    try:
        wait_until(has_snapshot)
        yield copying
    finally:
        copying.kill()
        copying.wait(30)


def test_a_snapshot_that_a_deep_copy_fills_is_right_when_it_is_done(
    ceph: Ceph, mode_mount: Mount, golden: str, tmp_path: Path
) -> None:
    with opened(ceph, golden) as image:
        image.resize(4 * MIB)
        image.create_snap("s")
    target, right = ceph.unique("copied"), GOLDEN[: 4 * MIB]
    path = mode_mount.image(f"{target}@s")
    with deep_copying(ceph, golden, target) as copying, contextlib.ExitStack() as stack:
        with stopped(copying):
            wait_until(path.exists)
            assert of_a_moment(cat(path), right)
            older = stack.enter_context(idle(path))
        assert copying.wait(60) == 0
        assert_reads_right(ceph, path, f"{target}@s", tmp_path)
        with contextlib.suppress(OSError):
            assert of_a_moment(os.pread(older, 4 * MIB, 0), right)
    assert_same(cat(path), right)


# Root cause 3: a snapshot that is being filled


@TWO_MODES
def test_a_clone_of_a_snapshot_that_a_deep_copy_fills_is_right_when_it_is_done(
    ceph: Ceph, mode_mount: Mount, golden: str, tmp_path: Path
) -> None:
    with opened(ceph, golden) as image:
        image.resize(4 * MIB)
        image.create_snap("s")
    target, child = ceph.unique("copied"), ceph.unique("child")
    with deep_copying(ceph, golden, target) as copying:
        ceph.run("rbd", "clone", "--rbd-default-clone-format", "2", f"rbd/{target}@s", f"rbd/{child}")
        with opened(ceph, child) as image:
            image.create_snap("t")
        paths = [mode_mount.image(name) for name in (child, f"{child}@t")]
        with contextlib.ExitStack() as stack:
            with stopped(copying):
                for path in paths:
                    stack.enter_context(idle(path))
                    assert of_a_moment(cat(path), GOLDEN)
            assert copying.wait(60) == 0
            assert_reads_right(ceph, paths[0], child, tmp_path)
            assert_reads_right(ceph, paths[1], f"{child}@t", tmp_path)


@pytest.mark.parametrize("stays_open", [True, False], ids=["older descriptor", "opened twice"])
@TWO_MODES
def test_a_snapshot_shows_what_a_writer_puts_there_whose_snapshot_context_is_old(
    ceph: Ceph, mode_mount: Mount, golden: str, *, stays_open: bool
) -> None:
    path = mode_mount.image(f"{golden}@s")
    with opened(ceph, golden) as writer, contextlib.ExitStack() as stack:
        writer.write(NEW[:OBJECT], 0)  # it has the exclusive lock now, and keeps it
        ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{golden}@s")
        if stays_open:
            stack.enter_context(idle(path))
        before = NEW[:OBJECT] + GOLDEN[OBJECT:]
        assert_same(cat(path), before)
        with ceph.ioctx() as ioctx:
            write_object(ioctx, image_id(ceph, golden), 3, NEW[:OBJECT])  # as it does that has not heard of it yet
        after = before[: 3 * OBJECT] + NEW[:OBJECT] + before[4 * OBJECT :]
        assert ceph.exported(f"{golden}@s") == after
        assert_same(cat(path), after, before=before)


# Root cause 1: further cases


@TWO_MODES
@pytest.mark.parametrize("how", ["discard", "sparsify"])
def test_what_became_a_hole_after_a_flatten_is_zeros(
    ceph: Ceph, mode_mount: Mount, child: str, how: str, tmp_path: Path
) -> None:
    path = mode_mount.image(child)
    with idle(path):
        with opened(ceph, child) as image:
            image.flatten()
            if how == "discard":
                image.discard(0, 2 * MIB)
            else:
                image.write(bytes(2 * MIB), 0)
                image.sparsify(4096)
        assert_reads_right(ceph, path, child, tmp_path, parent=GOLDEN)
    # What was read wrong does not stay cached under the present header, either.
    assert_reads_right(ceph, path, child, tmp_path, parent=GOLDEN)


@TWO_MODES
def test_what_was_read_wrong_does_not_stay_cached_after_the_last_close(
    ceph: Ceph, mode_mount: Mount, child: str, tmp_path: Path
) -> None:
    path = mode_mount.image(child)
    with idle(path) as file:
        with opened(ceph, child) as image:
            image.flatten()
            image.discard(2 * MIB, MIB)
        with contextlib.suppress(OSError):
            os.pread(file, 8 * MIB, 0)
        with idle(path) as another, contextlib.suppress(OSError):
            os.pread(another, 8 * MIB, 0)
    assert_reads_right(ceph, path, child, tmp_path, parent=GOLDEN)


@TWO_MODES
@pytest.mark.parametrize("reads", [True, False], ids=["read before", "idle"])
def test_an_image_that_was_shrunk_and_grown_under_a_descriptor_is_copied_right(
    ceph: Ceph, mode_mount: Mount, golden: str, tmp_path: Path, *, reads: bool
) -> None:
    path = mode_mount.image(golden)
    with idle(path) as file:
        if reads:
            os.pread(file, 8 * MIB, 0)
        ceph.resize_image(golden, 3 * MIB)
        ceph.resize_image(golden, 12 * MIB)
        ceph.write_image(golden, NEW, 9 * MIB)
        assert_reads_right(ceph, path, golden, tmp_path, before=GOLDEN)
        with contextlib.suppress(OSError):
            data = os.pread(file, MIB, 4 * MIB)
            assert set(blocks_of(data, before=GOLDEN[4 * MIB : 5 * MIB])) <= {"before", "zeros"}


# Root cause 6: a writer that asks for no lock


@in_modes(("default", "watching"), ("default", "read-only"), ("bare", "read-only"))
@pytest.mark.parametrize("stays_open", [True, False], ids=["older descriptor", "opened twice"])
def test_an_open_sees_what_a_client_wrote_that_takes_no_lock(
    ceph: Ceph, mode_mount: Mount, golden: str, *, stays_open: bool
) -> None:
    path, image = mode_mount.image(golden), image_id(ceph, golden)
    with watching(ceph, image) as ioctx, contextlib.ExitStack() as stack:
        if stays_open:
            stack.enter_context(idle(path))
        assert_same(cat(path), GOLDEN)
        write_object(ioctx, image, 5, NEW[:OBJECT])
        after = GOLDEN[: 5 * OBJECT] + NEW[:OBJECT] + GOLDEN[6 * OBJECT :]
        assert ceph.exported(golden) == after
        assert_same(cat(path), after, before=GOLDEN)


@TWO_MODES
def test_an_open_sees_what_a_client_wrote_that_takes_no_lock_and_is_gone(
    ceph: Ceph, mode_mount: Mount, golden: str
) -> None:
    path, image = mode_mount.image(golden), image_id(ceph, golden)
    with watching(ceph, image) as ioctx:
        assert_same(cat(path), GOLDEN)
        write_object(ioctx, image, 5, NEW[:OBJECT])
    assert_same(cat(path), GOLDEN[: 5 * OBJECT] + NEW[:OBJECT] + GOLDEN[6 * OBJECT :], before=GOLDEN)


# Root cause 7: librbd's own cache

CACHE_ON = {
    "rbd_cache": "true",
    "rbd_cache_policy": "writeback",
    "rbd_cache_writethrough_until_flush": "false",
    "rbd_cache_max_dirty_age": "0.1",
}


@contextlib.contextmanager
def configured(ceph: Ceph, level: str, where: str) -> Iterator[None]:
    """librbd's cache switched on for a pool or an image, and back at the end."""
    try:
        for key, value in CACHE_ON.items():
            ceph.run("rbd", "config", level, "set", where, key, value)
        yield
    finally:
        for key in CACHE_ON:
            with contextlib.suppress(subprocess.CalledProcessError):
                ceph.run("rbd", "config", level, "remove", where, key)


@TWO_MODES
@pytest.mark.parametrize("level", ["image", "pool"])
def test_an_open_sees_what_was_written_though_librbd_was_told_to_cache(
    ceph: Ceph, mode_mount: Mount, golden: str, level: str
) -> None:
    path = mode_mount.image(golden)
    with configured(ceph, level, f"rbd/{golden}" if level == "image" else "rbd"), idle(path):
        for number in range(3):
            expected = ceph.exported(golden)
            assert_same(cat(path), expected, before=GOLDEN)
            ceph.write_image(golden, NEW, number * MIB)
        assert_same(cat(path), NEW * 3 + GOLDEN[3 * MIB :], before=GOLDEN)


@TWO_MODES
def test_an_open_sees_what_was_written_while_librbd_caches_and_the_writer_stays(
    ceph: Ceph, mode_mount: Mount, golden: str
) -> None:
    path = mode_mount.image(golden)
    with configured(ceph, "image", f"rbd/{golden}"), idle(path), opened(ceph, golden) as writer:
        for number in range(3):
            cat(path)
            writer.write(NEW, number * MIB)
            writer.flush()
        assert_same(cat(path), NEW * 3 + GOLDEN[3 * MIB :], before=GOLDEN)
