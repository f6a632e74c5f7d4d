"""What listing asks of a real cluster: operations are counted, time is not."""

import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import rbd
import trio

from rbdfs.catalog import ImageFacts, ImageRef, Namespace
from rbdfs.ceph import facts, header
from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.connect import ClusterOptions
from rbdfs.ceph.read_op import OPERATIONS_AT_ONCE, Reply, Request
from rbdfs.errors import RbdfsError
from tests.ceph import MIB, Ceph
from tests.in_trio import in_trio

IMAGES = 2 * facts.IMAGES_A_BATCH + 2


@asynccontextmanager
async def counting(ceph: Ceph, pool: str) -> AsyncIterator[tuple[Cluster, Namespace, list[str]]]:
    """A connection, a pool of the cluster, and the objects that it sends read operations to."""
    asked: list[str] = []
    cluster = await Cluster.connect(ClusterOptions(conf=ceph.conf))
    try:
        operate = cluster._operations.operate

        async def count(requests: Sequence[Request]) -> Sequence[Reply]:
            asked.extend(request.object_name for request in requests)
            return await operate(requests)

        cluster._operations.operate = count  # type: ignore[method-assign]
        yield cluster, Namespace(await cluster.pool(pool)), asked
    finally:
        await cluster.aclose()


@in_trio
async def test_listing_costs_two_operations_an_image_and_one_for_all_names(ceph: Ceph) -> None:
    pool = ceph.unique("counted")
    ceph.make_pool(pool)
    try:
        with ceph.ioctx(pool) as ioctx:
            for number in range(IMAGES):
                rbd.RBD().create(ioctx, f"image{number}", MIB, old_format=False)
        async with counting(ceph, pool) as (cluster, namespace, asked):
            names = await cluster.image_names(namespace)
            assert len(names) == IMAGES
            assert asked == ["rbd_directory"]
            found = await cluster.facts_of_all(names.values())
            assert {each.size for each in found.values() if each} == {MIB}
            assert len(found) == IMAGES
            assert len(asked) == 1 + 2 * IMAGES
            watchers = [ceph.watchers(name, pool) for name in ("image0", "image1")]
            assert watchers == [[], []]
    finally:
        ceph.remove_pool(pool)


@in_trio
async def test_a_parent_is_asked_once_for_all_of_its_clones(ceph: Ceph) -> None:
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
        async with counting(ceph, pool) as (cluster, namespace, asked):
            names = await cluster.image_names(namespace)
            asked.clear()
            found = await cluster.facts_of_all(ref for name, ref in names.items() if name != "parent")
            assert {each.used_bytes for each in found.values() if each} == {MIB}
            assert len(found) == 10
            assert asked.count(header.object_of(names["parent"])) == 1
            assert len(asked) == 2 * 11
    finally:
        ceph.remove_pool(pool)


@in_trio
async def test_what_is_gone_is_left_out_and_what_the_cluster_does_not_tell_is_none(ceph: Ceph) -> None:
    names = [ceph.unique(name) for name in ("here", "gone", "silent")]
    for name in names:
        ceph.make_image(name, b"x")
    async with counting(ceph, "rbd") as (cluster, namespace, _):
        here, gone, silent = [await cluster.image(namespace, name) for name in names]
        ceph.remove_image(names[1])
        operate = cluster._operations.operate

        async def one_is_silent(requests: Sequence[Request]) -> Sequence[Reply]:
            timed_out = Reply(-errno.ETIMEDOUT)
            return [
                timed_out if request.object_name == header.object_of(silent) else reply
                for request, reply in zip(requests, await operate(requests), strict=True)
            ]

        cluster._operations.operate = one_is_silent  # type: ignore[method-assign]
        found = await cluster.facts_of_all([here, gone, silent])
        assert found == {here: ImageFacts(1, 1, await modified_ns(cluster, here)), silent: None}
        with pytest.raises(RbdfsError, match="timed out"):
            await cluster.facts(silent)


async def modified_ns(cluster: Cluster, image: ImageRef) -> int:
    """Of an image that is alone in asking."""
    return (await cluster.facts(image)).modified_ns


@in_trio
async def test_no_more_operations_are_in_flight_than_librados_takes_without_blocking(ceph: Ceph) -> None:
    name = ceph.unique("often")
    ceph.make_image(name, b"content")
    async with counting(ceph, "rbd") as (cluster, namespace, asked):
        operations = cluster._operations
        image = await cluster.image(namespace, name)
        request = header.request(cluster._read_ioctx(namespace), image)
        most = 0

        async def ask() -> None:
            nonlocal most
            for reply in await operations.operate([request] * 100):
                assert header.decode(image, reply).size == len(b"content")
                most = max(most, operations._in_flight)

        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(ask)
        assert len(asked) > 20 * 100
        assert 0 < most <= OPERATIONS_AT_ONCE
