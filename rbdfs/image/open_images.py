"""The images that are open now: one librbd image, one watch and one cache for all who have the same image open."""

import logging
from collections.abc import Hashable

import trio

from rbdfs.errors import StaleError
from rbdfs.image.holes import HoleMap
from rbdfs.image.image import OpenImage, OpenState, ReadaheadShare
from rbdfs.image.object_cache import CachedImage, ObjectCache
from rbdfs.image.source import Connector, ImageSource
from rbdfs.image.striper import Layout

log = logging.getLogger(__name__)

KEPT_CLOSED = 1024
"""Images whose cached bytes are remembered after their last close, for the next open() to find still valid. The bytes
are under the cache's budget; this bounds the list."""


class _Entry:
    """One image, open or remembered."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.users = 0
        self.state: OpenState | None = None
        self.cached: CachedImage | None = None
        self.holes: HoleMap | None = None
        self.write_version: int | None = None


class OpenImages:
    """Opens and closes images, and keeps close-to-open: an open() sees all that was written before it.

    What an earlier open() left in the cache may answer only if the image says that nobody can have written since
    (`ImageSource.write_version`). Older opens go over to the new cache as well, so that the kernel's page cache, which
    all opens of a file share, is never filled with what is older than the newest open().
    """

    def __init__(self, cache: ObjectCache) -> None:
        self._cache = cache
        self._share = ReadaheadShare(cache.budget_bytes)
        self._entries: dict[Hashable, _Entry] = {}

    async def open(self, key: Hashable, connect: Connector) -> tuple[OpenImage, bool]:
        """Open the image `key`; `connect` is called if nobody has it open.

        Also returns whether all that earlier opens have read, in this mount or any, is still what the image holds.
        Raises what `connect` raises.
        """
        entry = self._entries.setdefault(key, _Entry())
        entry.users += 1
        try:
            async with entry.lock:
                unchanged = await self._bring_up_to_date(entry, connect)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._leave(key, entry)
            raise
        assert entry.state is not None  # noqa: S101  (just set, and kept while there are users)
        return OpenImage(entry.state, self._cache, self._share), unchanged

    async def close(self, key: Hashable, image: OpenImage) -> None:
        """End one open(). The last one gives the librbd image and its watch back."""
        image.close()
        with trio.CancelScope(shield=True):
            await self._leave(key, self._entries[key])

    async def aclose(self) -> None:
        """Close what is still open."""
        for entry in self._entries.values():
            if entry.state is not None:
                self._cache.withdraw(entry.state.cached)
                await entry.state.source.close()
        self._entries.clear()

    async def _bring_up_to_date(self, entry: _Entry, connect: Connector) -> bool:
        state = entry.state
        source = state.source if state and not _is_stale(state.source) else await connect()
        try:
            version = await source.write_version()
        except BaseException:
            if state is None or source is not state.source:
                with trio.CancelScope(shield=True):
                    await source.close()
            raise
        unchanged = entry.cached is not None and version is not None and version == entry.write_version
        if entry.cached is None or not unchanged:
            if entry.cached is not None:
                self._cache.forget(entry.cached)
            layout = Layout(source.object_size, source.stripe_unit, source.stripe_count)
            held = entry.cached.held if entry.cached is not None else None  # shortcuts go by it
            entry.cached = CachedImage(source, layout, held)
        entry.cached.source = source
        entry.write_version = version
        if source.is_constant and entry.holes is None:
            entry.holes = HoleMap(source.size)
        if state is None:
            entry.state = OpenState(source, entry.cached, entry.holes)
        else:
            state.cached = entry.cached
            if source is not state.source:  # it was migrated, say: older opens go over to what it is now
                stale, state.source = state.source, source
                with trio.CancelScope(shield=True):
                    await stale.close()
        return unchanged or source.is_constant

    async def _leave(self, key: Hashable, entry: _Entry) -> None:
        async with entry.lock:
            entry.users -= 1
            if entry.users:
                return
            state, entry.state = entry.state, None
            if state is not None:
                self._cache.withdraw(state.cached)
            self._remember(key, entry)
        if state is not None:
            await state.source.close()  # beside the next open(), which need not wait for it

    def _remember(self, key: Hashable, entry: _Entry) -> None:
        """Keep a closed image's cache, as the newest, if it can be valid again; let go of the oldest."""
        del self._entries[key]
        is_worth_it = entry.cached is not None and (entry.cached.objects or entry.holes is not None)
        if entry.write_version is not None and is_worth_it:
            self._entries[key] = entry
        elif entry.cached is not None:
            self._cache.forget(entry.cached)
        closed = [key for key, entry in self._entries.items() if not entry.users]
        for oldest in closed[: max(0, len(closed) - KEPT_CLOSED)]:
            cached = self._entries.pop(oldest).cached
            if cached is not None:
                self._cache.forget(cached)


def _is_stale(source: ImageSource) -> bool:
    try:
        source.heed()
    except StaleError:
        return True
    return False
