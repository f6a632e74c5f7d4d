"""Who reads while others shrink, grow and remove: never zeros where there was data, never a wrong byte."""

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import rbd

from tests.cluster import MIB, Ceph, Mount, random_bytes, wait_until
from tests.truth import FEATURES, OBJECT, assert_same, blocks_of, copied, describe, in_modes, looping, opened, read_all

SIZE = 24 * MIB
SMALL = 5 * MIB + 12_345
CONTENT = random_bytes(SIZE, seed=1)
GROWN = CONTENT[:SMALL].ljust(SIZE, b"\0")
ROUNDS = 20
PAGE_CACHE = in_modes(("default", "watching"), ("default", "read-only"), ("no cache", "read-only"))


class Readers:
    """One that copies a file again and again, and three that read it here and there, through the kernel's pages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_grown = False
        """There may be zeros beyond the small size."""
        self.wrong: list[str] = []
        self.copies: list[int] = []
        """The length of each that ended without an error."""
        self.ended = 0
        """Copies and reads, also by an error."""

    def _check(self, data: bytes, offset: int) -> None:
        end = offset + len(data)
        contents = {"right": CONTENT[offset:end]} | ({"grown": GROWN[offset:end]} if self.is_grown else {})
        if not set(blocks_of(data, **contents)) <= set(contents):
            self.wrong.append(f"at {offset / MIB:g}M: {describe(data, **contents)}")

    def copy(self) -> None:
        """Read from the beginning to the end."""
        total = 0
        with contextlib.suppress(OSError), self.path.open("rb", buffering=0) as file:
            while data := file.read(128 << 10):
                self._check(data, total)
                total += len(data)
            self.copies.append(total)
            if total < SMALL:
                self.wrong.append(f"a copy of {total} bytes")
        self.ended += 1

    def read(self, file: int, chance: random.Random) -> None:
        """Read a range that the kernel shall not have."""
        length = chance.choice([4096, 65536, MIB // 2])
        offset = chance.randrange(0, SIZE - length, 4096)
        os.posix_fadvise(file, offset, length, os.POSIX_FADV_DONTNEED)
        with contextlib.suppress(OSError):
            data = read_all(file, length, offset)
            self._check(data, offset)
            if len(data) < length and offset + len(data) < SMALL:
                self.wrong.append(f"at {offset / MIB:g}M: {len(data)} of {length} bytes")
        self.ended += 1

    def go_on(self) -> None:
        """Wait for some more of both."""
        copies, ended = len(self.copies), self.ended
        wait_until(lambda: self.ended > ended + 300 or len(self.copies) > copies + 3)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """In the background; what they find wrong fails at the end."""
        files = [os.open(self.path, os.O_RDONLY) for _ in range(3)]
        randoms = [partial(self.read, file, random.Random(file)) for file in files]
        try:
            with looping(self.copy, *randoms) as errors:
                wait_until(lambda: self.ended > 50 and bool(self.copies))
                yield
            assert not errors
            assert not self.wrong, self.wrong[:5]
        finally:
            for file in files:
                with contextlib.suppress(OSError):
                    os.close(file)


def readers_of(ceph: Ceph, mount: Mount) -> Readers:
    """Of a new image."""
    name = ceph.unique("shrunk")
    ceph.make_image(name, CONTENT, OBJECT, features=FEATURES)
    return Readers(mount.image(name))


@PAGE_CACHE
def test_an_image_shrunk_under_readers_of_the_page_cache_is_never_zeros_where_there_was_data(
    ceph: Ceph, mode_mount: Mount, tmp_path: Path
) -> None:
    for _ in range(4):
        readers = readers_of(ceph, mode_mount)
        with readers.running():
            ceph.resize_image(readers.path.name, SMALL)
            readers.go_on()
        assert_same(copied(readers.path, tmp_path), CONTENT[:SMALL], before=CONTENT)


@PAGE_CACHE
def test_an_image_shrunk_and_grown_under_readers_of_the_page_cache_is_copied_whole(
    ceph: Ceph, mode_mount: Mount, tmp_path: Path
) -> None:
    readers = readers_of(ceph, mode_mount)
    readers.is_grown = True
    with readers.running():
        ceph.resize_image(readers.path.name, SMALL)
        readers.go_on()
        assert_same(copied(readers.path, tmp_path), CONTENT[:SMALL], before=CONTENT)
        ceph.resize_image(readers.path.name, SIZE)
        readers.go_on()
        assert_same(copied(readers.path, tmp_path), GROWN, before=CONTENT)
    assert_same(copied(readers.path, tmp_path), GROWN, before=CONTENT)
    assert ceph.exported(readers.path.name) == GROWN


class SnapshotReaders:
    """Two that read a snapshot here and there."""

    def __init__(self, path: Path, content: bytes, after: bytes) -> None:
        self.path = path
        self.content = content
        self.after = after
        self.wrong: list[str] = []
        self.ended = 0
        self.gone = 0
        """Reads that failed."""

    def read(self, file: int) -> None:
        """Read a range, of the cluster where nothing is cached."""
        offset = random.randrange(0, len(self.content), 65536)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            data, right = os.pread(file, 65536, offset), self.content[offset : offset + 65536]
            if len(data) < len(right):  # the kernel gives what pages it has before one that fails, and then the error
                data += os.pread(file, len(right) - len(data), offset + len(data))
            if data != right:
                was = describe(data, right=right, after=self.after[offset : offset + 65536])
                self.wrong.append(f"at {offset / MIB:g}M: {was}")
        except OSError:
            self.gone += 1
        self.ended += 1

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """In the background, until the reads fail, or for some while more."""
        files = [os.open(self.path, os.O_RDONLY) for _ in range(2)]
        try:
            with looping(*(partial(self.read, file) for file in files)):
                wait_until(lambda: self.ended > 10)
                yield
                ended = self.ended
                wait_until(lambda: self.gone > 5 or self.ended > ended + 200)
        finally:
            for file in files:
                with contextlib.suppress(OSError):
                    os.close(file)


def remove_snapshots(image: rbd.Image, names: list[str]) -> None:
    """One after the other."""
    for name in names:
        image.remove_snap(name)


@in_modes(("bare", "read-only"), ("default", "watching"))
def test_a_snapshot_removed_under_two_readers_20_times_never_gives_a_wrong_byte(ceph: Ceph, mode_mount: Mount) -> None:
    name = ceph.unique("snapped")
    contents = [random_bytes(4 * MIB, seed) for seed in range(ROUNDS + 1)]
    ceph.make_image(name, contents[0], OBJECT, features=FEATURES)
    wrong = []
    with opened(ceph, name) as writer, opened(ceph, name) as other:
        for number in range(ROUNDS):
            read, *others = [f"{snapshot}{number}" for snapshot in ("read", "a", "b")]
            for snapshot in (read, *others):
                writer.create_snap(snapshot)
            readers = SnapshotReaders(mode_mount.image(f"{name}@{read}"), contents[number], contents[number + 1])
            with readers.running():
                remove = threading.Thread(target=remove_snapshots, args=(other, others))
                remove.start()
                writer.remove_snap(read)
                writer.write(contents[number + 1], 0)
                writer.flush()
                remove.join(30)
            wrong += [f"round {number} {what}" for what in readers.wrong]
    assert not wrong, f"{len(wrong)} reads: {wrong[:5]}"
