"""A listing is read on in time, however long the cluster takes to tell of its images."""

import errno
from collections.abc import Iterable, Mapping
from typing import Any, cast

import pyfuse3
import pytest
import trio
import trio.testing

from rbdfs.catalog import Catalog, ImageRef, ImageStat, Namespace, Pool
from rbdfs.fuse.attributes import ENTRY_SECONDS, FileAttributes
from rbdfs.fuse.listing import LISTED_AT_ONCE, LISTING_SECONDS
from rbdfs.fuse.nodes import Node, image_file
from rbdfs.fuse.operations import Operations
from rbdfs.fuse.timeouts import RETRY_AFTER_SECONDS
from rbdfs.fuse.tree import DirEntry, Stat, Tree
from rbdfs.fuse.trouble_log import TroubleLog
from rbdfs.fuse.troubles import Troubles
from rbdfs.image.open_image import OpenImage
from rbdfs.image.open_images import OpenImages
from rbdfs.spec import ImageSpec
from tests.in_trio import in_trio, with_a_clock

NAMESPACE = Namespace(Pool(1, "rbd"))
A_REPLY = 50
"""Entries that the kernel takes at a time."""
ENTRIES = [
    DirEntry(f"{number:04}", image_file(ImageRef(NAMESPACE, f"{number:x}"), ImageSpec("rbd", f"{number:04}")))
    for number in range(LISTED_AT_ONCE + 100)
]


class SlowTree:
    """A directory of many images, of which the cluster takes its time to tell."""

    def __init__(self, seconds: float) -> None:
        self.asked: list[int] = []
        """Of how many, each time."""
        self._seconds = seconds

    def directory(self, _inode: int) -> None:
        """There is one."""

    async def entries(self, _directory: None) -> list[DirEntry]:
        """All of them."""
        return ENTRIES

    async def stat_all(self, nodes: Iterable[Node]) -> Mapping[int, Stat | None]:
        """Each has a byte."""
        inodes = [node.inode for node in nodes]
        self.asked.append(len(inodes))
        await trio.sleep(self._seconds)
        return {inode: ImageStat(1, 1, 0) for inode in inodes}

    def add_lookup(self, node: Node) -> None:
        """The kernel knows it."""


def list_slowly(monkeypatch: pytest.MonkeyPatch, seconds: float, a_reply: float = 0.0) -> tuple[list[int], list[float]]:
    """How many were asked of at a time, and for how long the kernel may believe each answer."""
    tree, valid, limit = SlowTree(seconds), list[float](), [0]

    def reply(_token: object, _name: bytes, attributes: Any, next_id: int) -> bool:
        if next_id > limit[0]:
            return False
        valid.append(attributes.entry_timeout)
        return True

    async def read_all() -> None:
        attributes = FileAttributes(uid=0, gid=0, umask=0, direct_io=False)
        unused = cast(Catalog, None), cast(OpenImages, None), cast(Any, None)
        operations = Operations(cast(Tree, tree), *unused, attributes, TroubleLog(Troubles(), lambda _inode: None))
        handle = await operations.opendir(1, cast(Any, None))
        while len(valid) < len(ENTRIES):
            limit[0] = len(valid) + A_REPLY
            await operations.readdir(handle, len(valid), cast(Any, None))
            await trio.sleep(a_reply)

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    trio.run(read_all, clock=trio.testing.MockClock(autojump_threshold=0))
    return tree.asked, valid


def test_images_are_asked_of_in_large_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, valid = list_slowly(monkeypatch, 0.2)
    assert asked == [LISTED_AT_ONCE, 100]
    assert min(valid) == pytest.approx(ENTRY_SECONDS - 0.2)


def test_a_cluster_that_takes_long_is_not_asked_again_for_each_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, valid = list_slowly(monkeypatch, 3.0)
    assert asked == [LISTED_AT_ONCE, 100]
    assert set(valid) == {0.0}  # the kernel asks again before it relies on any


def test_what_is_read_slowly_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, valid = list_slowly(monkeypatch, 0.1, a_reply=LISTING_SECONDS)
    assert len(asked) == -(-len(ENTRIES) // A_REPLY)
    assert min(valid) >= ENTRY_SECONDS - LISTING_SECONDS


class SlowImages(OpenImages):
    """Images whose close the cluster does not answer."""

    def __init__(self) -> None:
        self.closed: list[OpenImage] = []

    async def close(self, image: OpenImage) -> None:
        self.closed.append(image)
        await trio.sleep_forever()


@in_trio
async def test_each_file_is_closed_though_the_cluster_did_not_answer_for_the_one_before() -> None:
    images = SlowImages()
    troubles = TroubleLog(Troubles(), lambda _inode: None)
    unused = cast(Tree, None), cast(Catalog, None), images, cast(Any, None)
    operations = Operations(*unused, FileAttributes(uid=0, gid=0, umask=0, direct_io=False), troubles, 0.05)
    files = {handle: cast(OpenImage, object()) for handle in range(1, 4)}
    operations.files |= files
    for handle in files:
        with pytest.raises(pyfuse3.FUSEError) as raised:
            await operations.release(handle)
        assert raised.value.errno == errno.ETIMEDOUT
    assert images.closed == list(files.values())
    assert not operations.files


@with_a_clock
async def test_a_question_that_was_not_answered_in_time_is_not_asked_again_for_a_moment() -> None:
    asked = []

    class Silent:
        async def usage(self) -> None:
            asked.append(trio.current_time())
            await trio.sleep_forever()

    unused = cast(Tree, None), cast(Catalog, Silent()), cast(OpenImages, None), cast(Any, None)
    troubles = TroubleLog(Troubles(), lambda _inode: None)
    operations = Operations(*unused, FileAttributes(uid=0, gid=0, umask=0, direct_io=False), troubles, 0.05)
    context = pyfuse3.RequestContext()
    for wait in (0.0, 0.0, RETRY_AFTER_SECONDS):
        await trio.sleep(wait)
        with pytest.raises(pyfuse3.FUSEError) as raised:
            await operations.statfs(context)
        assert raised.value.errno == errno.ETIMEDOUT
    assert len(asked) == 2
