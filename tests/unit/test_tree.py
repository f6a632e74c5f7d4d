"""Listings of any size let other tasks run."""

from typing import cast

import trio

from rbdfs.catalog import Catalog, ImageRef, Namespace, Pool
from rbdfs.fuse.nodes import pool_directory, snap_directory, snapshot_directory
from rbdfs.fuse.tree import DIRECTORIES_AT_ONCE, Tree
from rbdfs.spec import ImageSpec
from rbdfs.tasks import SLICE
from tests.in_trio import counted_turns, in_trio

POOL = Pool(1, "rbd")
COUNT = 20 * SLICE


class Crowd:
    """A pool with COUNT images, each of which has as many snapshots; and as many namespaces."""

    def __init__(self) -> None:
        self.asked = self.most_asked = 0

    async def image_names(self, namespace: Namespace) -> dict[str, ImageRef]:
        return {f"image{number}": ImageRef(namespace, str(number)) for number in range(COUNT)}

    async def snapshots(self, image: ImageRef) -> dict[str, ImageRef]:
        return {f"at{number}": ImageRef(image.namespace, image.id, number) for number in range(COUNT)}

    async def namespaces(self, pool: Pool) -> list[Namespace]:
        return [Namespace(pool, f"team{number}") for number in range(COUNT)]

    async def stat_all(self, _: object) -> dict[ImageRef, None]:
        return {}

    async def changed_ns(self, _: Namespace) -> int:
        self.asked += 1
        self.most_asked = max(self.most_asked, self.asked)
        await trio.lowlevel.checkpoint()
        self.asked -= 1
        return 1


@in_trio
async def test_other_tasks_run_while_thousands_of_images_or_snapshots_are_listed() -> None:
    tree, namespace = Tree(cast(Catalog, Crowd()), 0), Namespace(POOL)
    image = snapshot_directory(ImageRef(namespace, "1"), ImageSpec("rbd", "image1"))
    for directory in (pool_directory(POOL), snap_directory(namespace), image):
        async with counted_turns() as turns:
            entries = await tree.entries(directory)
        assert len(entries) >= COUNT
        assert turns.count > COUNT // SLICE // 2


@in_trio
async def test_thousands_of_namespaces_are_asked_about_a_few_at_a_time() -> None:
    crowd = Crowd()
    tree = Tree(cast(Catalog, crowd), 0)
    stats = await tree.stat_all(entry.node for entry in await tree.entries(pool_directory(POOL)))
    assert list(stats.values()) == [1] * COUNT
    assert crowd.most_asked == DIRECTORIES_AT_ONCE
