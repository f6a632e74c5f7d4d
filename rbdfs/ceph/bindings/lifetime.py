"""How long a connection to the cluster is used: until a newer one has taken its place and nobody uses it any more."""

import errno
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, Protocol, TypeVar

import trio

from rbdfs.errors import RbdfsError

ATTEMPTS: Final = 3
"""How often a question is asked because the connection was replaced while it was asked."""

T = TypeVar("T")


class Recoverer(Protocol):
    """Gets a new connection when this one is of no use any more (recovery.py)."""

    def note(self, result: int) -> None:
        """An operation has ended; a negative errno if it has failed."""

    def patience(self) -> AbstractContextManager[None]:
        """While something is asked."""

    async def attempt(self) -> None:
        """The cluster refuses this client: return when a new connection was tried."""


class Lifetime:
    """Of one connection. All in the trio thread."""

    def __init__(self, recovery: Recoverer) -> None:
        self.is_over = False
        """Whether a newer connection has taken its place: nothing new begins with it."""
        self._recovery = recovery
        self._users = 0
        self._unused = trio.Event()
        self._followers: set[Callable[[], None]] = set()

    def lane(self, pool_id: int) -> Hashable:
        """Of the threads that wait for a pool by this connection: those of one before may hang until they time out."""
        return self, pool_id

    def hold(self) -> None:
        """Somebody uses the connection: it stays open until `release`."""
        self._users += 1

    def release(self) -> None:
        """And does not any more."""
        self._users -= 1
        self._tell_if_unused()

    def follow(self, callback: Callable[[], None]) -> None:
        """Have `callback` called, in the trio thread, when this is over: now, if it is."""
        if self.is_over:
            callback()
        else:
            self._followers.add(callback)

    def unfollow(self, callback: Callable[[], None]) -> None:
        """What `follow` was given is not to be called any more."""
        self._followers.discard(callback)

    def end(self) -> None:
        """A newer connection has taken its place."""
        self.is_over = True
        followers, self._followers = self._followers, set()
        for callback in followers:
            callback()
        self._tell_if_unused()

    def _tell_if_unused(self) -> None:
        if self.is_over and not self._users:
            self._unused.set()

    async def unused(self) -> None:
        """Return when it is over and nobody uses the connection: it can be closed."""
        await self._unused.wait()

    def note(self, result: int) -> None:
        """An operation by this connection has ended; a negative errno if it has failed."""
        if not self.is_over:
            self._recovery.note(result)

    def patience(self) -> AbstractContextManager[None]:
        """While something is asked: if that takes long, a new connection may be tried."""
        return self._recovery.patience()

    async def is_over_after(self, error: int) -> bool:
        """Whether what failed with this errno can be asked again by a newer connection.

        If the cluster refuses this client, a new connection is tried first. Not each time: then it is False at once.
        """
        if error == errno.ESHUTDOWN and not self.is_over:
            await self._recovery.attempt()
        return self.is_over

    @contextmanager
    def until_over(self) -> Iterator[None]:
        """Leave the block when this is over."""
        scope = trio.CancelScope()
        self.follow(scope.cancel)
        try:
            with scope:
                yield
        finally:
            self.unfollow(scope.cancel)


class HasLifetime(Protocol):
    """A connection, or what belongs to one."""

    @property
    def lifetime(self) -> Lifetime:
        """Of the connection."""


U = TypeVar("U", bound=HasLifetime)


async def by_the_newest(current: Callable[[], Awaitable[U]], ask: Callable[[U], Awaitable[T]]) -> T:
    """What `ask` returns or raises, asked again if the connection was replaced meanwhile.

    `current` is what to ask it by, of the connection that there is now. `ask` is cancelled when that is replaced.
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
