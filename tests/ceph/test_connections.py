"""Connections: what waits in which thread, and that nothing is asked of librados and librbd after a disconnect."""

import pytest
import trio
import trio.testing

from rbdfs.catalog import Namespace
from rbdfs.ceph.bindings.aio import Portal
from rbdfs.ceph.bindings.lifetime import Lifetime
from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.ceph.connection.connections import Connection, Connections
from rbdfs.spec import ImageSpec
from rbdfs.threads import run_in_thread
from tests.cluster import Ceph, random_bytes, silent
from tests.in_trio import in_trio


@in_trio
async def test_a_disconnect_waits_for_an_open_that_was_given_up(ceph: Ceph, monkeypatch: pytest.MonkeyPatch) -> None:
    name = ceph.unique("given-up")
    ceph.make_image(name, random_bytes(4096))
    users, at_close = [0], list[int]()
    hold, release, close = Lifetime.hold, Lifetime.release, Connection.close

    def counted_hold(lifetime: Lifetime) -> None:
        users[0] += 1
        hold(lifetime)

    def counted_release(lifetime: Lifetime) -> None:
        users[0] -= 1
        release(lifetime)

    def noting_close(connection: Connection) -> None:
        at_close.append(users[0])
        close(connection)

    monkeypatch.setattr(Lifetime, "hold", counted_hold)
    monkeypatch.setattr(Lifetime, "release", counted_release)
    monkeypatch.setattr(Connection, "close", noting_close)
    cluster = await Cluster.connect(ClusterOptions(conf=ceph.conf))
    try:
        image = await cluster.image(Namespace(await cluster.pool("rbd")), name)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cluster.open_image, ImageSpec("rbd", name), image)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert users[0]
    finally:
        await cluster.aclose()
    assert at_close == [0]


@in_trio
async def test_a_new_pool_that_was_listed_is_used_without_a_wait_for_the_monitors(ceph: Ceph) -> None:
    connections = Connections(ClusterOptions(conf=ceph.conf), frozenset(), Portal())
    await connections.open()
    try:
        name = ceph.unique("new-pool")
        ceph.make_pool(name)
        (pool,) = [pool for pool in await connections.pools() if pool.name == name]
        with silent(ceph, "mon.a"), trio.fail_after(5):
            for open_ioctx in (connections.read_ioctx, connections.current.ioctx):
                await run_in_thread(open_ioctx, Namespace(pool), abandon_on_cancel=True)
    finally:
        await connections.aclose()
