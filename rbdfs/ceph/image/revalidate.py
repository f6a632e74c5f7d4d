"""Revalidate an open image: find out whether it was removed or shrunk, before a reader gets wrong bytes.

librbd reads an object that is gone as zeros, or in a clone as the parent's bytes, without an error: it cannot tell a
hole from an object that was just removed. And some keys may not hold the watch that holds off a removal. So bytes that
may be wrong are passed on only after a revalidation that began after they arrived: of HEAD those that end with a zero
in an object, of a clone or a snapshot all. It relies on the order in which
librbd does things (src/librbd; observed with 16.2):

- `rbd rm` moves an image to the trash first, out of the pool's directory, and then removes its objects
  (`api/Image.cc`).
- `rbd resize` removes what is beyond the new end *first*, and updates the header last (`ResizeRequest`). But the
  client that removes objects holds the exclusive lock or, without that feature, has the image open and so watches it.
- `rbd snap rm` moves the snapshot to its trash first, then removes its data (`SnapshotRemoveRequest`). Reads of a
  removed snapshot return zeros, or what was written since.
- `rbd flatten` copies everything that the parent shows, and then removes the parent from the header; before that
  nobody can remove the parent's snapshot (`FlattenRequest`, `DetachParentRequest`).

Format 1 has no trash: only the remover's watch shows that an image is being removed, and nothing shows that for a
snapshot until it is gone.
"""

import logging
from collections.abc import Awaitable, Callable, Hashable
from typing import NamedTuple

import trio

from rbdfs.ceph.bindings.aio import Future
from rbdfs.errors import RbdfsError, StaleError

log = logging.getLogger(__name__)

NEW_WRITER_SECONDS = 5.0
"""Grace period for a client that starts to write after our open. It may be shrinking the image, so reads that return
zeros wait. `rbd resize` takes milliseconds for each hundred objects; a VM that was started stays."""

CHECK_AGAIN_SECONDS = 0.1


class Checked(NamedTuple):
    """What one check found."""

    size: int
    writers: frozenset[Hashable] = frozenset()
    """The clients that may write to the image, or shrink it."""


Check = Callable[[], Awaitable[Checked]]
"""Asks the cluster. Raises StaleError if the image is gone, RbdfsError if that cannot be known."""

OnRevalidated = Callable[[int | RbdfsError], None]
"""Takes the size in bytes, or the error. Must not raise."""


class Revalidator:
    """Revalidates an image, one revalidation at a time: all callers that ask during one share the next."""

    def __init__(self, check: Check, known_writers: frozenset[Hashable], on_stale: Callable[[], None]) -> None:
        """`known_writers` had the image open before us; `on_stale` is called once the image is known to be gone."""
        self.stale: StaleError | None = None
        """Set once the image is gone. It does not come back."""
        self._check = check
        self._on_stale = on_stale
        self._known = known_writers
        self._first_seen: dict[Hashable, float] = {}
        self._waiting: list[OnRevalidated] = []
        self._is_running = False

    def mark_stale(self, error: StaleError) -> None:
        """Record that the image is gone."""
        self.stale = error
        self._on_stale()

    def ask(self, callback: OnRevalidated) -> None:
        """Start a revalidation, and call `callback` later in the trio thread."""
        self._waiting.append(callback)
        if not self._is_running:
            self._is_running = True
            trio.lowlevel.spawn_system_task(self._run)

    async def stable_size(self) -> int:
        """Revalidate, and return the size in bytes. Raises RbdfsError, StaleError if the image is gone."""
        answer: Future[int | RbdfsError] = Future()
        self.ask(answer.set)
        result = await answer.get()
        if isinstance(result, RbdfsError):
            raise result
        return result

    async def _run(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            result: int | RbdfsError
            try:
                result = await self._stable_size()
            except RbdfsError as error:
                result = error
            except Exception as error:
                log.exception("a revalidation failed unexpectedly")
                result = RbdfsError(f"unexpected {type(error).__name__}: {error}")
            if isinstance(result, StaleError):
                self.mark_stale(result)
            for callback in waiting:
                try:
                    callback(result)
                except Exception:  # out of a system task it would end the mount for everyone
                    log.exception("the callback of a revalidation failed")
        self._is_running = False

    async def _stable_size(self) -> int:
        """The size, once no client that began to write after our open can be shrinking the image."""
        size = None
        while True:
            began = trio.current_time()
            checked = await self._check()
            self._known &= checked.writers  # a client that comes back is new
            new = checked.writers - self._known
            seen = trio.current_time()  # not `began`: it may have begun to write while the cluster was slow to answer
            self._first_seen = {writer: self._first_seen.get(writer, seen) for writer in new}
            if not new or (size is not None and checked.size < size):
                return checked.size
            size = checked.size
            if all(began - since > NEW_WRITER_SECONDS for since in self._first_seen.values()):
                self._known |= new
                return size
            await trio.sleep(CHECK_AGAIN_SECONDS)
