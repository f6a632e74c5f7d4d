"""A watch on an image's header: while there is one, `rbd rm` of the image is refused, as for any client that has it.

What comes by it is acknowledged at once, and no more: who makes a snapshot or resizes waits for that, 30 s at most.
"""

import errno
import logging
from functools import partial

import rados
import trio

from rbdfs.ceph.aio import Handover
from rbdfs.ceph.errors import errno_of
from rbdfs.spec import ImageSpec
from rbdfs.threads import in_thread_to_its_end

log = logging.getLogger(__name__)


class HeaderWatch:
    """Held from `begin` to `aclose`, and taken anew when it was lost, as after 30 s without the cluster."""

    def __init__(self, spec: ImageSpec, ioctx: rados.Ioctx, header: str, handover: Handover) -> None:
        """`begin` does this, and takes the watch."""
        self._spec = spec
        self._ioctx = ioctx
        self._header = header
        self._handover = handover
        self._watch: rados.Watch | None = None
        self._number = 0
        self._is_lost = False
        self._renewing = trio.Lock()

    @classmethod
    async def begin(cls, spec: ImageSpec, ioctx: rados.Ioctx, header: str, handover: Handover) -> "HeaderWatch":
        """Watch an image's header object, if the key may; if not, says so in the log."""
        watch = cls(spec, ioctx, header, handover)
        await in_thread_to_its_end(watch._take)
        return watch

    @property
    def is_held(self) -> bool:
        """Whether it holds off a removal now."""
        return self._watch is not None and not self._is_lost

    def renew_if_lost(self) -> None:
        """Begin to take it anew if it was lost; to be called every so often."""
        if self._is_lost and not self._renewing.locked():
            trio.lowlevel.spawn_system_task(self._renew)

    async def _renew(self) -> None:
        async with self._renewing:
            if self._is_lost:
                await in_thread_to_its_end(self._give_back)
                await in_thread_to_its_end(self._take)

    def _take(self) -> None:
        # The binding crashes in a Watch that the garbage collector finds in a cycle: `lost` must not know its own.
        self._number += 1
        number = self._number

        def notified(*_: object) -> None:
            """Called in a thread of librados; the binding acknowledges when this returns."""

        def lost(_: int) -> None:
            self._handover.post(partial(self._lose, number))

        try:
            self._watch = self._ioctx.watch(self._header, notified, lost)
        except rados.Error as error:
            if errno_of(error) == errno.EPERM:
                log.info("%s: the key may not watch the image, so nothing holds off its removal", self._spec)
                self._is_lost = False  # and it is not asked for again
            else:
                log.info("%s: cannot watch the image (%s), so nothing holds off its removal", self._spec, error)
                self._is_lost = True
        else:
            self._is_lost = False

    def _lose(self, number: int) -> None:
        if number == self._number:
            log.info("%s: the watch was lost; until it is back, nothing holds off the image's removal", self._spec)
            self._is_lost = True

    def _give_back(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            try:
                watch.close()
            except rados.Error as error:
                log.debug("%s: the watch could not be given back: %s", self._spec, error)

    async def aclose(self) -> None:
        """Give it back. Does not raise."""
        async with self._renewing:
            self._is_lost = False
            await in_thread_to_its_end(self._give_back)
