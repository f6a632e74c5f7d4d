"""Readers that open files themselves: here and there, for a long time, by mmap, and of images that others change."""

import errno
import mmap
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ClassVar

from tests.cluster import CHECKOUT
from tests.soak.blocks import BLOCK_BYTES, garbage, wrong_blocks
from tests.soak.changes import POOL as CHANGING_POOL
from tests.soak.changes import View
from tests.soak.fixed import FULL, POOL, Fixed, check
from tests.soak.ledger import FailedError, Ledger, WrongError
from tests.soak.reader import Reader
from tests.soak.site import Site
from tests.truth import read_all

THREADS = 4
READS = 64
"""Of a thread, in a round."""
READ_MAX = 64 << 10
GONE = (errno.ENOENT, errno.ESTALE, errno.EIO)
"""EIO: the kernel says so to a reader of a page that another read has failed to fetch."""


@contextmanager
def opened(path: os.PathLike[str], flags: int = 0) -> Iterator[int]:
    """A descriptor."""
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class Small(Reader):
    """Small reads here and there."""

    def read_somewhere(self, descriptor: int, fixed: Fixed, *, direct: bool = False) -> int:
        """One range, compared and timed."""
        length = self.random.randrange(1, READ_MAX)
        offset = self.random.randrange(fixed.size - length)
        if direct:
            length, offset = length // BLOCK_BYTES * BLOCK_BYTES + BLOCK_BYTES, offset // BLOCK_BYTES * BLOCK_BYTES
            length = min(length, fixed.size - offset)
        began = time.monotonic()
        try:
            with mmap.mmap(-1, length) as buffer, memoryview(buffer) as view:  # O_DIRECT wants it aligned
                count = os.preadv(descriptor, [buffer], offset)
                # Pages that the page cache has may come first, and the error at the next read (SEMANTICS: E1).
                while not direct and count < length and (more := os.preadv(descriptor, [view[count:]], offset + count)):
                    count += more
                data = buffer[:count]
        finally:
            self.ledger.answered(time.monotonic() - began)
        check(f"{self.name} of {fixed.name}", data, fixed.bytes_at(offset, length), offset)
        return length


class Random(Small):
    """Several threads, some of them past the page cache."""

    def round(self) -> int:
        """All threads at once, on images of their own choice."""
        with ThreadPoolExecutor(THREADS) as threads:
            return sum(threads.map(self._reads, range(THREADS)))

    def _reads(self, number: int) -> int:
        fixed = self.random.choice(list(self.site.fixed.values()))
        direct = number % 2 == 0
        with opened(self.site.path(fixed), os.O_DIRECT if direct else 0) as descriptor:
            return sum(self.read_somewhere(descriptor, fixed, direct=direct) for _ in range(READS))


class LongOpen(Small):
    """Files that are opened once, and stay open."""

    def __init__(self, site: Site, ledger: Ledger, seed: int) -> None:
        super().__init__(site, ledger, seed)
        self._open: list[tuple[int, Fixed]] = []

    def round(self) -> int:
        """Some reads of each."""
        if not self._open:
            full = self.site.fixed[FULL]
            self._open.append((os.open(self.site.mount.path / POOL / f"{FULL}@base", os.O_RDONLY), full))
        for fixed in list(self.site.fixed.values())[len(self._open) - 1 :]:  # the rest, if one could not be opened
            self._open.append((os.open(self.site.path(fixed), os.O_RDONLY), fixed))
        return sum(self.read_somewhere(descriptor, fixed) for descriptor, fixed in self._open for _ in range(4))

    def close(self) -> None:
        """All of them."""
        while self._open:
            os.close(self._open.pop()[0])


class Mmap(Reader):
    """In a process of its own: an error is a SIGBUS there."""

    may_see: ClassVar[frozenset[str]] = frozenset({"ETIMEDOUT", "SIGBUS"})

    def round(self) -> int:
        """One image, in pieces here and there."""
        fixed = self.random.choice(list(self.site.fixed.values()))
        offsets = [self.random.randrange(fixed.size - READ_MAX) for _ in range(READS)]
        command = (sys.executable, "-c", MMAP_PROGRAM, self.site.path(fixed), READ_MAX, *offsets)
        try:
            data = self.site.programs.run(*command, folder=CHECKOUT)
        except FailedError as error:
            if f"status {-signal.SIGBUS}" in str(error):
                raise FailedError(["SIGBUS"], str(error)) from error
            raise
        for number, offset in enumerate(offsets):
            piece = data[number * READ_MAX : (number + 1) * READ_MAX]
            check(f"mmap of {fixed.name}", piece, fixed.bytes_at(offset, READ_MAX), offset)
        return len(data)


MMAP_PROGRAM = """
import mmap, sys
path, length, *offsets = sys.argv[1:]
with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
    for offset in map(int, offsets):
        sys.stdout.buffer.write(mapped[offset:offset + int(length)])
"""


class Changing(Reader):
    """Images and snapshots while others change them: an open() sees all that was done before it, and nothing else."""

    def round(self) -> int:
        """One of them, as a whole."""
        view = self.site.changes.view(self.random)
        name = f"{view.name}@{view.snapshot}" if view.snapshot else view.name
        try:
            with opened(self.site.mount.path / CHANGING_POOL / name) as descriptor:
                size = os.fstat(descriptor).st_size
                data = read_all(descriptor, size, 0)
        except OSError as error:
            if self.site.changes.newest(view) is None and error.errno in GONE:
                return 0
            raise
        newest = self.site.changes.newest(view)
        if newest is None:
            if wrong := garbage(data):
                raise WrongError(f"{name}, that was changed at the same time: what never was, in blocks {wrong[:8]}")
        else:
            self._check(view, name, size, data, newest)
        return len(data)

    def _check(self, view: View, name: str, size: int, data: bytes, newest: Sequence[int]) -> None:
        expected = len(view.generations) * BLOCK_BYTES
        if size != expected or len(data) != size:
            raise WrongError(f"{name}: {len(data)} of {size} bytes instead of {expected}")
        if wrong := wrong_blocks(data, view.generations, newest):
            there = self.site.changes.librbd_reads(view.name, view.snapshot)
            differ = "not what librbd reads now" if there != data else "what librbd reads now"
            raise WrongError(f"{name}: {len(wrong)} blocks, {differ}: {'; '.join(wrong[:4])}")


class Pressure(Reader):
    """What a machine short of memory does to the page cache: it forgets the images' pages, but for those in use."""

    def round(self) -> int:
        """All images."""
        for fixed in self.site.fixed.values():
            with opened(self.site.path(fixed)) as descriptor:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return 0
