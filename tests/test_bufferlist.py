"""Large reads that take librados's memory over: the right bytes, for as long as anybody has them, and no longer."""

import contextlib
import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rbdfs.catalog import Namespace
from rbdfs.ceph import bufferlist
from rbdfs.ceph.aio import Answer
from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.connect import ClusterOptions
from rbdfs.ceph.image import CephImage
from rbdfs.errors import RbdfsError
from rbdfs.image.source import Data, ReadResult, view
from rbdfs.spec import ImageSpec
from tests.ceph import Ceph, random_bytes
from tests.in_trio import in_trio

MIB = 1 << 20
OBJECT_SIZE = MIB
CONTENT = random_bytes(4 * MIB, seed=3)

pytestmark = pytest.mark.skipif(
    (bufferlist.unavailable() or "").startswith("rbdfs was installed without"),
    reason="needs g++, librbd-dev and libradospp-dev",
)


@contextlib.asynccontextmanager
async def opened(ceph: Ceph, name: str) -> AsyncIterator[CephImage]:
    """An image, read by events."""
    cluster = await Cluster.connect(ClusterOptions(conf=ceph.conf))
    try:
        pool = await cluster.pool("rbd")
        image = await cluster.open_image(ImageSpec("rbd", name), await cluster.image(Namespace(pool), name))
        try:
            yield image
        finally:
            await image.close()
    finally:
        await cluster.aclose()


async def read(image: CephImage, offset: int, length: int) -> Data:
    """One read, which must succeed."""
    answer: Answer[ReadResult] = Answer()
    image.aio_read(offset, length, answer.give)
    result = await answer.get()
    assert not isinstance(result, RbdfsError), result
    return result


def resident_bytes() -> int:
    """Memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@in_trio
async def test_large_reads_are_taken_over_and_small_ones_are_bytes(ceph: Ceph) -> None:
    name = ceph.unique("sizes")
    ceph.make_image(name, CONTENT, OBJECT_SIZE)
    async with opened(ceph, name) as image:
        assert not isinstance(await read(image, 0, bufferlist.LEAST_BYTES), bytes)
        assert isinstance(await read(image, 0, bufferlist.LEAST_BYTES - 1), bytes)


@pytest.mark.parametrize(
    ("stripe_unit", "stripe_count"), [(MIB, 1), (1 << 14, 3)], ids=["whole objects", "stripes of 16 KiB"]
)
@in_trio
async def test_what_comes_in_pieces_is_one_piece_and_right(ceph: Ceph, stripe_unit: int, stripe_count: int) -> None:
    name = ceph.unique("pieces")
    content = bytearray(CONTENT)
    content[MIB : 2 * MIB] = bytes(MIB)  # an object that is not there, and holes in one that is
    content[2 * MIB + 100_000 : 2 * MIB + 500_000] = bytes(400_000)
    ceph.make_image(name, bytes(content), OBJECT_SIZE, stripe_unit=stripe_unit, stripe_count=stripe_count)
    async with opened(ceph, name) as image:
        ranges = [(0, len(content)), (MIB, MIB), (MIB - 70_000, 140_000), (2 * MIB + 50_000, 600_001)]
        for offset, length in [*ranges, (len(content) - 65_537, 65_537)]:
            data = await read(image, offset, length)
            assert not isinstance(data, bytes)
            assert view(data) == content[offset : offset + length]


@in_trio
async def test_a_clone_and_its_parent_make_one_piece(ceph: Ceph) -> None:
    parent, clone = ceph.unique("parent"), ceph.unique("clone")
    ceph.make_image(parent, CONTENT, OBJECT_SIZE)
    ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{parent}@s")
    ceph.run("rbd", "clone", "--rbd-default-clone-format=2", f"rbd/{parent}@s", f"rbd/{clone}")
    ceph.write_image(clone, b"y" * 5000, MIB + 200_000)
    async with opened(ceph, clone) as image:
        data = await read(image, 0, len(CONTENT))
        assert not isinstance(data, bytes)
        assert view(data) == CONTENT[: MIB + 200_000] + b"y" * 5000 + CONTENT[MIB + 205_000 :]


@in_trio
async def test_the_bytes_outlive_the_image_and_the_connection(ceph: Ceph) -> None:
    name = ceph.unique("outlive")
    ceph.make_image(name, CONTENT, OBJECT_SIZE)
    async with opened(ceph, name) as image:
        kept = [view(await read(image, offset, MIB))[1000:] for offset in range(0, len(CONTENT), MIB)]
    for index, part in enumerate(kept):
        assert part == CONTENT[index * MIB + 1000 : (index + 1) * MIB]


@in_trio
async def test_what_nobody_has_is_freed(ceph: Ceph) -> None:
    name = ceph.unique("freed")
    ceph.make_image(name, CONTENT, 4 * MIB)
    async with opened(ceph, name) as image:
        await read(image, 0, 4 * MIB)
        before = resident_bytes()
        for _ in range(50):
            await read(image, 0, 4 * MIB)
        assert resident_bytes() - before < 100 * MIB  # of 200 that were read


@in_trio
async def test_reads_are_as_right_without_the_library(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bufferlist, "_library", "it is not there")
    name = ceph.unique("without")
    ceph.make_image(name, CONTENT, OBJECT_SIZE)
    async with opened(ceph, name) as image:
        assert await read(image, 12_345, 300_000) == CONTENT[12_345:312_345]


def test_a_library_of_another_ceph_is_told_of_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_bufferlist.so").write_bytes(b"not for this Ceph")
    monkeypatch.setattr("rbdfs.ceph.__path__", [str(tmp_path)])
    assert "reinstall" in str(bufferlist._load_library())


class Received:
    """A library whose reads bring less than they say."""

    def rbdfs_bufferlist_read(self, *_: int) -> int:
        return 1

    def rbdfs_bufferlist_data(self, *_: int) -> None:
        return None

    def rbdfs_bufferlist_free(self, _: int) -> None:
        return None


def test_less_than_was_announced_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bufferlist, "_library", Received())
    assert bufferlist.Bufferlist(0, 0, MIB, 0).take(MIB) == (-errno.EIO, b"")
