"""A watch on an image's header: while there is one, `rbd rm` of the image is refused, as if it were open to write.

Notifications are only acknowledged, and at once: a client that makes a snapshot or resizes waits for that, up to 30 s.
"""

import errno
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import trio

from rbdfs.catalog import ImageRef, Namespace
from rbdfs.ceph.bindings import watch
from rbdfs.ceph.bindings.aio import Portal
from rbdfs.ceph.bindings.librados import Ioctx
from rbdfs.ceph.bindings.lifetime import by_the_newest
from rbdfs.ceph.metadata import header
from rbdfs.errors import RbdfsError
from rbdfs.spec import ImageSpec

log = logging.getLogger(__name__)

RENEW_SECONDS = 1.0
"""How often to try to take a lost watch again."""


class Watch(Protocol):
    """A watch on an object (watch.py)."""

    async def give_back(self) -> None:
        """End it. Raises RbdfsError."""


TakeWatch = Callable[[Callable[[], None]], Awaitable[Watch]]
"""Watches the header, and calls its argument when the watch is lost. Raises RbdfsError."""


class HeaderWatch:
    """Active from `begin` to `aclose`. A watch that is lost, as after 30 s without the cluster, renews itself."""

    def __init__(self, spec: ImageSpec, take: TakeWatch) -> None:
        """Use `begin`."""
        self._spec = spec
        self._take_watch = take
        self._watch: Watch | None = None
        self._is_allowed = True
        self._number = 0
        self._lost = 0
        """The number of the last watch that was lost."""
        self._renewing: trio.CancelScope | None = None
        self._is_closed = False

    @classmethod
    async def begin(cls, spec: ImageSpec, take: TakeWatch) -> "HeaderWatch":
        """Watch an image's header object if the key may; if not, the log says so."""
        watch = cls(spec, take)
        if failure := await watch._take():
            log.info("%s: %s, so nothing holds off its removal", spec, failure)
            watch._renew_soon()
        return watch

    @property
    def is_active(self) -> bool:
        """Whether it holds off a removal now."""
        return self._watch is not None and self._lost != self._number

    def _renew_soon(self) -> None:
        if self._renewing is None and self._is_allowed:
            self._renewing = trio.CancelScope()
            trio.lowlevel.spawn_system_task(self._renew, self._renewing)

    async def _renew(self, scope: trio.CancelScope) -> None:
        """Take the watch again, at once and then every second, until it is active, refused or closed."""
        with scope:
            while self._is_allowed and not self.is_active:
                try:
                    self._let_go()
                    if failure := await self._take():
                        log.debug("%s: still %s", self._spec, failure)
                    else:
                        log.info("%s: the watch is back", self._spec)
                except Exception:  # out of a system task it would end the mount for everyone
                    log.exception("%s: the watch could not be renewed", self._spec)
                # Also if it is back: a watch that is lost again and again must not be taken without a pause.
                await trio.sleep(RENEW_SECONDS)
        self._renewing = None

    async def _take(self) -> str:
        """Take the watch; returns why that failed, empty if it did not."""
        self._number += 1
        try:
            self._watch = await self._take_watch(partial(self._lose, self._number))
        except RbdfsError as error:
            if error.errno == errno.EPERM:
                self._is_allowed = False  # so do not try again
                return "the key may not watch the image"
            return str(error)
        if self._is_closed:  # closed during the call, too late for a cancel
            self._let_go()
        return ""

    def _lose(self, number: int) -> None:
        if number == self._number and number != self._lost and not self._is_closed:
            log.info("%s: the watch was lost; until it is back, nothing holds off the image's removal", self._spec)
            self._lost = number
            self._renew_soon()

    def take_again(self) -> None:
        """Take the watch by a new connection if its key may: the old one was replaced."""
        if not self._is_closed:
            self._is_allowed = True
            self._let_go()
            self._renew_soon()

    def _let_go(self) -> None:
        """Give the watch back without waiting: by a connection that does not work that takes until a timeout."""
        watch, self._watch = self._watch, None
        if watch is not None:
            trio.lowlevel.spawn_system_task(self._give_back, watch)

    async def _give_back(self, watch: Watch) -> None:
        try:
            await watch.give_back()
        except Exception as error:  # out of a system task it would end the mount for everyone
            log.debug("%s: %s", self._spec, error)

    async def aclose(self) -> None:
        """Give the watch back. Does not raise."""
        self._is_closed = True
        if self._renewing is not None:
            self._renewing.cancel()
        watch, self._watch = self._watch, None
        if watch is not None:
            await self._give_back(watch)


async def take_watch(
    image: ImageRef, ioctx_of: Callable[[Namespace], Ioctx], portal: Portal, on_lost: Callable[[], None]
) -> Watch:
    """Watch an image's header object by the present connection: a `TakeWatch`, once all but `on_lost` is given."""

    async def current() -> Ioctx:
        return ioctx_of(image.namespace)

    async def take(ioctx: Ioctx) -> tuple[Ioctx, Watch]:
        return ioctx, await watch.Watch.take(ioctx, header.object_of(image), portal, on_lost)

    ioctx, taken = await by_the_newest(current, take)
    if ioctx.lifetime.is_over:  # since it was taken
        on_lost()
    return taken
