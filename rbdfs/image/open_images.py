"""The images that are open now: all open files of an image share one librbd image, one watch and one cache."""

import logging
from collections.abc import Hashable

import trio

from rbdfs.errors import StaleError
from rbdfs.image.backend import ImageBackend, OpenBackend
from rbdfs.image.cache import ObjectCache
from rbdfs.image.cached_image import CachedImage
from rbdfs.image.holes import SEGMENTS_MAX, HoleMap
from rbdfs.image.open_image import OpenImage, OpenState, ReadaheadShare
from rbdfs.image.striper import Layout
from rbdfs.tasks import BackgroundTasks

log = logging.getLogger(__name__)

CLOSED_IMAGES_MAX = 1024
"""Closed images to keep cached, in case the next open() finds them still valid. The cache's budget bounds their bytes;
this bounds the list."""

CLOSED_SEGMENTS_MAX = SEGMENTS_MAX
"""Segments in the hole maps of closed images, all together: some 20 MB."""


class _Entry:
    """One image, open or closed and still cached."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.users = 0
        self.state: OpenState | None = None
        self.cached: CachedImage | None = None
        self.holes: HoleMap | None = None
        self.write_version: int | None = None

    @property
    def segments(self) -> int:
        """Those of its hole map."""
        return 0 if self.holes is None else self.holes.segments


class OpenImages:
    """Opens and closes images, and keeps close-to-open: an open() sees all that was written before it.

    The cache of an earlier open() is used only if nobody can have written since (`ImageBackend.write_version`). Else
    older opens use the new cache as well: all opens of a file share the kernel's page cache, which must not get bytes
    older than the newest open().
    """

    def __init__(self, cache: ObjectCache) -> None:
        self._cache = cache
        self._share = ReadaheadShare(cache.budget_bytes)
        self._entries: dict[Hashable, _Entry] = {}
        self._background = BackgroundTasks()

    async def open(self, key: Hashable, open_backend: OpenBackend) -> tuple[OpenImage, bool]:
        """Open the image `key`; `open_backend` is called if nobody has it open.

        Also returns whether the image still holds all that earlier opens have read, in this mount or another. Raises
        what `open_backend` raises.
        """
        entry = self._entries.setdefault(key, _Entry())
        entry.users += 1
        try:
            async with entry.lock:
                unchanged = await self._revalidate(key, entry, open_backend)
        except BaseException:
            await self._release(key, entry)
            raise
        assert entry.state is not None  # noqa: S101  (just set, and kept while there are users)
        return OpenImage(entry.state, self._cache, self._share), unchanged

    async def close(self, image: OpenImage) -> None:
        """End one open(). The last one closes the librbd image and its watch, which a cancel does not stop."""
        image.close()
        await self._release(image.key, self._entries[image.key])

    async def aclose(self) -> None:
        """Close what is still open, and wait for what is being closed."""
        for entry in list(self._entries.values()):
            if entry.state is not None:
                self._cache.cancel(entry.state.cached)
                await entry.state.backend.close()
        self._entries.clear()
        await self._background.wait()

    async def _revalidate(self, key: Hashable, entry: _Entry, open_backend: OpenBackend) -> bool:
        state = entry.state
        backend = await self._current_backend(state, open_backend)
        version = backend.write_version
        unchanged = entry.cached is not None and version is not None and version == entry.write_version
        if entry.cached is None or not unchanged:
            if entry.cached is not None:
                self._cache.forget(entry.cached)
            layout = Layout(backend.object_size, backend.stripe_unit, backend.stripe_count)
            entry.cached = CachedImage(backend, layout, self._cache.throttle(backend.pool))
        entry.cached.backend = backend
        entry.write_version = version
        if not backend.is_immutable or not unchanged:
            entry.holes = HoleMap(backend.size) if backend.is_immutable else None
        if state is None:
            entry.state = OpenState(key, backend, entry.cached, entry.holes)
        else:
            state.cached = entry.cached
            state.holes = entry.holes
            if backend is not state.backend:  # after a migration, for example: older opens use the new image
                stale, state.backend = state.backend, backend
                try:
                    await self._background.run(stale.close)
                except trio.Cancelled:
                    entry.write_version = None  # the kernel does not learn that this open() has found it changed
                    raise
        return unchanged

    async def _current_backend(self, state: OpenState | None, open_backend: OpenBackend) -> ImageBackend:
        """Return the image that is open already, revalidated; if there is none, or it is gone, a new one."""
        if state is not None:
            try:
                await state.backend.revalidate()
                return state.backend
            except StaleError as error:
                log.info("opened again: %s", error)
        return await open_backend()

    async def _release(self, key: Hashable, entry: _Entry) -> None:
        """End one use. The next open() need not wait until the librbd image of the last one is closed."""
        entry.users -= 1
        if entry.users:
            return
        state, entry.state = entry.state, None
        if state is not None:
            self._cache.cancel(state.cached)
        self._keep_closed(key, entry)
        if state is not None:
            await self._background.run(state.backend.close)

    def _keep_closed(self, key: Hashable, entry: _Entry) -> None:
        """Keep the cache of a closed image, as the newest, if it can be valid again. Drop the oldest."""
        del self._entries[key]
        is_worth_it = entry.cached is not None and (entry.cached.objects or entry.holes is not None)
        if entry.write_version is not None and is_worth_it:
            self._entries[key] = entry
        elif entry.cached is not None:
            self._cache.forget(entry.cached)
        closed = {key: entry for key, entry in self._entries.items() if not entry.users}
        segments = sum(each.segments for each in closed.values())
        for number, (oldest, dropped) in enumerate(closed.items()):
            if len(closed) - number <= CLOSED_IMAGES_MAX and segments <= CLOSED_SEGMENTS_MAX:
                break
            del self._entries[oldest]
            segments -= dropped.segments
            if dropped.cached is not None:
                self._cache.forget(dropped.cached)
