"""Scattered reads, which go from the kernel to librbd and back without Python, as soon as a file is read so."""

import contextlib
import errno
import json
import os
import random
import re
import signal
import threading
from collections.abc import Callable

import pytest
import rbd

from tests.ceph import MIB, READ_ONLY_CAPS, Ceph, Mount, random_bytes, wait_until

Mounts = Callable[..., Mount]

KIB = 1024
SIZE = 48 * MIB
STOP_SECONDS = 5.0
DIRECT = ("-d", "--direct-io")
"""With each read() a request, and a log that tells how it was answered."""

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


def begin(mount: Mount, file: int, size: int = SIZE) -> None:
    """Read here and there until that goes without Python."""
    before = mount.log.count("need no Python from now on")
    wait_until(lambda: bool(scatter(file, size, 20)) and mount.log.count("need no Python from now on") > before)


def answered(mount: Mount) -> int:
    """How many reads of the file that was closed last were answered so."""
    begun = mount.log.count("need no Python from now on")
    wait_until(lambda: mount.log.count("answered without Python so far") == begun)
    return int(re.findall(r"(\d+) reads of this image were answered without Python so far", mount.log)[-1])


@pytest.mark.parametrize("features", [61, rbd.RBD_FEATURE_LAYERING], ids=["all features", "layering"])
def test_scattered_reads_are_what_rbd_export_reads(ceph: Ceph, mounts: Mounts, features: int) -> None:
    mount, name = mounts(*DIRECT), ceph.unique("scattered")
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
            begin(mount, file.fileno())
            for offset, data in scatter(file.fileno(), SIZE, 700, seed=2):
                assert data == content[offset : offset + len(data)], (spec, offset)
        assert answered(mount) > 100, spec  # the others: near another, of what is cached, of zeros, over two objects


def test_what_needs_a_look_each_time_and_what_lies_in_stripes_takes_the_long_way(ceph: Ceph, mounts: Mounts) -> None:
    mount, parent, clone, striped = mounts(*DIRECT), *(ceph.unique(kind) for kind in ("parent", "clone", "striped"))
    content = random_bytes(SIZE)
    ceph.make_image(parent, content)
    ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{parent}@s")
    ceph.run("rbd", "clone", "--rbd-default-clone-format", "2", f"rbd/{parent}@s", f"rbd/{clone}")
    ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{clone}@s")
    ceph.make_image(striped, content, stripe_unit=64 * KIB, stripe_count=4)
    for name in (clone, striped):
        with mount.image(name).open("rb", buffering=0) as file:
            for offset, data in scatter(file.fileno(), SIZE, 300):
                assert data == content[offset : offset + len(data)], (name, offset)
    assert "need no Python" not in mount.log
    with mount.image(f"{clone}@s").open("rb", buffering=0) as file:
        begin(mount, file.fileno())
        for offset, data in scatter(file.fileno(), SIZE, 300):
            assert data == content[offset : offset + len(data)], offset
    assert answered(mount) > 50


def test_a_sequential_reader_is_read_ahead_also_after_scattered_reads(ceph: Ceph, mounts: Mounts) -> None:
    mount, name, content = mounts(*DIRECT), ceph.unique("then"), random_bytes(SIZE)
    ceph.make_image(name, content)

    def reads_answered() -> int:
        return int(json.loads(ceph.run("ceph", "tell", "osd.0", "perf", "dump", "osd"))["osd"]["op_r"])

    with mount.image(name).open("rb", buffering=0) as file:
        begin(mount, file.fileno())
        before = reads_answered()
        for offset in range(5 * MIB, 13 * MIB, 4 * KIB):
            assert os.pread(file.fileno(), 4 * KIB, offset) == content[offset : offset + 4 * KIB]
        assert reads_answered() - before < 100


def test_others_read_beside_it(ceph: Ceph, mounts: Mounts) -> None:
    mount, name, other = mounts(*DIRECT), ceph.unique("beside"), ceph.unique("other")
    content = random_bytes(SIZE)
    ceph.make_image(name, content)
    ceph.make_image(other, content)
    wrong: list[int] = []
    stop = threading.Event()
    with mount.image(name).open("rb", buffering=0) as file:
        begin(mount, file.fileno())

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
    assert answered(mount) > 100


def test_what_others_write_is_read_at_once(ceph: Ceph, mounts: Mounts) -> None:
    mount, name, content = mounts(*DIRECT), ceph.unique("written"), random_bytes(SIZE)
    ceph.make_image(name, content)
    with mount.image(name).open("rb", buffering=0) as file:
        begin(mount, file.fileno())
        chance = random.Random(3)
        fresh = 0
        for number in range(40):
            offset = chance.randrange(SIZE // MIB) * MIB + 256 * KIB
            block = bytes([1 + number]) * (4 * KIB)
            ceph.write_image(name, block, offset)
            fresh += os.pread(file.fileno(), 4 * KIB, offset) == block
        assert fresh > 30  # all, but for what was read before the shortcut was there, and is in the cache


@pytest.mark.parametrize("is_snapshot", [False, True], ids=["image", "snapshot"])
def test_what_is_removed_is_an_error_and_never_zeros(ceph: Ceph, mounts: Mounts, is_snapshot: bool) -> None:
    mount, name = mounts(*DIRECT, *ceph.credentials(READ_ONLY_CAPS)), ceph.unique("removed")
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
        begin(mount, file)
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
    mount, name, content = mounts(*DIRECT), ceph.unique("resized"), without_zeros[:SIZE]
    ceph.make_image(name, content)
    with mount.image(name).open("rb", buffering=0) as file:
        begin(mount, file.fileno())
        ceph.resize_image(name, 20 * MIB + 100)
        for number in range(100):
            offset = random.Random(number).randrange(SIZE - 4 * KIB)
            end = min(offset + 4 * KIB, 20 * MIB + 100)
            assert os.pread(file.fileno(), 4 * KIB, offset) == content[offset:end]
        ceph.resize_image(name, SIZE)
        wait_until(lambda: os.fstat(file.fileno()).st_size == SIZE)
        assert os.pread(file.fileno(), 4 * KIB, 30 * MIB) == bytes(4 * KIB)
        assert os.pread(file.fileno(), 4 * KIB, 10 * MIB) == content[10 * MIB : 10 * MIB + 4 * KIB]
    with mount.image(name).open("rb", buffering=0) as file:  # a new open takes the shortcut again
        begin(mount, file.fileno())


def test_without_an_osd_it_is_an_error_and_sigterm_ends_the_mount_while_such_a_read_waits(
    ceph: Ceph, mounts: Mounts
) -> None:
    mount, name = mounts(*DIRECT, "--osd-timeout", "2"), ceph.unique("waits")
    mount.expect("WARNING", "ERROR")
    ceph.make_image(name, random_bytes(SIZE))
    file = os.open(mount.image(name), os.O_RDONLY)
    errors: list[int] = []

    def wait() -> None:
        try:
            os.pread(file, 4 * KIB, 33 * MIB + 4 * KIB)
        except OSError as error:
            errors.append(error.errno or 0)

    begin(mount, file)
    ceph.devcluster.kill_daemon("osd.0")
    try:
        wait()
        assert errors in ([errno.ETIMEDOUT], [errno.EIO])
        assert f"cannot read rbd/{name} at {33 * MIB + 4 * KIB}" in mount.log
        reader = threading.Thread(target=wait)
        reader.start()
        reader.join(0.5)
        assert reader.is_alive()
        os.kill(mount.pid, signal.SIGTERM)
        wait_until(lambda: not mount.is_running, STOP_SECONDS)
        reader.join(10)
        assert errors[1:] in ([errno.ENOTCONN], [errno.ECONNABORTED], [errno.EIO])
    finally:
        ceph.devcluster.start_daemon("osd.0")
        with contextlib.suppress(OSError):  # close() asks a file system that is gone
            os.close(file)
    assert not mount.is_mounted
