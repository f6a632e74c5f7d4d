"""An open image of the cluster, as an `ImageBackend`."""

from typing import Final

import rbd
import trio

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings.aio import Portal
from rbdfs.ceph.bindings.lifetime import by_the_newest
from rbdfs.ceph.image.extents import Extents, FindObjects
from rbdfs.ceph.image.handle_cache import HandleCache
from rbdfs.ceph.image.image_state import HeaderClient, ImageState
from rbdfs.ceph.image.reads import Reads
from rbdfs.ceph.image.reopening import ReopeningImage
from rbdfs.errors import RbdfsError, StaleError
from rbdfs.spec import ImageSpec

REVALIDATE_SECONDS: Final = 1.0
"""How often an image is revalidated while it is read, so that readers served from the cache also learn that it was
removed."""

IMMUTABLE_VERSION: Final = 0
"""The write version of an image that nobody writes to."""


class CephImage(ReopeningImage):
    """An image or a snapshot that is open in the cluster.

    It fulfils `ImageBackend` (rbdfs/image/backend.py), which says what its attributes and methods are.
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
        """Opens nothing: `open` does."""
        super().__init__(spec, image, client, portal, handles)
        self.revalidate_due = False
        self.write_version: int | None = None
        self._extents = Extents(self, find_objects)
        # Not methods: these would be another call for each read.
        self.start_read = Reads(self).start_read
        self.extents_window = self._extents.window
        self.extents = self._extents.within
        self.changes = self._extents.changes

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
        """Open the image by `handles`; `spec` is its name in messages. Raises RbdfsError."""
        opened = cls(spec, image, client, portal, handles, find_objects)
        try:
            opened._set_write_version(*await opened.begin(opened._set_revalidate_due))
        except BaseException as error:
            await opened.give_watch_back()
            if isinstance(error, RbdfsError):
                raise RbdfsError(f"cannot open {spec}: {error}", error.errno) from error
            raise
        trio.lowlevel.spawn_system_task(opened._revalidate_later)
        return opened

    def _set_write_version(self, state: ImageState, others: frozenset[int]) -> None:
        """Find out whether what was read before an open() is still right, and whether reads from now on will stay so.

        A client that writes to an image with the exclusive-lock feature takes the lock first, which is an entry in the
        header object. So while the header has the same version, nobody holds the lock and nobody else has the image
        open, nobody writes. (krbd that mapped an image before it had the feature writes without the lock.)

        A snapshot is immutable once nobody can be filling it, as a deep copy or mirroring does: it is complete
        (`Layer.is_complete`), and no client has the image open without its lock.
        """
        own = state.own
        lockers = {locker.client for locker in own.lockers}
        if self.is_snapshot:
            if self.state.is_complete and others <= lockers:
                self.opened = self.opened._replace(is_immutable=True)
            self.write_version = IMMUTABLE_VERSION if self.is_immutable else None
        else:
            locks = own.header.features & rbd.RBD_FEATURE_EXCLUSIVE_LOCK
            is_known = locks and not lockers and not others and state.is_complete
            self.write_version = own.version or None if is_known else None

    @property
    def state(self) -> ImageState:
        """The headers, as they were when the image was opened."""
        return self.opened.state

    @property
    def pool(self) -> int:
        return self.image.namespace.pool.id

    @property
    def is_immutable(self) -> bool:
        return self.opened.is_immutable

    @property
    def has_map(self) -> bool:
        return self._extents.has_map

    @property
    def stale(self) -> StaleError | None:
        return self.revalidator.stale

    def revalidate_soon(self) -> None:
        self.raise_if_stale()
        self.revalidate_due = False
        handle = self.handle
        handle.hold()

        def revalidated(_: int | RbdfsError) -> None:
            handle.release()
            trio.lowlevel.spawn_system_task(self._revalidate_later)

        self.revalidator.ask(revalidated)

    async def _revalidate_later(self) -> None:
        await trio.sleep(REVALIDATE_SECONDS)
        self.revalidate_due = True

    def _set_revalidate_due(self) -> None:
        self.revalidate_due = True

    async def verify(self) -> None:
        try:
            await self.ask()
        except StaleError as error:
            self.revalidator.mark_stale(error)
            raise

    async def refresh_size(self) -> int:
        state = await self.ask()
        if state.size != self.size or not self.state.opens_as(state):
            await self.reopen(state)  # librbd clips reads to the size that it knows
        return self.size

    async def revalidate(self) -> None:
        self.raise_if_stale()
        with self.gone_is_stale():
            state, others = await by_the_newest(self.current, lambda _: self.ask_all(self.opened))
        version = self.write_version
        if not self.opened.is_still(state):
            await self.reopen(state)
        self._set_write_version(state, others or frozenset())
        if self.write_version is None or self.write_version != version:
            known, self.write_version = self.write_version, None  # until this is done: it may be cancelled
            await self.run_blocking(self.handle, self.handle.invalidate_cache)
            self.write_version = known
