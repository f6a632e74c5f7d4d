"""An image that is open in librbd, and opened again when librbd would show something else by now.

librbd's read-only handle never notices what others do. So we ask the headers ourselves (image_state.py), compare them
with what they said when the image was opened, and open it again if they differ, or after a reconnect. Reads that are
under way end by the old handle if they can.
"""

import errno
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar, TypeVarTuple

import rbd
import trio

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings.aio import LibrbdImage, Portal
from rbdfs.ceph.bindings.lifetime import by_the_newest
from rbdfs.ceph.image.handle_cache import HandleCache, Opened
from rbdfs.ceph.image.header_watch import HeaderWatch, take_watch
from rbdfs.ceph.image.image_state import HeaderClient, ImageState
from rbdfs.ceph.image.revalidate import Checked, Revalidator
from rbdfs.errors import RbdfsError, StaleError
from rbdfs.spec import ImageSpec

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class ReopeningImage:
    """An image or a snapshot, open read-only.

    Open for writing, librbd takes the exclusive lock to list extents, and if the image has a journal even to read, away
    from the VM that writes to it. Only while an image is watched is `rbd rm` refused, so we watch it if the key allows
    that. A snapshot is not watched: that would not hold off its removal.
    """

    def __init__(
        self, spec: ImageSpec, image: ImageRef, client: HeaderClient, portal: Portal, handles: HandleCache
    ) -> None:
        """Opens nothing: `begin` does."""
        self.spec = spec
        self.image = image
        self.is_snapshot = image.snapshot_id is not None
        self.health = portal.health
        self.watch: HeaderWatch | None = None
        self.revalidator: Revalidator
        self.opened: Opened
        self.handle: LibrbdImage
        """What to read by from now on."""
        self.may_show_parent = False
        """Whether bytes of an ancestor can show through, also in reads that began before the image was flattened."""
        self.size: int
        self.object_size: int
        self.stripe_unit: int
        self.stripe_count: int
        self._client = client
        self._portal = portal
        self._handles = handles
        self._reopening = trio.Lock()
        self._retired: dict[LibrbdImage, trio.Event] = {}
        """Handles that were replaced; the event is set when one is closed."""

    async def begin(self, on_stale: Callable[[], None]) -> tuple[ImageState, frozenset[int]]:
        """Open and watch the image; what its headers say, and the clients that watch it. Raises RbdfsError.

        `on_stale` is called when the image is found to be gone. The watch and all questions go out at once; the first
        read in doubt finds what is removed in between.
        """
        cached = self._handles.take(self.image)
        try:
            besides = () if self.is_snapshot else (self._begin_to_watch,)
            state, others = await self.ask_all(cached, *besides)
        except BaseException:
            if cached is not None:
                await self._handles.close(self.image, cached.handle)
            raise
        self._adopt(await self._handles.open(self.image, state, cached))
        try:
            if others is None:
                others = await self._other_watchers(self.handle)
        except BaseException:
            await self._handles.close(self.image, self.handle)
            raise
        self.revalidator = Revalidator(self.check, _writers(state, others), on_stale)
        self.handle.lifetime.follow(self._on_reconnect)
        return state, others

    async def _begin_to_watch(self) -> None:
        take = partial(take_watch, self.image, self._client.ioctx_of, self._portal)
        self.watch = await HeaderWatch.begin(self.spec, take)

    async def give_watch_back(self) -> None:
        """For an open() that failed. A cancel ends only the waiting."""
        if self.watch is not None:
            await self._handles.background.run(self.watch.aclose)

    async def close(self) -> None:
        """Wait for reads in flight, then give the image and its watch back. Does not raise."""
        handle = None
        while handle is not self.handle or self._retired:  # a revalidation may have reopened the image
            handle = self.handle
            for closed in list(self._retired.values()):
                await closed.wait()
            await handle.wait_until_idle()
        self.handle.lifetime.unfollow(self._on_reconnect)
        await self._handles.release(self.image, self.opened)
        if self.watch is not None:
            await self.watch.aclose()

    def _adopt(self, opened: Opened) -> None:
        """Read by this handle from now on."""
        self.opened = opened
        self.handle = opened.handle
        self.size = opened.info.size
        self.object_size = opened.info.object_size
        self.stripe_unit = opened.info.stripe_unit
        self.stripe_count = opened.info.stripe_count
        self.may_show_parent |= opened.state.is_clone

    # ---- questions

    async def ask(self) -> ImageState:
        """Ask the headers. Raises RbdfsError, StaleError if the image is gone."""
        self.raise_if_stale()
        with self.gone_is_stale():
            return await self._client.state(self.spec, self.image, self.opened.state.ancestors)

    async def ask_all(
        self, opened: Opened | None, *besides: Callable[[], Awaitable[None]]
    ) -> tuple[ImageState, frozenset[int] | None]:
        """Ask the headers and, if the image is open, for its watchers; run `besides` at the same time."""
        ancestors = opened.state.ancestors if opened is not None else ()
        states: list[ImageState] = []
        watchers: list[frozenset[int]] = []

        async def ask_headers() -> None:
            states.append(await self._client.state(self.spec, self.image, ancestors))

        async def ask_watchers(handle: LibrbdImage) -> None:
            watchers.append(await self._other_watchers(handle))

        questions = [ask_headers, *besides]
        if opened is not None:
            questions.append(partial(ask_watchers, opened.handle))
        await _run_all(questions)
        return states[0], watchers[0] if watchers else None

    async def _other_watchers(self, handle: LibrbdImage) -> frozenset[int]:
        """The clients other than us that have the image open for writing: our own watch is no writer's."""
        return await self.run_blocking(handle, handle.watchers) - self._client.client_ids

    async def check(self) -> Checked:
        """Ask what the image is now, and reopen it if librbd would open something else. Raises RbdfsError, StaleError
        if the image is gone."""
        self.health.revalidations += 1
        others: frozenset[int] = frozenset()
        await self.current()
        if not self.is_snapshot and not self.opened.state.own.header.features & rbd.RBD_FEATURE_EXCLUSIVE_LOCK:
            # The watchers are asked before the size: a client that has shrunk the image and is gone has said so.
            with self.gone_is_stale():
                others = await by_the_newest(self.current, self._other_watchers)
        state = await self.ask()
        if not self.opened.state.opens_as(state) or self.handle.lifetime.is_over:
            await self.reopen(state)
        return Checked(state.size, _writers(state, others))

    def raise_if_stale(self) -> None:
        """Raise StaleError once the image is known to be gone."""
        if self.revalidator.stale is not None:
            raise self.revalidator.stale

    @contextmanager
    def gone_is_stale(self) -> Iterator[None]:
        """Turn an ENOENT of the cluster into StaleError."""
        try:
            yield
        except RbdfsError as error:
            if error.errno != errno.ENOENT:
                raise
            raise StaleError(f"{self.spec} was removed while it was open ({error})") from error

    async def run_blocking(self, handle: LibrbdImage, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Call a blocking function that uses the open image, in a thread. A cancel abandons it, but `close` waits for
        it."""
        return await self._portal.run_holding(handle, function, *args, lane=handle.lane)

    # ---- reopening

    async def current(self) -> LibrbdImage:
        """The image, open by the present connection. Raises RbdfsError, StaleError if it is gone."""
        if self.handle.lifetime.is_over:
            await self.reopen(await self.ask())
        return self.handle

    def _on_reconnect(self) -> None:
        """Revalidate, which reopens the image by the new connection.

        By its id: if it was removed while nothing watched it, it is stale, even if another image has its name by now.
        """
        if self.watch is not None:
            self.watch.take_again()
        handle = self.handle
        handle.hold()
        self.revalidator.ask(lambda _: handle.release())

    async def reopen(self, state: ImageState) -> None:
        """Open the image again in librbd. Reads that are under way end by the old handle if they can."""
        async with self._reopening:
            opened = self.opened
            if opened.state is not state and opened.is_still(state) and opened.info.size == state.size:
                return  # another task was first
            self._adopt(await self._handles.open(self.image, state))
            opened.handle.lifetime.unfollow(self._on_reconnect)
            self._retired[opened.handle] = trio.Event()
            self._handles.background.start(partial(self._retire, opened.handle))
            self.handle.lifetime.follow(self._on_reconnect)
            if opened.handle.lifetime.is_over:  # its reads may hang, so they start again by the new handle
                opened.handle.refuse_reads()

    async def _retire(self, handle: LibrbdImage) -> None:
        await self._handles.close(self.image, handle)
        self._retired.pop(handle).set()


def _writers(state: ImageState, others: frozenset[int]) -> frozenset[object]:
    """The clients that may write to an image or shrink it: those that hold the lock, or without that feature all that
    have it open. A snapshot has none."""
    if state.own.image.snapshot_id is not None:
        return frozenset()
    return state.own.lockers if state.own.header.features & rbd.RBD_FEATURE_EXCLUSIVE_LOCK else others


async def _run_all(tasks: list[Callable[[], Awaitable[None]]]) -> None:
    """Run all at once. Raises the first error, not an ExceptionGroup, and cancels the others then."""
    errors: list[RbdfsError] = []

    async def run(task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except RbdfsError as error:
            errors.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(run, task)
    if errors:
        raise errors[0]
