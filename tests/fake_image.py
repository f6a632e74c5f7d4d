"""An image of a cluster that has nothing but its header: what `CephImage` asks, without Ceph."""

import errno
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar, TypeVarTuple, cast

import rbd
import trio

from rbdfs.catalog import ImageRef, Namespace, Pool
from rbdfs.ceph.bindings.aio import LibrbdImage, Portal
from rbdfs.ceph.bindings.librbd import ImageInfo
from rbdfs.ceph.image.ceph_image import CephImage
from rbdfs.ceph.image.handle_cache import HandleCache, Opened
from rbdfs.ceph.image.image_state import HeaderClient, ImageState, Layer, Locker
from rbdfs.ceph.image.revalidate import Checked
from rbdfs.ceph.metadata.header import Header, Parent
from rbdfs.errors import RbdfsError
from rbdfs.spec import ImageSpec
from tests.fake_recovery import lifetime

SIZE = 1 << 20
ROUND_TRIP = 0.01
"""Seconds, of a question to the header."""
NOBODY: frozenset[Locker] = frozenset()

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class FakeHeader:
    """Answers a round trip later, with what the image was when it was asked."""

    def __init__(self, *writers: Locker) -> None:
        self.size = SIZE
        self.writers = frozenset(writers)
        self.error: Exception | None = None
        self.parent: Parent | None = None
        self.asked: list[float] = []

    async def check(self) -> Checked:
        """As `CephImage` asks."""
        self.asked.append(trio.current_time())
        found, error = Checked(self.size, self.writers), self.error
        await trio.sleep(ROUND_TRIP)
        if error is not None:
            raise error
        return found


class FakeHandle:
    """Reads its bytes at trio's next turn, or when the test says so."""

    lane = None

    def __init__(self, site: "Site") -> None:
        self.lifetime = lifetime()
        self.uses = 0
        self.results: list[int] = []
        """What the next reads come to, each its length otherwise."""
        self._site = site
        self._content = site.content

    def start_read(self, offset: int, length: int, callback: Callable[[int, bytes], None]) -> None:
        result = self.results.pop(0) if self.results else length
        trio.lowlevel.current_trio_token().run_sync_soon(callback, result, self._content[offset : offset + length])

    def watchers(self) -> frozenset[int]:
        return frozenset(writer.client for writer in self._site.header.writers)

    def hold(self) -> None:
        self.uses += 1

    def release(self) -> None:
        self.uses -= 1


class InlinePortal(Portal):
    """What blocks does not, here."""

    async def run_holding(self, _: Any, function: Callable[[*Ts], T], *args: *Ts, **__: Any) -> T:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        return function(*args)


class Site:
    """One image of a cluster that has only its header, for a key that may not watch it."""

    client_ids: frozenset[int] = frozenset()

    def __init__(self, content: bytes, features: int = rbd.RBD_FEATURE_EXCLUSIVE_LOCK, *, is_snapshot: bool = False):
        self.content = content
        self.portal = InlinePortal()
        self.header = FakeHeader()
        self.handles: list[FakeHandle] = []
        self._features = features
        self._ref = ImageRef(Namespace(Pool(1, "rbd")), "abc", 1 if is_snapshot else None)
        self.background = SimpleNamespace(start=lambda _: None)

    async def opened(self) -> CephImage:
        """As by an open(), which takes no time of the clock."""
        as_any = cast(Any, self)
        image = await CephImage.open(
            ImageSpec("rbd", "vm1"),
            self._ref,
            cast(HeaderClient, as_any),
            self.portal,
            cast(HandleCache, as_any),
            as_any,
        )
        self.header.asked.clear()
        return image

    def ioctx_of(self, _: Namespace) -> None:
        raise RbdfsError("may not watch", errno.EPERM)

    async def state(self, _spec: ImageSpec, image: ImageRef, _ancestors: Sequence[ImageRef]) -> ImageState:
        parent, lockers = self.header.parent, self.header.writers
        found = await self.header.check()
        header = Header(found.size, 1 << 16, self._features, parent=parent)
        own = Layer(image, header, 1, lockers, 0)
        if parent is None:
            return ImageState((own,))
        return ImageState((own, Layer(parent.image, Header(SIZE, 1 << 16, 0), 1, NOBODY, 0)))

    def take(self, _: ImageRef) -> None:
        """None is cached."""

    async def open(self, _: ImageRef, state: ImageState, _kept: Opened | None = None) -> Opened:
        self.handles.append(FakeHandle(self))
        info = ImageInfo(state.size, 1 << 16, 1 << 16, 1)
        return Opened(cast(LibrbdImage, self.handles[-1]), info, state)
