"""The guard around each operation: it ends in time, and with an errno whatever goes wrong."""

import errno
import functools
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import pyfuse3
import trio

from rbdfs.errors import RbdfsError
from rbdfs.fuse.timeouts import RecentTimeouts
from rbdfs.fuse.trouble_log import TroubleLog

log = logging.getLogger(__name__)

EXPECTED_ERRORS = frozenset({errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EROFS, errno.ENODATA})
"""Errors that a file system answers in everyday use; all others are troubles."""


class Guard:
    """Keeps the time of operations, and knows which one each thread waits for."""

    def __init__(self, troubles: TroubleLog, answer_seconds: float) -> None:
        """`answer_seconds` is how long an operation may take."""
        self.troubles = troubles
        self.answer_seconds = answer_seconds
        self._scopes: dict[int, trio.CancelScope] = {}
        """Of the operations under way, by the thread that waits."""
        self._timeouts = RecentTimeouts()

    def cancel_request_of(self, thread: int) -> None:
        """Cancel the operation that a killed thread waits for: it waits for one at a time."""
        if scope := self._scopes.get(thread):
            scope.cancel()

    @contextmanager
    def in_time(self, operation: str, arguments: tuple[object, ...]) -> Iterator[None]:
        """Cancel what takes too long. Raises RbdfsError (ETIMEDOUT), or FUSEError (EINTR) if the thread was killed."""
        began = trio.current_time()
        context, request, thread = arguments[-1], None, 0
        if isinstance(context, pyfuse3.RequestContext):
            request, thread = (operation, *arguments[:-1]), context.pid
        if request is not None and self._timeouts.has(request, began):
            raise RbdfsError(f"{operation} was not answered in time just now", errno.ETIMEDOUT)
        deadline = began + self.answer_seconds
        scope = trio.CancelScope(deadline=deadline)
        if thread:
            self._scopes[thread] = scope
        try:
            with scope:
                yield
        except RbdfsError as error:
            if error.errno == errno.ETIMEDOUT and request is not None:
                self._timeouts.add(request, trio.current_time())
            raise
        finally:
            if self._scopes.get(thread) is scope:
                del self._scopes[thread]
        if scope.cancelled_caught:
            if trio.current_time() < deadline:
                raise pyfuse3.FUSEError(errno.EINTR)
            if request is not None:
                self._timeouts.add(request, trio.current_time())
            raise RbdfsError(f"{operation} was not answered within {self.answer_seconds:g} s", errno.ETIMEDOUT)


class Guarded(Protocol):
    """A class whose methods are FUSE operations."""

    guard: Guard

    def inode_of(self, operation: str, subject: object) -> int | None:
        """Which inode an operation works on, by its first argument."""


P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Guarded)


def answered(
    operation: Callable[Concatenate[S, P], Coroutine[Any, Any, R]], *, gone: int = errno.ENOENT
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """Answer whatever an operation raises with an errno, so that the mount lives on.

    pyfuse3 ends the main loop, for everyone, on any exception but FUSEError. `gone` replaces ENOENT.
    """
    name = operation.__name__

    @functools.wraps(operation)
    async def guarded(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        inode, troubles = self.inode_of(name, args[0]), self.guard.troubles
        try:
            with self.guard.in_time(name, args):
                result = await operation(self, *args, **kwargs)
        except RbdfsError as error:
            if error.errno in EXPECTED_ERRORS:
                log.debug("%s", error)
            else:
                troubles.failed(inode, name, error)
            raise pyfuse3.FUSEError(gone if error.errno == errno.ENOENT else error.errno) from error
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            troubles.failed(inode, name, error)
            raise pyfuse3.FUSEError(errno.EIO) from None
        if troubles.are_open:
            troubles.worked(inode, name)
        return result

    return guarded


def answered_by_inode(
    operation: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, R]]:
    """As `answered`, for what the kernel knows by its inode: at ESTALE it looks the path up again."""
    return answered(operation, gone=errno.ESTALE)
