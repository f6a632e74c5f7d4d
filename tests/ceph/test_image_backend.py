"""One contract for what `image/` needs of the cluster: the fake passes it, and a real image does."""

import contextlib
import errno
import itertools
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import rados
import rbd
import trio

import rbdfs.ceph.cluster
from rbdfs.catalog import ImageRef, Namespace
from rbdfs.ceph.bindings import librbd
from rbdfs.ceph.bindings.aio import LibrbdImage
from rbdfs.ceph.bindings.librados import Ioctx
from rbdfs.ceph.bindings.read_op import ReadOperations, Reply, Request
from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.image.ceph_image import CephImage
from rbdfs.ceph.image.header_watch import HeaderWatch
from rbdfs.errors import BeyondEndError, RbdfsError
from rbdfs.image.backend import ImageBackend, ReadResult
from rbdfs.spec import ImageSpec
from tests.cluster import READ_ONLY_CAPS, Ceph, connected, open_image, random_bytes
from tests.fake_backend import FakeBackend
from tests.in_trio import in_trio

SIZE, OBJECT_SIZE, UNIT, COUNT = 1_000_001, 1 << 16, 1 << 14, 3
CONTENT = random_bytes(SIZE, seed=17)

OpenBackend = Callable[[], AbstractAsyncContextManager[ImageBackend]]


def real(ceph: Ceph, **options: object) -> OpenBackend:
    """Opens a real image, each time a new one."""

    @contextlib.asynccontextmanager
    async def open_backend() -> AsyncIterator[ImageBackend]:
        name = ceph.unique("contract")
        ceph.make_image(name, CONTENT, OBJECT_SIZE, stripe_unit=UNIT, stripe_count=COUNT)
        async with connected(ceph, **options) as cluster:
            backend = await open_image(cluster, name)
            try:
                yield backend
            finally:
                await backend.close()

    return open_backend


@contextlib.asynccontextmanager
async def fake() -> AsyncIterator[ImageBackend]:
    """Opens the fake."""
    backend = FakeBackend(bytearray(CONTENT), OBJECT_SIZE, UNIT, COUNT)
    try:
        yield backend
    finally:
        await backend.close()


@pytest.fixture(params=["fake", "real", "real, read-only caps"])
def open_backend(request: pytest.FixtureRequest) -> OpenBackend:
    """What the contract is about."""
    if request.param == "fake":
        return fake
    ceph: Ceph = request.getfixturevalue("ceph")
    options: dict[str, object] = {}
    if request.param.endswith("caps"):
        name = ceph.unique("contractkey")
        options |= {"name": f"client.{name}", "keyring": ceph.make_key(name, *READ_ONLY_CAPS)}
    return real(ceph, **options)


@pytest.fixture
def backend(open_backend: OpenBackend) -> AbstractAsyncContextManager[ImageBackend]:
    """One that `in_trio` opens and closes."""
    return open_backend()


async def read(backend: ImageBackend, offset: int, length: int) -> ReadResult:
    """One read, waited for."""
    results: list[ReadResult] = []
    done = trio.Event()

    def callback(result: ReadResult) -> None:
        results.append(result)
        done.set()

    backend.start_read(offset, length, callback)
    assert results == [], "callback was called at once"
    await done.wait()
    return results[0]


def as_bytes(result: ReadResult) -> bytes:
    """The bytes of a read that must have succeeded."""
    assert not isinstance(result, RbdfsError)
    return bytes(result)


@in_trio
async def test_it_knows_its_size_and_layout(backend: ImageBackend) -> None:
    assert (backend.size, backend.object_size) == (SIZE, OBJECT_SIZE)
    assert (backend.stripe_unit, backend.stripe_count) == (UNIT, COUNT)
    assert await backend.refresh_size() == SIZE


@in_trio
async def test_a_read_is_exactly_the_bytes_that_were_asked_for(backend: ImageBackend) -> None:
    for offset, length in [(0, 1), (0, SIZE), (SIZE - 1, 1), (12_345, 300_000), (OBJECT_SIZE - 1, 2)]:
        assert as_bytes(await read(backend, offset, length)) == CONTENT[offset : offset + length]


@in_trio
async def test_many_reads_at_once_each_get_their_own(backend: ImageBackend) -> None:
    async with trio.open_nursery() as nursery:

        async def check(offset: int) -> None:
            assert as_bytes(await read(backend, offset, 4096)) == CONTENT[offset : offset + 4096]

        for i in range(200):
            nursery.start_soon(check, i * 4999)


@pytest.mark.parametrize(("offset", "length"), [(SIZE, 1), (SIZE - 1, 2), (SIZE + 10_000_000, 4096), (0, SIZE + 1)])
@in_trio
async def test_a_read_beyond_the_end_is_an_error_and_never_short(
    backend: ImageBackend, offset: int, length: int
) -> None:
    assert isinstance(await read(backend, offset, length), BeyondEndError)


@in_trio
async def test_close_waits_for_reads_in_flight(open_backend: OpenBackend) -> None:
    results: list[ReadResult] = []
    async with open_backend() as backend:
        for i in range(20):
            backend.start_read(i * 4096, 4096, results.append)
    assert {as_bytes(result) for result in results} == {CONTENT[i * 4096 : (i + 1) * 4096] for i in range(20)}


async def write_version(backend: ImageBackend) -> int | None:
    """As an open() asks for it."""
    await backend.revalidate()
    return backend.write_version


@in_trio
async def test_the_write_version_stays_while_nobody_writes(backend: ImageBackend) -> None:
    version = backend.write_version
    assert version is not None
    assert await write_version(backend) == version
    await read(backend, 0, 4096)
    assert await write_version(backend) == version


@in_trio
async def test_the_write_version_changes_with_a_write_and_is_unknown_while_somebody_may_write(ceph: Ceph) -> None:
    async with real(ceph)() as backend:
        assert not isinstance(backend, FakeBackend)
        name = backend.spec.image  # type: ignore[attr-defined]
        before = await write_version(backend)
        ceph.write_image(name, b"written")
        after = await write_version(backend)
        assert before != after
        assert after is not None
        with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as writer:
            assert await write_version(backend) is None  # it has the image open, and might write without the lock
            writer.write(b"again", 0)
            assert await write_version(backend) is None
            writer.write(b"and again", 0)
            assert await write_version(backend) is None
        assert await write_version(backend) not in (None, before, after)


@in_trio
async def test_without_the_exclusive_lock_feature_there_is_no_promise(ceph: Ceph, cluster: Cluster) -> None:
    name = ceph.unique("nolock")
    ceph.make_image(name, b"content", features=1)  # layering alone
    backend = await open_image(cluster, name)
    assert backend.write_version is None
    assert await write_version(backend) is None
    await backend.close()


@in_trio
async def test_what_is_not_there_is_an_error_with_its_errno(cluster: Cluster) -> None:
    with pytest.raises(RbdfsError, match="there is no pool nope"):
        await cluster.pool("nope")
    with pytest.raises(RbdfsError, match="No such file"):
        await cluster.image(Namespace(await cluster.pool("rbd")), "nope")


class Counted:
    """A connection, and how many images were opened and closed in librbd by it."""

    def __init__(self, cluster: Cluster, namespace: Namespace) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.opens = 0
        self.closes = 0

    async def open(self, name: str, snapshot: str | None = None) -> CephImage:
        """An image or a snapshot, by name."""
        return await open_image(self.cluster, name, snapshot)

    async def content(self, name: str, snapshot: str | None = None) -> bytes:
        """All of it, as a reader gets it who opens, reads and closes."""
        backend = await self.open(name, snapshot)
        try:
            return as_bytes(await read(backend, 0, backend.size))
        finally:
            await backend.close()


@pytest.fixture
def counts(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> AbstractAsyncContextManager[Counted]:
    """Connects; what was opened must be closed before the end of the connection."""

    @contextlib.asynccontextmanager
    async def counted() -> AsyncIterator[Counted]:
        def open_counted(ioctx: Ioctx, image: ImageRef) -> LibrbdImage:
            handle = LibrbdImage(ioctx, image)
            close = handle.aclose

            async def close_counted() -> None:
                await close()
                found.closes += 1

            monkeypatch.setattr(handle, "aclose", close_counted)
            found.opens += 1
            return handle

        monkeypatch.setattr(rbdfs.ceph.cluster, "LibrbdImage", open_counted)
        async with connected(ceph) as cluster:
            found = Counted(cluster, Namespace(await cluster.pool("rbd")))
            yield found
        assert found.closes == found.opens

    return counted()


@in_trio
async def test_what_is_opened_soon_after_its_close_is_opened_in_librbd_once(ceph: Ceph, counts: Counted) -> None:
    name = ceph.unique("soon")
    ceph.make_image(name, CONTENT)
    ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{name}@s")
    for _ in range(3):
        assert await counts.content(name) == CONTENT
        assert await counts.content(name, "s") == CONTENT
    assert counts.opens == 2


@in_trio
async def test_an_image_that_is_closed_can_be_removed_at_once(ceph: Ceph, counts: Counted) -> None:
    name = ceph.unique("rm")
    for content in (CONTENT, CONTENT[::-1]):
        ceph.make_image(name, content)
        assert await counts.content(name) == content
        assert ceph.watchers(name) == []
        ref = await counts.cluster.image(counts.namespace, name)
        ceph.remove_image(name)
        with pytest.raises(RbdfsError) as caught:
            await counts.cluster.open_image(ImageSpec("rbd", name), ref)
        assert caught.value.errno == errno.ENOENT
    assert counts.opens == 2


@in_trio
async def test_what_others_did_since_the_close_is_seen_at_the_next_open(ceph: Ceph, counts: Counted) -> None:
    name, renamed = ceph.unique("since"), ceph.unique("renamed")
    ceph.make_image(name, CONTENT, OBJECT_SIZE)
    with ceph.ioctx() as ioctx:
        assert await counts.content(name) == CONTENT
        ceph.resize_image(name, SIZE + 5)
        assert await counts.content(name) == CONTENT + bytes(5)
        ceph.resize_image(name, SIZE // 2)
        assert await counts.content(name) == CONTENT[: SIZE // 2]
        with rbd.Image(ioctx, name) as image:
            image.create_snap("s")
            image.write(b"new" * 1000, 0)
            assert await counts.content(name) == b"new" * 1000 + CONTENT[3000 : SIZE // 2]
        assert await counts.content(name, "s") == CONTENT[: SIZE // 2]
        with rbd.Image(ioctx, name) as image:
            image.rollback_to_snap("s")
        assert await counts.content(name) == CONTENT[: SIZE // 2]
        backend = await counts.open(name, "s")
        await backend.close()
        snapshot = await counts.cluster.snapshot(await counts.cluster.image(counts.namespace, name), "s")
        with rbd.Image(ioctx, name) as image:
            image.remove_snap("s")
        with pytest.raises(RbdfsError) as caught:
            await counts.cluster.open_image(ImageSpec("rbd", name, "", "s"), snapshot)
        assert caught.value.errno == errno.ENOENT
        rbd.RBD().rename(ioctx, name, renamed)
    assert await counts.content(renamed) == CONTENT[: SIZE // 2]


@in_trio
async def test_a_clone_that_is_kept_goes_with_any_change_of_its_parents(ceph: Ceph, counts: Counted) -> None:
    parent, child = ceph.unique("parent"), ceph.unique("child")
    ceph.make_image(parent, CONTENT)
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, parent) as image:
        image.create_snap("s")
    ceph.run("rbd", "clone", "--rbd-default-clone-format", "2", f"rbd/{parent}@s", f"rbd/{child}")
    ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{child}@s")
    for _ in range(2):
        assert await counts.content(child) == await counts.content(child, "s") == CONTENT
    assert counts.opens == 2
    with ceph.ioctx() as ioctx:
        with rbd.Image(ioctx, parent) as image:
            image.create_snap("another")
            image.remove_snap("another")
        assert await counts.content(child) == await counts.content(child, "s") == CONTENT
        assert counts.opens == 4
        with rbd.Image(ioctx, child) as image:
            image.remove_snap("s")
            image.flatten()
        with rbd.Image(ioctx, parent) as image:
            image.remove_snap("s")
        rbd.RBD().remove(ioctx, parent)
    for _ in range(2):
        assert await counts.content(child) == CONTENT
    assert counts.opens == 5


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> "Counter[str]":
    """How often the cluster was asked, but by librbd to open an image."""
    counts: Counter[str] = Counter()
    operate, watchers, watch = ReadOperations.operate, librbd.Image.watchers, HeaderWatch.begin

    async def operate_counted(self: ReadOperations, requests: Sequence[Request]) -> Sequence[Reply]:
        counts["headers"] += 1
        return await operate(self, requests)

    def watchers_counted(self: librbd.Image) -> frozenset[int]:
        counts["watchers"] += 1
        return watchers(self)

    async def watch_counted(*arguments: Any) -> HeaderWatch:
        counts["watch"] += 1
        return await watch(*arguments)

    monkeypatch.setattr(ReadOperations, "operate", operate_counted)
    monkeypatch.setattr(librbd.Image, "watchers", watchers_counted)
    monkeypatch.setattr(HeaderWatch, "begin", watch_counted)
    return counts


@in_trio
async def test_an_open_asks_for_headers_and_watchers_once_and_once_more_for_each_new_ancestor(
    ceph: Ceph, counts: Counted, asked: "Counter[str]"
) -> None:
    names = [ceph.unique("rounds") for _ in range(3)]
    ceph.make_image(names[0], CONTENT)
    for parent, child in itertools.pairwise(names):
        ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{parent}@s")
        ceph.run("rbd", "clone", "--rbd-default-clone-format", "2", f"rbd/{parent}@s", f"rbd/{child}")
    for ancestors, name in enumerate(names):
        ref = await counts.cluster.image(counts.namespace, name)
        asked.clear()
        first = await counts.cluster.open_image(ImageSpec("rbd", name), ref)
        assert asked == {"headers": 1 + ancestors, "watch": 1, "watchers": 1}
        asked.clear()
        await first.revalidate()  # another open(): of what is open, and then of what was a moment ago
        assert asked == {"headers": 1, "watchers": 1}
        await first.close()
        asked.clear()
        second = await counts.cluster.open_image(ImageSpec("rbd", name), ref)
        assert asked == {"headers": 1, "watch": 1, "watchers": 1}
        await second.close()
    assert counts.opens == len(names)


@in_trio
async def test_a_snapshot_is_immutable_once_nobody_can_be_filling_it(ceph: Ceph, counts: Counted) -> None:
    name = ceph.unique("immutable")
    ceph.make_image(name, CONTENT)
    with ceph.ioctx() as ioctx:
        with rbd.Image(ioctx, name) as writer:
            writer.create_snap("s")
            writer.write(b"again", 0)
            backend = await counts.open(name, "s")
            assert not backend.is_immutable
            assert backend.write_version is None
            await backend.revalidate()
            assert not backend.is_immutable
            assert counts.opens == 2  # librbd has loaded the snapshot's object map
            with rbd.Image(ioctx, name, read_only=True) as image:
                prefix = image.id()
            # A snapshot that was made an hour after its image is none of a copy's.
            created = struct.pack("<II", 1, 0)
            with rados.WriteOpCtx() as operation:
                ioctx.set_omap(operation, ("create_timestamp",), (created,))
                ioctx.operate_write_op(operation, f"rbd_header.{prefix}")
            await backend.revalidate()
            assert backend.is_immutable
            version = backend.write_version
            assert version is not None
            await backend.close()
        backend = await counts.open(name, "s")
        assert backend.is_immutable
        assert backend.write_version == version
        await backend.close()
