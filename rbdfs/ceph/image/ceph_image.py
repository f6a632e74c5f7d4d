"""One image or snapshot that is open in the cluster: reads, size, and what others have done to it meanwhile."""

import errno
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import TypeVar, TypeVarTuple

import rbd
import trio

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings.aio import LibrbdImage, Portal
from rbdfs.ceph.bindings.librados import Ioctx
from rbdfs.ceph.bindings.librbd import Diff
from rbdfs.ceph.bindings.lifetime import by_the_newest
from rbdfs.ceph.bindings.watch import Watch
from rbdfs.ceph.errors import reason_of, translated
from rbdfs.ceph.image.handle_cache import HandleCache, Opened
from rbdfs.ceph.image.header_watch import HeaderWatch
from rbdfs.ceph.image.image_state import HeaderClient, ImageState
from rbdfs.ceph.image.revalidate import Checked, Revalidator
from rbdfs.ceph.metadata import header
from rbdfs.ceph.metadata.object_map import ObjectSet
from rbdfs.errors import BeyondEndError, RbdfsError, ReadError, StaleError
from rbdfs.spec import ImageSpec
from rbdfs.threads import run_in_thread

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

FindObjects = Callable[[ImageRef], Awaitable[ObjectSet | None]]
"""Which of an image's objects hold data (`StatReader.objects`)."""

OnRead = Callable[[bytes | RbdfsError], None]
"""As the image's side has it (rbdfs/image/backend.py)."""

OBJECTS_ASKED_AT_ONCE = 256
"""Of an image without a fast-diff map: what SEEK_DATA waits for, some 10 ms at 0.3 ms a round trip."""

OBJECTS_OF_A_MAP_AT_ONCE = 1 << 16
"""256 GiB with objects of 4 MiB: 2 ms, or 40 if every other object is a hole."""

REVALIDATE_SECONDS = 1.0
"""How often an image is revalidated while it is read, so that readers served from the cache also learn that it was
removed."""

ATTEMPTS = 4
"""How often a question is asked again because the image was opened anew while it was answered."""

IMMUTABLE_VERSION = 0
"""The write version of what nobody writes to."""


class CephImage:
    """An image or a snapshot that is open in librbd: an `ImageBackend` (rbdfs/image/backend.py).

    It is open read-only, always: open as for writing, librbd takes the exclusive lock to list extents, and of an image
    with a journal even to read, away from the VM that writes to it. Read-only, librbd hears of nothing that others do,
    so we ask the headers ourselves (image_state.py), open the image anew in librbd when they say something else
    (`_renew`), and watch it if the key allows that: only so is `rbd rm` refused meanwhile. A snapshot is not watched,
    which would not hold off its removal.
    """

    def __init__(
        self,
        spec: ImageSpec,
        image: ImageRef,
        client: HeaderClient,
        portal: Portal,
        handles: HandleCache,
        find_objects: FindObjects,
    ) -> None:
        """`open` does this, and opens the image."""
        self.spec = spec
        self.revalidate_due = False
        self.write_version: int | None = None
        self.watch: HeaderWatch | None = None
        self._is_snapshot = image.snapshot_id is not None
        self._image = image
        self._client = client
        self._portal = portal
        self._handles = handles
        self._find_objects = find_objects
        self._show_through = False
        self._opened: Opened
        self._handle: LibrbdImage
        self._renewing = trio.Lock()
        self._retired: dict[LibrbdImage, trio.Event] = {}
        """Handles that were replaced; the event is set when one is closed."""

    @classmethod
    async def open(
        cls,
        spec: ImageSpec,
        image: ImageRef,
        client: HeaderClient,
        portal: Portal,
        handles: HandleCache,
        find_objects: FindObjects,
    ) -> "CephImage":
        """Open the image by `handles`; `find_objects` says which of its objects hold data. Raises RbdfsError."""
        opened = cls(spec, image, client, portal, handles, find_objects)
        try:
            await opened._begin()
        except BaseException as error:
            if opened.watch is not None:
                await handles.background.run(opened.watch.aclose)
            if isinstance(error, RbdfsError):
                raise RbdfsError(f"cannot open {spec}: {error}", error.errno) from error
            raise
        trio.lowlevel.spawn_system_task(opened._revalidate_later)
        return opened

    async def _begin(self) -> None:
        """The watch and all questions go out at once; the first read in doubt finds what is removed in between."""
        kept = self._handles.take(self._image)
        try:
            besides = () if self._is_snapshot else (self._begin_to_watch,)
            state, others = await self._ask_all(kept, *besides)
        except BaseException:
            if kept is not None:
                await self._handles.close(self._image, kept.handle)
            raise
        self._adopt(await self._handles.open(self._image, state, kept))
        try:
            if others is None:
                others = await self._other_watchers(self._handle)
        except BaseException:
            await self._handles.close(self._image, self._handle)
            raise
        self._settle(state, others)
        self._revalidator = Revalidator(self._check, _writers(state, others), self._set_revalidate_due)
        self._handle.lifetime.follow(self._go_over)

    async def _begin_to_watch(self) -> None:
        self.watch = await HeaderWatch.begin(self.spec, self._take_watch)

    async def _take_watch(self, on_lost: Callable[[], None]) -> Watch:
        async def current() -> Ioctx:
            return self._client.ioctx_of(self._image.namespace)

        async def take(ioctx: Ioctx) -> tuple[Ioctx, Watch]:
            return ioctx, await Watch.take(ioctx, header.object_of(self._image), self._portal, on_lost)

        ioctx, watch = await by_the_newest(current, take)
        if ioctx.lifetime.is_over:  # since it was taken
            on_lost()
        return watch

    def _go_over(self) -> None:
        """The connection was replaced: go over to the new one, as if the image had been changed."""
        if self.watch is not None:
            self.watch.take_anew()
        handle = self._handle
        handle.hold()
        self._revalidator.ask(lambda _: handle.release())

    async def _current(self) -> LibrbdImage:
        """The image, open by the connection that there is now. Raises RbdfsError, StaleError if it is gone."""
        if self._handle.lifetime.is_over:
            await self._renew(await self._ask())
        return self._handle

    async def _ask_all(
        self, opened: Opened | None, *besides: Callable[[], Awaitable[None]]
    ) -> tuple[ImageState, frozenset[int] | None]:
        """The headers and, if the image is open, who watches it; all at once, also what else there is to do."""
        ancestors = opened.state.ancestors if opened is not None else ()
        states: list[ImageState] = []
        watchers: list[frozenset[int]] = []

        async def ask_headers() -> None:
            states.append(await self._client.state(self.spec, self._image, ancestors))

        async def ask_watchers(handle: LibrbdImage) -> None:
            watchers.append(await self._other_watchers(handle))

        questions = [ask_headers, *besides]
        if opened is not None:
            questions.append(partial(ask_watchers, opened.handle))
        await _all_of(questions)
        return states[0], watchers[0] if watchers else None

    async def _other_watchers(self, handle: LibrbdImage) -> frozenset[int]:
        """The clients that have the image open for writing, but for ourselves: a watch of ours is no writer's."""
        return await self._blocking(handle, handle.watchers) - self._client.client_ids

    def _adopt(self, opened: Opened) -> None:
        """Read by this handle from now on."""
        self._opened = opened
        self._handle = opened.handle
        self.size = opened.info.size
        self.object_size = opened.info.object_size
        self.stripe_unit = opened.info.stripe_unit
        self.stripe_count = opened.info.stripe_count
        # For good: reads of before it was flattened may still be under way.
        self._show_through |= opened.state.is_clone

    def _settle(self, state: ImageState, others: frozenset[int]) -> None:
        """Find out whether what was read before an open() is still right, and what is read now will be.

        Whoever writes to an image with the exclusive-lock feature takes the lock first, which is an entry in the header
        object. So while the header has the same version, nobody holds the lock and nobody else has the image open,
        nobody writes. (krbd that mapped an image before it had the feature writes without the lock.)
        """
        own = state.own
        lockers = {locker.client for locker in own.lockers}
        if self._is_snapshot:
            if self._opened.state.is_settled and others <= lockers:
                self._opened = self._opened._replace(is_immutable=True)
            self.write_version = IMMUTABLE_VERSION if self._opened.is_immutable else None
        else:
            locks = own.header.features & rbd.RBD_FEATURE_EXCLUSIVE_LOCK
            is_known = locks and not lockers and not others and state.is_settled
            self.write_version = own.version or None if is_known else None

    @property
    def image(self) -> ImageRef:
        """What is open."""
        return self._image

    @property
    def state(self) -> ImageState:
        """The headers, as they were when it was opened."""
        return self._opened.state

    @property
    def pool(self) -> int:
        """See `ImageBackend.pool`."""
        return self._image.namespace.pool.id

    @property
    def is_immutable(self) -> bool:
        """See `ImageBackend.is_immutable`."""
        return self._opened.is_immutable

    def start_read(self, offset: int, length: int, callback: OnRead, attempts: int = ATTEMPTS) -> None:
        """See `ImageBackend.start_read`. `attempts` is how often to read again by a handle that was opened anew."""
        handle = self._handle
        try:
            handle.start_read(offset, length, partial(self._finish_read, handle, offset, length, callback, attempts))
        except ValueError:  # closed by now
            callback(StaleError(f"cannot read {self.spec} at {offset}: it was closed; open it again"))

    def _finish_read(
        self,
        handle: LibrbdImage,
        offset: int,
        length: int,
        callback: OnRead,
        attempts: int,
        result: int,
        data: bytes,
    ) -> None:
        """librbd has answered: these bytes are the image's, or may be what is left of one that was removed."""
        if result != length:
            self._fail_read(handle, offset, length, callback, attempts, result)
            return
        health = self._portal.health
        health.last_result, health.last_at = result, monotonic()  # as `note`, without a call
        # An object of HEAD that was removed or cut ends with a zero, but a clone's shows its parent's bytes.
        unit = self.stripe_unit
        if self._is_snapshot or self._show_through or not data[-1] or 0 in data[unit - 1 - offset % unit :: unit]:
            handle.hold()
            self._revalidator.ask(partial(self._finish_if_valid, handle, offset, data, callback, attempts))
        else:
            callback(data)

    def _fail_read(
        self, handle: LibrbdImage, offset: int, length: int, callback: OnRead, attempts: int, result: int
    ) -> None:
        handle.lifetime.note(result)
        what = f"cannot read {self.spec} at {offset} (+{length})"
        if result >= 0 or result == -errno.EINVAL:
            callback(BeyondEndError(f"{what}: the image ends before"))
            return
        error = ReadError(f"{what}: {reason_of(-result)}", -result)
        if attempts and (result == -errno.ESHUTDOWN or handle.lifetime.is_over):
            handle.hold()
            again = partial(self.start_read, offset, length, callback, attempts - 1)
            trio.lowlevel.spawn_system_task(self._read_again, handle, again, callback, error)
        else:
            callback(error)

    async def _read_again(
        self, handle: LibrbdImage, again: Callable[[], None], callback: OnRead, error: RbdfsError
    ) -> None:
        """Read by a new connection, if there is one or can be."""
        try:
            if handle is self._handle and await handle.lifetime.is_over_after(error.errno):
                await self._revalidator.stable_size()  # which goes over to it
        except RbdfsError as failure:
            error = failure
        except Exception as failure:
            log.exception("a read could not be asked again")
            error = RbdfsError(f"unexpected {type(failure).__name__}: {failure}")
        handle.release()
        try:
            if handle is self._handle:
                callback(error)
            else:
                again()
        except Exception:  # out of a system task it would end the mount for everyone
            log.exception("a read could not be answered")

    def _finish_if_valid(
        self,
        handle: LibrbdImage,
        offset: int,
        data: bytes,
        callback: OnRead,
        attempts: int,
        revalidated: int | RbdfsError,
    ) -> None:
        handle.release()
        what = f"cannot read {self.spec} at {offset} (+{len(data)})"
        if isinstance(revalidated, StaleError):
            callback(revalidated)
        elif isinstance(revalidated, RbdfsError):
            callback(ReadError(f"{what}: cannot tell zeros from what was removed: {revalidated}", revalidated.errno))
        elif handle is not self._handle:  # what shows through is another, or may have been when this was read
            if attempts:
                self.start_read(offset, len(data), callback, attempts - 1)
            else:
                callback(ReadError(f"{what}: the image and its parents change all the time", errno.EIO))
        elif revalidated < offset + len(data):
            callback(BeyondEndError(f"{what}: the image ends before"))
        else:
            callback(data)

    async def _blocking(self, handle: LibrbdImage, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Call what blocks and uses an open image, in a thread. A cancel abandons it, but `close` waits for it."""
        return await self._portal.run_holding(handle, function, *args, lane=handle.lane)

    @property
    def has_map(self) -> bool:
        """See `ImageBackend.has_map`."""
        return self._opened.state.has_fast_diff and self.stripe_count == 1

    @property
    def stale(self) -> StaleError | None:
        """See `ImageBackend.stale`."""
        return self._revalidator.stale

    def revalidate_soon(self) -> None:
        """See `ImageBackend.revalidate_soon`."""
        if self._revalidator.stale is not None:
            raise self._revalidator.stale
        self.revalidate_due = False
        handle = self._handle
        handle.hold()
        self._revalidator.ask(partial(self._revalidated, handle))

    def _revalidated(self, handle: LibrbdImage, _: int | RbdfsError) -> None:
        handle.release()
        trio.lowlevel.spawn_system_task(self._revalidate_later)

    async def _revalidate_later(self) -> None:
        await trio.sleep(REVALIDATE_SECONDS)
        self.revalidate_due = True

    def _set_revalidate_due(self) -> None:
        self.revalidate_due = True

    async def _check(self) -> Checked:
        """What the image is now. If librbd would open something else by now, it is opened anew. Raises StaleError."""
        self._portal.health.revalidations += 1
        others: frozenset[int] = frozenset()
        await self._current()
        if not self._is_snapshot and not self._opened.state.own.header.features & rbd.RBD_FEATURE_EXCLUSIVE_LOCK:
            # Who watches is asked before the size: who has shrunk it and is gone has said so.
            with self._gone_is_stale():
                others = await by_the_newest(self._current, self._other_watchers)
        state = await self._ask()
        if not self._opened.state.opens_as(state) or self._handle.lifetime.is_over:
            await self._renew(state)
        return Checked(state.size, _writers(state, others))

    async def _ask(self) -> ImageState:
        """The headers. Raises RbdfsError, StaleError if the image is gone."""
        if self._revalidator.stale is not None:
            raise self._revalidator.stale
        with self._gone_is_stale():
            return await self._client.state(self.spec, self._image, self._opened.state.ancestors)

    @contextmanager
    def _gone_is_stale(self) -> Iterator[None]:
        """Turn an ENOENT of the cluster into StaleError."""
        try:
            yield
        except RbdfsError as error:
            if error.errno != errno.ENOENT:
                raise
            raise StaleError(f"{self.spec} was removed while it was open ({error})") from error

    async def _renew(self, state: ImageState) -> None:
        """Open the image anew in librbd. Reads that are under way end by the old handle, if that can be."""
        async with self._renewing:
            opened = self._opened
            if opened.state is not state and opened.is_still(state) and opened.info.size == state.size:
                return  # somebody else was here
            self._adopt(await self._handles.open(self._image, state))
            opened.handle.lifetime.unfollow(self._go_over)
            self._retired[opened.handle] = trio.Event()
            self._handles.background.start(partial(self._retire, opened.handle))
            self._handle.lifetime.follow(self._go_over)
            if opened.handle.lifetime.is_over:  # they may hang there; so they are asked again
                opened.handle.refuse_reads()

    async def _retire(self, handle: LibrbdImage) -> None:
        await self._handles.close(self._image, handle)
        self._retired.pop(handle).set()

    async def verify(self) -> None:
        """See `ImageBackend.verify`."""
        try:
            await self._ask()
        except StaleError as error:
            self._revalidator.mark_stale(error)
            raise

    async def refresh(self) -> int:
        """See `ImageBackend.refresh`."""
        state = await self._ask()
        if state.size != self.size or not self._opened.state.opens_as(state):
            await self._renew(state)  # librbd clips reads to the size that it knows
        return self.size

    async def bring_up_to_date(self) -> None:
        """See `ImageBackend.bring_up_to_date`."""
        if self._revalidator.stale is not None:
            raise self._revalidator.stale
        with self._gone_is_stale():
            state, others = await by_the_newest(self._current, lambda _: self._ask_all(self._opened))
        version = self.write_version
        if not self._opened.is_still(state):
            await self._renew(state)
        self._settle(state, others or frozenset())
        if self.write_version is None or self.write_version != version:
            settled, self.write_version = self.write_version, None  # a cancel must not leave it as if this were done
            await self._blocking(self._handle, self._handle.invalidate_cache)
            self.write_version = settled

    async def extents_window(self) -> int:
        """See `ImageBackend.extents_window`.

        With valid fast-diff maps of the image and its ancestors, they tell; of a striped image librbd asks them, and
        loads all for each call. Without, librbd asks each object for its snapshots, ten at a time.
        """
        await self._check()
        if self.has_map:
            return OBJECTS_OF_A_MAP_AT_ONCE * self.object_size
        if self._opened.state.has_fast_diff or self._opened.state.is_migrating:
            return max(self.size, 1)
        return OBJECTS_ASKED_AT_ONCE * self.object_size * self.stripe_count

    async def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """See `ImageBackend.extents`: by object maps, or else `rbd_diff_iterate2` from the beginning of time, by whole
        objects."""
        what = f"cannot ask where {self.spec} holds data"

        async def ask(handle: LibrbdImage) -> tuple[LibrbdImage, list[tuple[int, int]]]:
            return handle, await self._blocking(handle, handle.extents, offset, length)

        for _ in range(ATTEMPTS):
            handle = await self._current()
            if self._opened.state.is_migrating:  # librbd aborts the process over some sources (tracker 53786)
                return [(offset, length)]
            if self.has_map and (objects := await self._find_objects(self._image)):
                found = await run_in_thread(
                    _extents, objects, self.object_size, offset, offset + length, abandon_on_cancel=True
                )
            else:
                with translated(f"ask where {self.spec} holds data"):
                    handle, found = await by_the_newest(self._current, ask)
            # What was removed is no hole. And the flags, which say whether the maps can be believed, are asked after
            # the maps were loaded.
            if await self._revalidator.stable_size() < offset + length:
                raise BeyondEndError(f"{what}: it was shrunk meanwhile")
            if handle is self._handle:
                return found
        raise RbdfsError(f"{what}: the image and its parents change all the time")

    async def changes(self, since: str | None, offset: int, length: int) -> list[Diff]:
        """What of a range may differ from an earlier snapshot, by name, but for what shows through of its ancestors; or
        from the beginning of time, and that with them. By offset; pieces do not overlap. Raises RbdfsError.
        """
        if self._opened.state.is_migrating:  # as in `extents`
            return [Diff(offset, length, exists=True)]
        return await self._blocking(self._handle, self._handle.changes, since, offset, length)

    async def close(self) -> None:
        """See `ImageBackend.close`."""
        handle = None
        while handle is not self._handle or self._retired:  # a revalidation may have opened the image anew
            handle = self._handle
            for closed in list(self._retired.values()):
                await closed.wait()
            await handle.wait_until_idle()
        self._handle.lifetime.unfollow(self._go_over)
        await self._handles.release(self._image, self._opened)
        if self.watch is not None:
            await self.watch.aclose()


def _extents(objects: ObjectSet, object_size: int, start: int, end: int) -> list[tuple[int, int]]:
    """What holds data of the bytes [start, end): (offset, length) pairs of whole objects."""
    runs = objects.runs(start // object_size, -(-end // object_size))
    return [(first * object_size, (last - first) * object_size) for first, last in runs]


def _writers(state: ImageState, others: frozenset[int]) -> frozenset[object]:
    """Who may write to an image, or shrink it: who holds the lock, else whoever has it open. A snapshot has none."""
    if state.own.image.snapshot_id is not None:
        return frozenset()
    return state.own.lockers if state.own.header.features & rbd.RBD_FEATURE_EXCLUSIVE_LOCK else others


async def _all_of(tasks: list[Callable[[], Awaitable[None]]]) -> None:
    """Run all at once. Raises the first error, and cancels the others then; no ExceptionGroup."""
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
