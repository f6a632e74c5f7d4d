"""Images that nobody changes, and what they hold, as files beside them."""

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import rbd

from rbdfs.devcluster.cluster import EC_POOL
from tests.cluster import MIB, Ceph
from tests.soak.ledger import WrongError
from tests.truth import describe

POOL = "rbd"
FULL, THIN, CODED, CLONE, DISK = "full", "thin", "coded", "clone", "disk"
PIECE = MIB
"""What is compared, written and made at a time."""
FILES = 6
"""In the file system of DISK."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """An image, and the file that has its bytes."""

    name: str
    reference: Path

    @property
    def size(self) -> int:
        """In bytes."""
        return self.reference.stat().st_size

    def bytes_at(self, offset: int, length: int) -> bytes:
        """What a read must give."""
        with self.reference.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), length, offset)


def compare(what: str, copy: Path, reference: Path) -> int:
    """How many bytes two files have, if they are the same. Raises WrongError if not."""
    size = reference.stat().st_size
    if copy.stat().st_size != size:
        raise WrongError(f"{what}: {copy.stat().st_size} bytes instead of {size}")
    with copy.open("rb") as one, reference.open("rb") as other:
        for offset in range(0, size, PIECE):
            check(what, one.read(PIECE), other.read(PIECE), offset)
    return size


def check(what: str, data: bytes, expected: bytes, offset: int) -> None:
    """Raise WrongError if what was read is not what must be there."""
    if data != expected:
        was = describe(data, right=expected)
        raise WrongError(f"{what}: {len(data)} bytes at {offset} instead of {len(expected)}: {was}")


def make_all(ceph: Ceph, folder: Path, seed: int, scale: int) -> dict[str, Fixed]:
    """Make all images; `scale` MiB is the size of most of them."""
    folder.mkdir()
    source = random.Random(seed)
    size = scale * MIB
    _write_random(folder / FULL, source, size, [(0, size)])
    _write_random(folder / CODED, source, size // 2, [(0, size // 2)])
    _write_random(folder / THIN, source, 2 * size, [(at, MIB // 2) for at in range(3 * MIB, 2 * size, size // 4)])
    _make_disk(folder, source, size)
    for name in (FULL, THIN, CODED, DISK):
        options = {"data_pool": EC_POOL} if name == CODED else {}
        with ceph.ioctx(POOL) as ioctx:
            rbd.RBD().create(ioctx, name, (folder / name).stat().st_size, order=22, old_format=False, **options)
        _upload(ceph, name, folder / name)
    shutil.copyfile(folder / FULL, folder / CLONE)
    with ceph.ioctx(POOL) as ioctx, rbd.Image(ioctx, FULL) as parent:
        parent.create_snap("base")
        parent.protect_snap("base")
        rbd.RBD().clone(ioctx, FULL, "base", ioctx, CLONE)
        with rbd.Image(ioctx, CLONE) as clone, (folder / CLONE).open("r+b") as file:
            for offset in range(MIB, size, 7 * MIB):
                data = source.randbytes(300_000)[: size - offset]
                clone.write(data, offset)
                os.pwrite(file.fileno(), data, offset)
    return {name: Fixed(name, folder / name) for name in (FULL, THIN, CODED, CLONE, DISK)}


def _write_random(path: Path, source: random.Random, size: int, ranges: list[tuple[int, int]]) -> None:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in ranges:
            os.pwrite(file.fileno(), source.randbytes(length), offset)


def _make_disk(folder: Path, source: random.Random, size: int) -> None:
    """A file system, and its files beside it."""
    files = files_of(folder)
    (files / "inner").mkdir(parents=True)
    for number in range(FILES):
        length = source.randrange(size // FILES // 2)
        (files / "inner" / f"file{number}").write_bytes(source.randbytes(length))
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", files, folder / DISK, f"{size // MIB}M"], check=True, capture_output=True
    )


def files_of(folder: Path) -> Path:
    """What is in the file system of DISK."""
    return folder / "files"


def _upload(ceph: Ceph, name: str, path: Path) -> None:
    with ceph.ioctx(POOL) as ioctx, rbd.Image(ioctx, name) as image:
        for offset, data in _data_of(path):
            image.write(data, offset)


def _data_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """All pieces that are not zeros."""
    with path.open("rb") as file:
        offset = 0
        while data := file.read(PIECE):
            if data.count(0) != len(data):
                yield offset, data
            offset += len(data)
