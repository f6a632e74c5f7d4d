"""Reads here and there: right, past the object cache, and no obstacle to whoever reads on from there or beside it."""

import contextlib
import errno
import json
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import rbd

from tests.cluster import MIB, READ_ONLY_CAPS, Ceph, Mount, random_bytes, wait_until

Mounts = Callable[..., Mount]

KIB = 1024
SIZE = 48 * MIB
ALL_FEATURES = 61
LONE_READS = 20
"""A few more than those by which a random reader is known: 16 in a row, none near another."""
OTHER_OPS = 30
"""Operations of the OSD in the time of a test that are no reads of data: rbdfs asks for a header about once a second,
and there is more in a cluster."""
STOP_SECONDS = 5.0
DIRECT = "--direct-io"
"""With each read() a request."""

without_zeros = bytes(range(1, 256)) * (SIZE // 255 + 1)
"""Where a zero in it is what was removed."""


def scatter(file: int, size: int, count: int, seed: int = 1) -> list[tuple[int, bytes]]:
    """Read small pieces at random, and return where and what."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        length = chance.choice([512, 4 * KIB, 5000, 64 * KIB])
        offset = chance.randrange(size - length)
        found.append((offset, os.pread(file, length, offset)))
    return found


def begin(file: int, start: int = 0, end: int = SIZE) -> None:
    """Be a random reader, in this part of a file."""
    for number in range(LONE_READS):
        assert len(os.pread(file, 4 * KIB, start + number * ((end - start) // LONE_READS))) == 4 * KIB


def reads_answered(ceph: Ceph) -> int:
    """How many operations that read the OSD has done."""
    return int(json.loads(ceph.run("ceph", "tell", "osd.0", "perf", "dump", "osd"))["osd"]["op_r"])


@pytest.mark.parametrize(
    ("features", "way"),
    [(ALL_FEATURES, [DIRECT]), (rbd.RBD_FEATURE_LAYERING, [DIRECT]), (ALL_FEATURES, [])],
    ids=["all features", "layering", "page cache"],
)
def test_scattered_reads_are_what_rbd_export_reads(ceph: Ceph, mounts: Mounts, features: int, way: list[str]) -> None:
    mount, name = mounts(*way), ceph.unique("random")
    content = bytearray(random_bytes(SIZE))
    content[9 * MIB : 14 * MIB] = bytes(5 * MIB)  # zeros that are there, and an object that is not
    content[30 * MIB : 30 * MIB + 6000] = bytes(6000)
    ceph.make_image(name, b"", features=features)
    ceph.resize_image(name, SIZE)
    ceph.write_image(name, bytes(content[: 12 * MIB]))
    ceph.write_image(name, bytes(content[16 * MIB :]), 16 * MIB)
    content[12 * MIB : 16 * MIB] = bytes(4 * MIB)
    ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{name}@s")
    assert ceph.exported(name) == content
    for spec in (name, f"{name}@s"):
        with mount.image(spec).open("rb", buffering=0) as file:
            begin(file.fileno())
            for offset, data in scatter(file.fileno(), SIZE, 700, seed=2):
                assert data == content[offset : offset + len(data)], (spec, offset)


def test_scattered_reads_of_clones_their_snapshots_and_stripes_are_right(ceph: Ceph, mounts: Mounts) -> None:
    mount, parent, clone, striped = mounts(DIRECT), *(ceph.unique(kind) for kind in ("parent", "clone", "striped"))
    content = bytearray(random_bytes(SIZE))
    ceph.make_image(parent, bytes(content))
    ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{parent}@s")
    ceph.run("rbd", "clone", "--rbd-default-clone-format", "2", f"rbd/{parent}@s", f"rbd/{clone}")
    content[22 * MIB + 1000 : 27 * MIB] = random_bytes(5 * MIB - 1000, seed=2)
    ceph.write_image(clone, bytes(content[22 * MIB + 1000 : 27 * MIB]), 22 * MIB + 1000)
    ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{clone}@s")
    ceph.make_image(striped, bytes(content), stripe_unit=64 * KIB, stripe_count=4)
    for spec in (clone, f"{clone}@s", striped):
        with mount.image(spec).open("rb", buffering=0) as file:
            begin(file.fileno())
            for offset, data in scatter(file.fileno(), SIZE, 300):
                assert data == content[offset : offset + len(data)], (spec, offset)


def test_small_random_reads_are_not_kept_and_are_answered_from_what_is(ceph: Ceph, mounts: Mounts) -> None:
    mount, name, content = mounts(DIRECT), ceph.unique("kept"), without_zeros[:SIZE]
    ceph.make_image(name, content)
    with mount.image(name).open("rb", buffering=0) as file:

        def reads_of_five_passes(length: int, step: int) -> int:
            before = reads_answered(ceph)
            for _ in range(5):
                for offset in range(0, SIZE, step):
                    assert os.pread(file.fileno(), length, offset) == content[offset : offset + length]
            return reads_answered(ceph) - before

        small = reads_of_five_passes(4 * KIB, MIB)  # 48 reads a pass; until it was known as random, 15 were kept
        assert 48 + 4 * 33 <= small < 48 + 4 * 33 + OTHER_OPS
        large = reads_of_five_passes(128 * KIB, 3 * MIB)  # 16 reads a pass, too large not to be kept
        assert 16 <= large < 16 + OTHER_OPS


def test_a_sequential_reader_is_read_ahead_also_after_scattered_reads(ceph: Ceph, mounts: Mounts) -> None:
    mount, name, content = mounts(DIRECT), ceph.unique("then"), random_bytes(SIZE)
    ceph.make_image(name, content)
    with mount.image(name).open("rb", buffering=0) as file:
        begin(file.fileno())
        before = reads_answered(ceph)
        for offset in range(5 * MIB, 13 * MIB, 4 * KIB):  # 2,048 reads
            assert os.pread(file.fileno(), 4 * KIB, offset) == content[offset : offset + 4 * KIB]
        assert reads_answered(ceph) - before < 100


def test_others_read_beside_it(ceph: Ceph, mounts: Mounts) -> None:
    mount, name, other = mounts(DIRECT), ceph.unique("beside"), ceph.unique("other")
    content = random_bytes(SIZE)
    ceph.make_image(name, content)
    ceph.make_image(other, content)
    wrong: list[int] = []
    stop = threading.Event()
    with mount.image(name).open("rb", buffering=0) as file:
        begin(file.fileno())

        def read(seed: int) -> None:
            while not stop.is_set():
                seed += 10
                pieces = scatter(file.fileno(), SIZE, 50, seed)
                wrong.extend(offset for offset, data in pieces if data != content[offset : offset + len(data)])

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(3):  # opened and closed meanwhile
                assert mount.image(other).read_bytes() == content
                assert sorted(os.listdir(mount.path / "rbd"))
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
    assert not wrong


def test_what_others_write_is_read_at_once(ceph: Ceph, mounts: Mounts) -> None:
    # Of a file that was opened before, no more is promised than that a block is old or new. But what a random reader
    # reads is not kept, so it finds what is there.
    mount, name, content = mounts(DIRECT), ceph.unique("written"), random_bytes(SIZE)
    ceph.make_image(name, content)
    with mount.image(name).open("rb", buffering=0) as file:
        begin(file.fileno(), end=SIZE // 2)
        for offset in range(SIZE // 2, SIZE, 3 * MIB):
            assert os.pread(file.fileno(), 4 * KIB, offset) == content[offset : offset + 4 * KIB]
            begin(file.fileno(), end=SIZE // 2)
            ceph.write_image(name, bytes([1 + offset // MIB]) * (4 * KIB), offset)
            assert os.pread(file.fileno(), 4 * KIB, offset) == bytes([1 + offset // MIB]) * (4 * KIB)


@pytest.mark.parametrize("is_snapshot", [False, True], ids=["image", "snapshot"])
def test_what_is_removed_is_an_error_and_never_zeros(ceph: Ceph, mounts: Mounts, is_snapshot: bool) -> None:
    mount, name = mounts(DIRECT, *ceph.credentials(READ_ONLY_CAPS)), ceph.unique("removed")
    mount.expect("ERROR", "WARNING")
    content = without_zeros[:SIZE]
    ceph.make_image(name, content)
    ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{name}@s")
    if not is_snapshot:
        ceph.run("rbd", "snap", "rm", "--no-progress", f"rbd/{name}@s")
    errors: list[int] = []
    wrong: list[int] = []
    file = os.open(mount.image(f"{name}@s" if is_snapshot else name), os.O_RDONLY)
    try:
        begin(file)
        stop = threading.Event()

        def read(seed: int) -> None:
            chance = random.Random(seed)
            while not stop.is_set():
                offset = chance.randrange(SIZE // (4 * KIB)) * 4 * KIB
                try:
                    data = os.pread(file, 4 * KIB, offset)
                except OSError as error:
                    errors.append(error.errno or 0)
                else:
                    if data != content[offset : offset + 4 * KIB]:
                        wrong.append(offset)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        try:
            if is_snapshot:
                ceph.write_image(name, b"\xff" * SIZE)  # what a read at a removed snapshot may find
                ceph.run("rbd", "snap", "rm", "--no-progress", f"rbd/{name}@s")
            else:
                ceph.run("rbd", "rm", "--no-progress", f"rbd/{name}")
            wait_until(lambda: errno.EIO in errors)
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
        with pytest.raises(OSError, match="Input/output"):
            os.pread(file, 4 * KIB, MIB)
    finally:
        with pytest.raises(OSError, match="Input/output"):  # so that cp and dd notice
            os.close(file)
    assert not wrong
    assert set(errors) == {errno.EIO}


def test_an_image_that_shrinks_and_grows_ends_where_it_ends(ceph: Ceph, mounts: Mounts) -> None:
    mount, name, content = mounts(DIRECT), ceph.unique("resized"), without_zeros[:SIZE]
    ceph.make_image(name, content)
    with mount.image(name).open("rb", buffering=0) as file:
        begin(file.fileno())
        ceph.resize_image(name, 20 * MIB + 100)
        for number in range(100):
            offset = random.Random(number).randrange(SIZE - 4 * KIB)
            end = min(offset + 4 * KIB, 20 * MIB + 100)
            assert os.pread(file.fileno(), 4 * KIB, offset) == content[offset:end]
        ceph.resize_image(name, SIZE)
        wait_until(lambda: os.fstat(file.fileno()).st_size == SIZE)
        assert os.pread(file.fileno(), 4 * KIB, 30 * MIB) == bytes(4 * KIB)
        assert os.pread(file.fileno(), 4 * KIB, 10 * MIB) == content[10 * MIB : 10 * MIB + 4 * KIB]
    content = content[: 20 * MIB + 100] + bytes(SIZE - 20 * MIB - 100)
    with mount.image(name).open("rb", buffering=0) as file:
        begin(file.fileno())
        for offset, data in scatter(file.fileno(), SIZE, 100):
            assert data == content[offset : offset + len(data)], offset


def waits_for_the_mount(thread: threading.Thread) -> bool:
    """Whether a thread is inside a call that the kernel has passed on to a mount."""
    try:
        return "fuse" in Path(f"/proc/self/task/{thread.native_id}/stack").read_text()
    except FileNotFoundError:
        return False


def test_without_an_osd_it_is_an_error_and_sigterm_ends_the_mount_while_such_a_read_waits(
    ceph: Ceph, mounts: Mounts
) -> None:
    mount, name = mounts(DIRECT, "--osd-timeout", "5", module="tests.patient_mount"), ceph.unique("waits")
    mount.expect("WARNING", "ERROR")
    ceph.make_image(name, random_bytes(SIZE))
    file = os.open(mount.image(name), os.O_RDONLY)
    errors: list[int] = []

    def wait() -> None:
        try:
            os.pread(file, 4 * KIB, 33 * MIB + 4 * KIB)
        except OSError as error:
            errors.append(error.errno or 0)

    begin(file)
    ceph.devcluster.kill_daemon("osd.0")
    try:
        wait()
        assert errors in ([errno.ETIMEDOUT], [errno.EIO])
        assert f"cannot read rbd/{name} at {33 * MIB + 4 * KIB}" in mount.log
        reader = threading.Thread(target=wait)
        reader.start()
        wait_until(lambda: waits_for_the_mount(reader))
        os.kill(mount.pid, signal.SIGTERM)
        wait_until(lambda: not mount.is_running, STOP_SECONDS)
        reader.join(10)
        assert errors[1:] in ([errno.ENOTCONN], [errno.ECONNABORTED], [errno.EIO])
    finally:
        ceph.devcluster.start_daemon("osd.0")
        with contextlib.suppress(OSError):  # close() asks a file system that is gone
            os.close(file)
    assert not mount.is_mounted
