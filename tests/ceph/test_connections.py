"""The end of a connection: librados and librbd must not be asked for anything any more."""

import pytest
import trio
import trio.testing

from rbdfs.catalog import Namespace
from rbdfs.ceph.bindings.lifetime import Lifetime
from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.ceph.connection.connections import Connection
from rbdfs.spec import ImageSpec
from tests.cluster import Ceph, random_bytes
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
