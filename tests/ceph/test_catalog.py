"""What listing asks of a real cluster: operations are counted, time is not."""

import errno
import json
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager

import pytest
import rbd
import trio

from rbdfs.catalog import ImageRef, ImageStat, Namespace
from rbdfs.ceph.bindings.read_op import OPERATIONS_AT_ONCE, ReadOperations, Reply, Request
from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.connection.connections import Connections
from rbdfs.ceph.metadata import header, object_map, stat
from rbdfs.ceph.metadata.header import Snapshot
from rbdfs.ceph.metadata.object_map import ObjectSet
from rbdfs.ceph.metadata.snapshots import CACHED_FROM
from rbdfs.ceph.metadata.stat import CACHED_FROM_OBJECTS
from rbdfs.errors import RbdfsError
from tests.cluster import MIB, Ceph
from tests.golden.capture import asked_directly
from tests.in_trio import in_trio

IMAGES = 2 * stat.IMAGES_A_BATCH + 2


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The objects that read operations are sent to."""
    names: list[str] = []
    operate = ReadOperations.operate

    async def count(self: ReadOperations, requests: Sequence[Request]) -> Sequence[Reply]:
        names.extend(request.object_name for request in requests)
        return await operate(self, requests)

    monkeypatch.setattr(ReadOperations, "operate", count)
    return names


@in_trio
async def test_listing_costs_two_operations_an_image_and_one_for_all_names(
    ceph: Ceph, cluster: Cluster, asked: list[str]
) -> None:
    pool = ceph.unique("counted")
    ceph.make_pool(pool)
    try:
        with ceph.ioctx(pool) as ioctx:
            for number in range(IMAGES):
                rbd.RBD().create(ioctx, f"image{number}", MIB, old_format=False)
        namespace = Namespace(await cluster.pool(pool))
        asked.clear()  # whether the pool may be read
        names = await cluster.image_names(namespace)
        assert len(names) == IMAGES
        assert asked == ["rbd_directory"]
        found = await cluster.stat_all(names.values())
        assert {each.size for each in found.values() if each} == {MIB}
        assert len(found) == IMAGES
        assert len(asked) == 1 + 2 * IMAGES
        watchers = [ceph.watchers(name, pool) for name in ("image0", "image1")]
        assert watchers == [[], []]
    finally:
        ceph.remove_pool(pool)


@in_trio
async def test_a_parent_is_asked_once_for_all_of_its_clones(ceph: Ceph, cluster: Cluster, asked: list[str]) -> None:
    pool = ceph.unique("family")
    ceph.make_pool(pool)
    try:
        ceph.make_image("parent", b"x" * MIB, pool=pool)
        with ceph.ioctx(pool) as ioctx:
            with rbd.Image(ioctx, "parent") as image:
                image.create_snap("s")
                image.protect_snap("s")
            for number in range(10):
                rbd.RBD().clone(ioctx, "parent", "s", ioctx, f"clone{number}")
        namespace = Namespace(await cluster.pool(pool))
        names = await cluster.image_names(namespace)
        asked.clear()
        found = await cluster.stat_all(ref for name, ref in names.items() if name != "parent")
        assert {each.used_bytes for each in found.values() if each} == {MIB}
        assert len(found) == 10
        assert asked.count(header.object_of(names["parent"])) == 1
        assert len(asked) == 2 * 11
    finally:
        ceph.remove_pool(pool)


@in_trio
async def test_what_is_gone_is_left_out_and_what_the_cluster_does_not_tell_is_none(
    ceph: Ceph, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [ceph.unique(name) for name in ("here", "gone", "silent")]
    for name in names:
        ceph.make_image(name, b"x")
    namespace = Namespace(await cluster.pool("rbd"))
    here, gone, silent = [await cluster.image(namespace, name) for name in names]
    ceph.remove_image(names[1])
    operate = ReadOperations.operate

    async def one_is_silent(self: ReadOperations, requests: Sequence[Request]) -> Sequence[Reply]:
        timed_out = Reply(-errno.ETIMEDOUT)
        return [
            timed_out if request.object_name == header.object_of(silent) else reply
            for request, reply in zip(requests, await operate(self, requests), strict=True)
        ]

    monkeypatch.setattr(ReadOperations, "operate", one_is_silent)
    found = await cluster.stat_all([here, gone, silent])
    assert found == {here: ImageStat(1, 1, await modified_ns(cluster, here)), silent: None}
    with pytest.raises(RbdfsError, match="timed out"):
        await cluster.stat(silent)


async def modified_ns(cluster: Cluster, image: ImageRef) -> int:
    """Of an image that is alone in asking."""
    return (await cluster.stat(image)).modified_ns


@pytest.fixture
def connections(ceph: Ceph) -> AbstractAsyncContextManager[Connections]:
    """What a cluster asks by, alone."""
    return asked_directly(ceph.conf)


async def header_request(cluster: Cluster, connections: Connections, name: str) -> tuple[ImageRef, Request]:
    """What an image's header is asked."""
    namespace = Namespace(await cluster.pool("rbd"))
    image = await cluster.image(namespace, name)
    return image, header.request(connections.read_ioctx(namespace), image)


@in_trio
async def test_no_more_operations_are_in_flight_to_a_pool_than_the_limit_says(
    ceph: Ceph, cluster: Cluster, connections: Connections, asked: list[str]
) -> None:
    name = ceph.unique("often")
    ceph.make_image(name, b"content")
    image, request = await header_request(cluster, connections, name)
    operations, most = connections.operations, 0

    async def ask() -> None:
        nonlocal most
        for reply in await operations.operate([request] * 100):
            assert header.decode(image, reply).size == len(b"content")
            most = max(most, operations.in_flight[request.ioctx.lane])

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask)
    assert len(asked) > 20 * 100
    assert 0 < most <= OPERATIONS_AT_ONCE


@in_trio
async def test_the_object_prefix_of_an_image_of_format_1_is_the_one_that_rbd_info_says(
    ceph: Ceph, cluster: Cluster, connections: Connections
) -> None:
    name = ceph.unique("old")
    command = ("rbd", "create", "--image-format", "1", "--size", "1M", f"rbd/{name}")
    prefixes = set()
    for _ in range(2):
        ceph.run("env", "RBD_FORCE_ALLOW_V1=1", *command)
        image, request = await header_request(cluster, connections, name)
        decoded = header.decode(image, await connections.operations.ask(request))
        info = json.loads(ceph.run("rbd", "info", "--format", "json", f"rbd/{name}"))
        assert decoded.object_prefix == info["block_name_prefix"]
        prefixes.add(decoded.object_prefix)
        ceph.remove_image(name)
    assert len(prefixes) == 2


@in_trio
async def test_a_large_map_is_loaded_once_and_again_when_it_has_changed(
    ceph: Ceph, cluster: Cluster, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, decoded = ceph.unique("large"), []

    def decode(encoded: bytes) -> ObjectSet:
        decoded.append(encoded)
        return decode_map(encoded)

    decode_map = object_map.decode
    monkeypatch.setattr(object_map, "decode", decode)
    size = CACHED_FROM_OBJECTS * 4 * MIB
    with ceph.ioctx() as ioctx:
        rbd.RBD().create(ioctx, name, size, old_format=False)
    namespace = Namespace(await cluster.pool("rbd"))
    image = await cluster.image(namespace, name)
    for written in range(1, 3):
        ceph.write_image(name, b"data", (size - 4 * MIB) // written)
        del asked[:]
        for _ in range(3):
            assert (await cluster.stat(image)).used_bytes == written * 4 * MIB
        assert len(decoded) == written
        assert len(asked) == 3 * 2 + (written - 1)
    assert {len(each) // 1000 for each in decoded} == {16}


@in_trio
async def test_many_snapshots_are_listed_once_and_again_when_one_was_made_or_removed(
    ceph: Ceph, cluster: Cluster, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, decoded = ceph.unique("snapped"), []

    def decode(answer: bytes) -> Snapshot:
        decoded.append(answer)
        return decode_snapshot(answer)

    decode_snapshot = header.decode_snapshot
    monkeypatch.setattr(header, "decode_snapshot", decode)
    ceph.make_image(name, b"content")
    names = [f"snap{number}" for number in range(CACHED_FROM)]
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as opened:
        for each in names:
            opened.create_snap(each)
        namespace = Namespace(await cluster.pool("rbd"))
        image = await cluster.image(namespace, name)
        for each in names:
            assert (await cluster.snapshot(image, each)).snapshot_id
        assert len(decoded) == CACHED_FROM
        opened.create_snap("new")
        assert list(await cluster.snapshots(image)) == [*names, "new"]
        opened.remove_snap("snap0")
        with pytest.raises(RbdfsError) as raised:
            await cluster.snapshot(image, "snap0")
        assert raised.value.errno == errno.ENOENT
        assert list(await cluster.snapshots(image)) == [*names[1:], "new"]
        assert len(decoded) <= CACHED_FROM * 3 + 1
        assert len(asked) < 3 * CACHED_FROM


@in_trio
async def test_an_image_without_a_header_stays_in_a_listing_if_no_osd_says_whether_it_has_a_name(
    ceph: Ceph, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = ceph.unique("silent")
    ceph.make_image(name, b"content")
    namespace = Namespace(await cluster.pool("rbd"))
    image = (await cluster.image_names(namespace))[name]

    async def answer(_: ReadOperations, requests: Sequence[Request]) -> Sequence[Reply]:
        silent = {"rbd_directory": -errno.ETIMEDOUT}
        return [Reply(silent.get(request.object_name, -errno.ENOENT)) for request in requests]

    monkeypatch.setattr(ReadOperations, "operate", answer)
    assert await cluster.stat_all([image]) == {image: None}


@in_trio
async def test_a_pool_that_does_not_answer_has_one_line_in_the_log_however_often_it_is_listed(
    ceph: Ceph, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    namespace = Namespace(await cluster.pool("rbd"))
    is_silent = iter([True, True, False, True])
    ask = ReadOperations.ask

    async def ask_or_time_out(self: ReadOperations, request: Request) -> Reply:
        if request.ioctx.namespace == namespace and next(is_silent):
            raise RbdfsError("no answer", errno.ETIMEDOUT)
        return await ask(self, request)

    monkeypatch.setattr(ReadOperations, "ask", ask_or_time_out)
    for _ in range(4):
        assert namespace.pool in await cluster.pools()
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines == 2 * ["cannot tell whether pool rbd may be read: no answer"]
