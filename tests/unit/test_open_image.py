"""Open images: the read path as a whole over a fake cluster, close-to-open, and what is shared between opens."""

import errno
import random
from unittest import mock

import pytest
import trio
import trio.testing

from rbdfs.errors import ReadError, StaleError
from rbdfs.image import open_images
from rbdfs.image.cache import ObjectCache
from rbdfs.image.cached_image import CachedImage
from rbdfs.image.holes import Kind
from rbdfs.image.open_image import OpenImage, OpenState, ReadaheadShare
from rbdfs.image.open_images import OpenImages
from rbdfs.image.striper import MIB, Layout
from tests.fake_backend import FakeBackend
from tests.in_trio import in_trio, read, seek

KIB = 1024


def random_backend(size: int, object_size: int = 4 * MIB) -> FakeBackend:
    return FakeBackend(bytearray(random.Random(size).randbytes(size)), object_size=object_size)


class Cluster:
    """One image, and a count of how often it was opened there."""

    def __init__(self, backend: FakeBackend, cache_bytes: int = 64 * MIB) -> None:
        self.backend = backend
        self.opens = 0
        self.cache = ObjectCache(cache_bytes, 64, 32 * MIB)
        self.images = OpenImages(self.cache)

    async def open_backend(self) -> FakeBackend:
        self.opens += 1
        self.backend.closed = False
        return self.backend


@in_trio
async def test_reads_at_past_and_across_the_end_are_as_posix_says() -> None:
    cluster = Cluster(random_backend(10_000))
    image, _ = await cluster.images.open("key", cluster.open_backend)
    assert await read(image, 10_000, 10) == b""
    assert await read(image, 20_000, 10) == b""
    assert await read(image, 500, 0) == b""
    assert bytes(await read(image, 9_990, 100)) == cluster.backend.content[9_990:]


@in_trio
async def test_a_sequential_reader_gets_the_image_with_one_aio_a_transfer() -> None:
    cluster = Cluster(random_backend(40 * MIB + 7))
    image, _ = await cluster.images.open("key", cluster.open_backend)
    step = 128 * KIB
    for offset in range(0, image.size, step):
        assert bytes(await read(image, offset, step)) == cluster.backend.content[offset : offset + step]
    assert cluster.backend.fetched_bytes == image.size
    assert len(cluster.backend.aios) <= 13


@in_trio
async def test_small_random_reads_fetch_at_most_64_kib_each() -> None:
    cluster = Cluster(random_backend(64 * MIB))
    image, _ = await cluster.images.open("key", cluster.open_backend)
    chance = random.Random(3)
    for _ in range(500):
        await read(image, chance.randrange(image.size // 4096) * 4096, 4096)
    assert cluster.backend.fetched_bytes <= 500 * 64 * KIB
    assert max(aio.length for aio in cluster.backend.aios) <= 4 * MIB


@in_trio
async def test_all_opens_share_one_image_and_the_last_close_gives_it_back() -> None:
    cluster = Cluster(random_backend(10_000))
    first, _ = await cluster.images.open("key", cluster.open_backend)
    second, _ = await cluster.images.open("key", cluster.open_backend)
    await cluster.images.close(first)
    assert cluster.opens == 1
    assert not cluster.backend.closed
    await cluster.images.close(second)
    assert cluster.backend.closed


@in_trio
async def test_two_closes_at_once_give_the_image_back_once() -> None:
    cluster = Cluster(random_backend(10_000))
    cluster.backend.write_version = None  # so that nothing of it is remembered
    first, _ = await cluster.images.open("key", cluster.open_backend)
    second, _ = await cluster.images.open("key", cluster.open_backend)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.images.close, first)
        nursery.start_soon(cluster.images.close, second)
    assert cluster.backend.closed
    await cluster.images.open("key", cluster.open_backend)
    assert cluster.opens == 2


def cached(cluster: Cluster, image: OpenImage) -> CachedImage:
    """What the cache is asked for when an open image is read."""
    with mock.patch.object(cluster.cache, "start_read") as start_read:
        image.start_read(0, 1, lambda _: None)
    asked_for: CachedImage = start_read.call_args.args[0]
    return asked_for


@in_trio
async def test_readahead_that_is_queued_ends_with_the_last_close() -> None:
    backend = random_backend(64 * MIB)
    cluster = Cluster(backend)
    other = Cluster(random_backend(64 * MIB))
    other.cache, other.images = cluster.cache, cluster.images
    other.backend.hold = True
    busy, _ = await cluster.images.open("other", other.open_backend)
    cluster.cache.prefetch(cached(cluster, busy), 0, 16 * MIB)
    cluster.cache.prefetch(cached(cluster, busy), 16 * MIB, 16 * MIB)
    image, _ = await cluster.images.open("key", cluster.open_backend)
    cluster.cache.prefetch(cached(cluster, image), 0, 8 * MIB)
    assert backend.aios == []
    await cluster.images.close(image)
    other.backend.release()
    assert backend.aios == []
    assert backend.closed


@in_trio
async def test_an_open_after_a_write_sees_it_and_so_do_older_opens() -> None:
    cluster = Cluster(random_backend(10_000))
    old, _ = await cluster.images.open("key", cluster.open_backend)
    before = bytes(await read(old, 0, 100))
    cluster.backend.content[0:100] = b"w" * 100
    cluster.backend.write_version = 2
    assert bytes(await read(old, 0, 100)) == before
    new, unchanged = await cluster.images.open("key", cluster.open_backend)
    assert not unchanged
    assert bytes(await read(new, 0, 100)) == b"w" * 100
    assert bytes(await read(old, 0, 100)) == b"w" * 100


@in_trio
async def test_an_image_that_nobody_can_have_written_answers_from_the_cache_after_its_last_close() -> None:
    cluster = Cluster(random_backend(10_000))
    for expected in (False, True):
        image, unchanged = await cluster.images.open("key", cluster.open_backend)
        assert unchanged is expected
        await read(image, 0, 10_000)
        await cluster.images.close(image)
    assert len(cluster.backend.aios) == 1


@in_trio
async def test_an_image_that_gives_no_promise_is_read_afresh_at_each_open() -> None:
    cluster = Cluster(random_backend(10_000))
    cluster.backend.write_version = None
    for _ in range(2):
        image, unchanged = await cluster.images.open("key", cluster.open_backend)
        assert not unchanged
        await read(image, 0, 10_000)
        await cluster.images.close(image)
    assert len(cluster.backend.aios) == 2
    assert cluster.cache.cached_bytes == 0


@in_trio
async def test_an_image_that_cannot_be_opened_fails_at_open_and_can_be_opened_later() -> None:
    cluster = Cluster(random_backend(10_000))

    async def refuse() -> FakeBackend:
        raise ReadError("cannot open rbd/vm1: permission denied", errno.EACCES)

    with pytest.raises(ReadError):
        await cluster.images.open("key", refuse)
    image, _ = await cluster.images.open("key", cluster.open_backend)
    assert len(await read(image, 0, 10)) == 10


@in_trio
async def test_growth_shows_at_the_next_read_at_the_end() -> None:
    cluster = Cluster(random_backend(10_000))
    image, _ = await cluster.images.open("key", cluster.open_backend)
    cluster.backend.content.extend(b"more")
    assert bytes(await read(image, 10_000, 100)) == b"more"


@in_trio
async def test_a_shrunk_image_ends_where_it_ends_now() -> None:
    cluster = Cluster(random_backend(10_000))
    image, _ = await cluster.images.open("key", cluster.open_backend)
    del cluster.backend.content[4_000:]
    assert bytes(await read(image, 3_000, 4_000)) == cluster.backend.content[3_000:]
    assert await read(image, 5_000, 10) == b""


@in_trio
async def test_readahead_beyond_a_new_end_does_not_fail_reads_before_it() -> None:
    cluster = Cluster(random_backend(20 * MIB))
    image, _ = await cluster.images.open("key", cluster.open_backend)
    await read(image, 0, MIB)
    del cluster.backend.content[3 * MIB + 5 :]
    assert bytes(await read(image, MIB, MIB)) == cluster.backend.content[MIB : 2 * MIB]
    assert bytes(await read(image, 2 * MIB, MIB)) == cluster.backend.content[2 * MIB : 3 * MIB]
    assert bytes(await read(image, 3 * MIB, MIB)) == cluster.backend.content[3 * MIB :]


@in_trio
async def test_an_error_in_mid_image_is_an_error_and_no_short_read() -> None:
    cluster = Cluster(random_backend(10_000))
    image, _ = await cluster.images.open("key", cluster.open_backend)
    cluster.backend.fail_with = errno.EIO
    with pytest.raises(ReadError):
        await read(image, 0, 100)


@in_trio
async def test_the_end_of_a_removed_image_is_an_error_and_no_end() -> None:
    cluster = Cluster(random_backend(10_000))
    image, _ = await cluster.images.open("key", cluster.open_backend)
    cluster.backend.gone = True
    with pytest.raises(StaleError):
        await read(image, 9_000, 4_096)


@in_trio
async def test_readahead_of_several_files_stays_within_a_third_of_the_cache() -> None:
    backend, cache, share = random_backend(64 * MIB), ObjectCache(64 * MIB, 64, 32 * MIB), ReadaheadShare(64 * MIB)
    cached_image = CachedImage(backend, Layout(4 * MIB, 4 * MIB, 1), cache.throttle(None))
    for key in "abcd":
        OpenImage(OpenState(key, backend, cached_image), cache, share)
    limits = []
    for readahead in share.files:
        for step in range(16):
            readahead.on_read(step * MIB, MIB, backend.size, share.limit)
        limits.append(share.limit())
    assert limits == [64 * MIB // 3 // streams for streams in (1, 2, 3, 4)]


@in_trio
async def test_without_a_cache_each_read_is_one_aio_and_nothing_is_read_ahead() -> None:
    cluster = Cluster(random_backend(MIB), cache_bytes=0)
    image, _ = await cluster.images.open("key", cluster.open_backend)
    for offset in range(0, MIB, 128 * KIB):
        await read(image, offset, 128 * KIB)
    assert [(aio.offset, aio.length) for aio in cluster.backend.aios] == [
        (offset, 128 * KIB) for offset in range(0, MIB, 128 * KIB)
    ]


@in_trio
async def test_seeks_find_data_and_holes_and_ask_for_each_window_once() -> None:
    backend = FakeBackend(bytearray(100 * 4096 + 7), object_size=4096)
    for data in (0, 17, 18, 60, 100):
        backend.content[data * 4096 + 3] = 1
    cluster = Cluster(backend)
    image, _ = await cluster.images.open("key", cluster.open_backend)
    positions = [0, 4096, 4097, 16 * 4096, 17 * 4096, 18 * 4096 + 5, 19 * 4096, 99 * 4096, 100 * 4096, 100 * 4096 + 6]
    model = [position // 4096 in (0, 17, 18, 60, 100) for position in range(image.size)]
    for position in positions:
        for kind, wanted in ((Kind.DATA, True), (Kind.HOLE, False)):
            end = None if kind is Kind.DATA else image.size
            expected = next((i for i in range(position, image.size) if model[i] is wanted), end)
            assert await seek(image, position, kind) == expected
    assert await seek(image, image.size, Kind.HOLE) is None
    assert await seek(image, image.size + 5, Kind.DATA) is None


@in_trio
async def test_what_the_cluster_refuses_to_say_of_holes_is_data() -> None:
    cluster = Cluster(FakeBackend(bytearray(10 * 4096), object_size=4096))
    image, _ = await cluster.images.open("key", cluster.open_backend)

    async def fail(offset: int, length: int) -> list[tuple[int, int]]:
        raise ReadError("not permitted", errno.EPERM)

    cluster.backend.extents = fail  # type: ignore[method-assign]
    assert await seek(image, 4096, Kind.DATA) == 4096
    assert await seek(image, 4096, Kind.HOLE) == image.size


@in_trio
async def test_a_seek_that_the_cluster_does_not_answer_is_an_error_and_the_next_one_asks_again() -> None:
    backend = FakeBackend(bytearray(10 * 4096), object_size=4096)
    cluster = Cluster(backend)
    image, _ = await cluster.images.open("key", cluster.open_backend)
    extents = backend.extents

    async def fail(offset: int, length: int) -> list[tuple[int, int]]:
        raise ReadError("nobody answers", errno.ETIMEDOUT)

    backend.extents = fail  # type: ignore[method-assign]
    for kind in (Kind.DATA, Kind.HOLE):
        with pytest.raises(ReadError):
            await seek(image, 4096, kind)
    backend.extents = extents  # type: ignore[method-assign]
    assert await seek(image, 4096, Kind.HOLE) == 4096


@in_trio
async def test_seeks_in_an_image_that_was_shrunk_agree_on_what_it_holds_now() -> None:
    """Found by the model: the first one took all for data, and the next one found a hole at the same place."""
    content = bytearray(4 * MIB)
    cluster = Cluster(FakeBackend(content, object_size=64 * KIB))
    image, _ = await cluster.images.open("key", cluster.open_backend)
    del content[64 * KIB :]
    assert await seek(image, 0, Kind.DATA) is None
    assert await seek(image, 0, Kind.HOLE) == 0
    assert await seek(image, 64 * KIB, Kind.HOLE) is None


@in_trio
async def test_holes_that_a_seek_has_found_are_skipped_and_what_lies_behind_them_is_read_ahead() -> None:
    backend = FakeBackend(bytearray(64 * MIB), object_size=4 * MIB)
    backend.content[: 4 * MIB] = random.Random(1).randbytes(4 * MIB)
    backend.content[40 * MIB] = 1
    cluster = Cluster(backend)
    image, _ = await cluster.images.open("key", cluster.open_backend)
    assert await seek(image, 4 * MIB, Kind.DATA) == 40 * MIB
    for offset in range(0, 4 * MIB, MIB):
        assert bytes(await read(image, offset, MIB)) == backend.content[offset : offset + MIB]
    assert backend.fetched_bytes == 8 * MIB
    assert bytes(await read(image, 40 * MIB, 4 * MIB)) == backend.content[40 * MIB : 44 * MIB]
    assert backend.fetched_bytes == 8 * MIB
    assert bytes(await read(image, 20 * MIB, MIB)) == bytes(MIB)


@in_trio
async def test_a_snapshots_holes_are_asked_once_and_reads_in_them_ask_nothing() -> None:
    backend = FakeBackend(bytearray(16 * 4096), object_size=4096, is_immutable=True)
    backend.content[5 * 4096] = 1
    cluster = Cluster(backend)
    for turn in range(2):
        image, unchanged = await cluster.images.open("key", cluster.open_backend)
        assert unchanged is (turn > 0)
        assert bytes(await read(image, 6 * 4096, 10 * 4096)) == bytes(10 * 4096)
        assert bytes(await read(image, 100, 4096)) == bytes(4096)
        await cluster.images.close(image)
    assert backend.aios == []
    assert backend.extents_asked == 1
    image, _ = await cluster.images.open("key", cluster.open_backend)
    assert bytes(await read(image, 4 * 4096, 2 * 4096)) == backend.content[4 * 4096 : 6 * 4096]


@in_trio
async def test_hole_maps_of_closed_snapshots_are_bounded_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(FakeBackend(bytearray(16 * 4096), object_size=4096, is_immutable=True))
    cluster.backend.content[::8192] = bytes([1]) * 8
    one_map = 16
    monkeypatch.setattr(open_images, "CLOSED_SEGMENTS_MAX", 2 * one_map)

    async def open_and_close(key: str) -> int:
        """How often holes were asked for."""
        before = cluster.backend.extents_asked
        image, _ = await cluster.images.open(key, cluster.open_backend)
        assert await seek(image, 0, Kind.HOLE) == 4096
        await cluster.images.close(image)
        return cluster.backend.extents_asked - before

    assert [await open_and_close(key) for key in ("a", "b", "b", "a")] == [1, 1, 0, 0]
    assert [await open_and_close(key) for key in ("c", "a", "b")] == [1, 0, 1]


@in_trio
async def test_holes_of_a_head_are_read() -> None:
    cluster = Cluster(FakeBackend(bytearray(16 * 4096), object_size=4096))
    image, _ = await cluster.images.open("key", cluster.open_backend)
    assert await seek(image, 0, Kind.DATA) is None
    assert bytes(await read(image, 0, 4096)) == bytes(4096)
    assert cluster.backend.aios


@in_trio
async def test_what_is_cached_of_a_removed_image_is_an_error_once_that_is_known_and_so_is_its_close() -> None:
    cluster = Cluster(random_backend(10_000))
    image, _ = await cluster.images.open("key", cluster.open_backend)
    await read(image, 0, 100)
    await image.flush()
    cluster.backend.gone = True
    with pytest.raises(StaleError):
        await read(image, 0, 100)
    cluster.backend.gone = False
    with pytest.raises(StaleError):
        await image.flush()


@in_trio
async def test_a_close_reports_that_the_image_is_gone_though_no_read_found_it() -> None:
    cluster = Cluster(random_backend(10_000))
    image, _ = await cluster.images.open("key", cluster.open_backend)
    await read(image, 0, 100)
    cluster.backend.gone = True
    with pytest.raises(StaleError):
        await image.flush()


@in_trio
async def test_an_open_after_a_migration_reads_what_the_image_is_now_and_older_opens_go_over() -> None:
    cluster = Cluster(random_backend(10_000))
    stale = cluster.backend
    older, _ = await cluster.images.open("key", cluster.open_backend)
    await read(older, 0, 100)
    stale.gone = True
    cluster.backend = random_backend(10_000)
    newer, _ = await cluster.images.open("key", cluster.open_backend)
    assert stale.closed
    for image in (newer, older):
        assert bytes(await read(image, 0, 100)) == cluster.backend.content[:100]
    await cluster.images.close(older)
    await cluster.images.close(newer)
    assert cluster.backend.closed
