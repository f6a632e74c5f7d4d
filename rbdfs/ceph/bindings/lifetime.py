"""When a connection can be closed: once a newer one has taken its place and nothing uses it.

Questions that the old connection refused (ESHUTDOWN) or has not answered are asked again by the newer one
(`by_the_newest`), within the deadline of the request that they are for.
"""

import errno
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol, TypeVar

import trio

from rbdfs.errors import RbdfsError

ATTEMPTS: Final = 3
"""How often a question is asked at most if the connection is replaced each time."""

T = TypeVar("T")


class Recoverer(Protocol):
    """Reconnects when the connection does not work any more (recovery.py)."""

    def note(self, result: int) -> None:
        """Call at the end of each operation; `result` is a negative errno if it failed."""

    def patience(self) -> AbstractContextManager[None]:
        """Enclose a question."""

    async def attempt(self) -> None:
        """The cluster refuses this client: return when a new connection was tried."""


class Lifetime:
    """The lifetime of one connection. All in the trio thread."""

    def __init__(self, recovery: Recoverer) -> None:
        self.is_over = False
        """Whether a newer connection has taken its place. Nothing new may use it then."""
        self._recovery = recovery
        self._users = 0
        self._unused = trio.Event()
        self._followers: set[Callable[[], None]] = set()

    def lane(self, pool_id: int) -> Hashable:
        """For threads that wait for a pool by this connection. Those of an earlier one may hang until they time out."""
        return self, pool_id

    def hold(self) -> None:
        """Keep the connection open until `release`."""
        self._users += 1

    def release(self) -> None:
        """End one `hold`."""
        self._users -= 1
        self._tell_if_unused()

    def follow(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the trio thread when this is over, or now if it already is."""
        if self.is_over:
            callback()
        else:
            self._followers.add(callback)

    def unfollow(self, callback: Callable[[], None]) -> None:
        """Undo `follow`."""
        self._followers.discard(callback)

    def end(self) -> None:
        """End it: a newer connection has taken its place."""
        self.is_over = True
        followers, self._followers = self._followers, set()
        for callback in followers:
            callback()
        self._tell_if_unused()

    def _tell_if_unused(self) -> None:
        if self.is_over and not self._users:
            self._unused.set()

    async def unused(self) -> None:
        """Wait until it is over and nothing uses the connection, so that it can be closed."""
        await self._unused.wait()

    def note(self, result: int) -> None:
        """Call at the end of each operation by this connection; `result` is a negative errno if it failed."""
        if not self.is_over:
            self._recovery.note(result)

    def patience(self) -> AbstractContextManager[None]:
        """Enclose a question: if it takes long, a new connection may be tried."""
        return self._recovery.patience()

    async def is_over_after(self, error: int) -> bool:
        """Whether a question that failed with this errno can be asked again by a newer connection.

        If the cluster refuses this client, a new connection is tried first, unless one has just failed.
        """
        if error == errno.ESHUTDOWN and not self.is_over:
            await self._recovery.attempt()
        return self.is_over

    @contextmanager
    def until_over(self) -> Iterator[None]:
        """Cancel the block when this is over."""
        scope = trio.CancelScope()
        self.follow(scope.cancel)
        try:
            with scope:
                yield
        finally:
            self.unfollow(scope.cancel)


class HasLifetime(Protocol):
    """A connection, or an object that belongs to one."""

    @property
    def lifetime(self) -> Lifetime:
        """Of the connection."""


U = TypeVar("U", bound=HasLifetime)


async def by_the_newest(current: Callable[[], Awaitable[U]], ask: Callable[[U], Awaitable[T]]) -> T:
    """Call `ask` with what `current` returns, and again if the connection was replaced during the call.

    `current` gives an object of the present connection. `ask` is cancelled when that connection is replaced.
    """
    failure = RbdfsError("the connection to the cluster was replaced again and again", errno.ESHUTDOWN)
    for _ in range(ATTEMPTS):
        user = await current()
        error = None
        with user.lifetime.until_over():
            try:
                return await ask(user)
            except RbdfsError as raised:
                failure = error = raised
        if error is not None and not await user.lifetime.is_over_after(error.errno):
            raise error
    raise failure
