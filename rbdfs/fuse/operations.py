"""Each FUSE operation in a few lines: bytes ↔ str, attributes, errno. No policy."""

import errno
import functools
import itertools
import logging
import math
import os
import stat
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import pyfuse3
import trio

from rbdfs.catalog import Catalog, ImageRef, ImageStat
from rbdfs.errors import RbdfsError
from rbdfs.fuse.nodes import ROOT_INODE, ImageFile, Node
from rbdfs.fuse.pending import RecentTimeouts
from rbdfs.fuse.process import Process, process_of
from rbdfs.fuse.tree import DirEntry, Stat, Tree
from rbdfs.fuse.trouble_log import TroubleLog
from rbdfs.image.backend import ImageBackend
from rbdfs.image.open_image import OpenImage
from rbdfs.image.open_images import OpenImages
from rbdfs.spec import ImageSpec

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

ENTRY_SECONDS = 1.0
"""How long the kernel may go by a name or by attributes before it asks again: changes made elsewhere show within it."""

LISTING_SECONDS = ENTRY_SECONDS / 2
"""How old the facts in a listing may be when the kernel is told of them; older if the cluster took that long."""

LISTED_AT_ONCE = 2048
"""Entries of which the facts are asked at once: 2,000 images take 0.2 s."""

HEARD_SECONDS = 0.25
"""How long after an answer the kernel may go by the size that it had before: it notes the new one when the process that
asked runs again."""

BLOCK_BYTES = 4096
"""The unit that statfs counts in."""

COPY_BYTES = 256 * 1024
"""st_blksize: what `cp`, `cat` and Python's open() read at once. Through a buffer of an object's size, 4 MiB, which the
CPU's caches do not hold, `cp` took twice the time and three times the CPU (coreutils 9.1; with 1 MiB a tenth more)."""

STAT_BLOCK_BYTES = 512
"""The unit of st_blocks, whatever the block size."""

XATTR_PREFIX = b"user.rbd."
"""Of the names of extended attributes."""

XATTR_NAME_BYTES = 255
"""What the kernel takes as such a name (XATTR_NAME_MAX)."""

EXPECTED = frozenset({errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EROFS, errno.ENODATA})
"""Errors that a file system answers in everyday use; all others are troubles."""

BY_HANDLE = frozenset({"readdir", "releasedir", "flush", "release"})
"""Operations that are given a handle; `statfs` is given neither handle nor inode, all others an inode."""


@dataclass(frozen=True, slots=True)
class FileAttributes:
    """How files look, whatever they hold."""

    uid: int
    gid: int
    umask: int
    """Permission bits that are taken away from 0444 (files) and 0555 (directories)."""
    direct_io: bool
    """Reads pass by the kernel's page cache (FOPEN_DIRECT_IO)."""


class _Told(NamedTuple):
    """What the kernel was told of an inode last."""

    asked: float
    """When the cluster was asked, in trio's time: the kernel knows nothing older."""
    facts: Stat | None
    """None if the cluster must be asked again at the next chance."""


class _End(NamedTuple):
    """How long the kernel believes a file to be."""

    size: int
    surely_from: float
    """In trio's time; until then it may believe it to be longer."""


class OpenedBy(NamedTuple):
    """Whose open() a handle is."""

    image: ImageSpec
    process: Process
    since: float
    """As time.monotonic() has it."""


@dataclass(slots=True)
class _Listing:
    """A directory that is read. Names are as of opendir(); facts are asked in windows, as the reader gets there."""

    entries: Sequence[DirEntry]
    asked: float = -math.inf
    """When the facts were asked."""
    fresh_until: float = -math.inf
    """When they must be asked again; long enough after the answer to tell the kernel of many."""
    facts: Mapping[int, Stat | None] = field(default_factory=dict)
    """By inode."""
    window: range = range(0)
    """Of which entries; those without facts are gone."""


def answered(
    operation: Callable[Concatenate["Operations", P], Coroutine[Any, Any, R]], *, gone: int = errno.ENOENT
) -> Callable[Concatenate["Operations", P], Coroutine[Any, Any, R]]:
    """The one errno guard: whatever an operation raises is answered as an errno, and the mount lives on.

    pyfuse3 ends the main loop, for everyone, on any exception but FUSEError. `gone` is what stands for ENOENT.
    """

    name = operation.__name__

    @functools.wraps(operation)
    async def guarded(self: "Operations", /, *args: P.args, **kwargs: P.kwargs) -> R:
        inode = self._inode(name, args[0])
        try:
            with self._in_time(name, args):
                result = await operation(self, *args, **kwargs)
        except RbdfsError as error:
            if error.errno in EXPECTED:
                log.debug("%s", error)
            else:
                self.troubles.failed(inode, name, error)
            raise pyfuse3.FUSEError(gone if error.errno == errno.ENOENT else error.errno) from error
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            self.troubles.failed(inode, name, error)
            raise pyfuse3.FUSEError(errno.EIO) from None
        if self.troubles.are_open:
            self.troubles.worked(inode, name)
        return result

    return guarded


answered_by_inode = functools.partial(answered, gone=errno.ESTALE)
"""Of what the kernel knows by its inode: at ESTALE it walks the path again, and finds what has the name by now."""


class Operations(pyfuse3.Operations):  # type: ignore[misc, unused-ignore]  # Debian 12's pyfuse3 has no types
    """The file system that the kernel talks to, but for what device.py answers: READ, LSEEK and FORGET.

    It is mounted read-only: the kernel answers writes with EROFS.
    """

    def __init__(
        self,
        tree: Tree,
        catalog: Catalog,
        images: OpenImages,
        open_backend: Callable[[ImageSpec, ImageRef], Awaitable[ImageBackend]],
        attributes: FileAttributes,
        troubles: TroubleLog,
        answer_seconds: float = math.inf,
    ) -> None:
        """`answer_seconds` is how long a request may wait."""
        super().__init__()
        self._tree = tree
        self._catalog = catalog
        self._images = images
        self._open_backend = open_backend
        self.attributes = attributes
        self.troubles = troubles
        self.answer_seconds = answer_seconds
        self._scopes: dict[int, trio.CancelScope] = {}
        """Of what is under way, by the thread that waits for it."""
        self._failed = RecentTimeouts()
        self._handles = itertools.count(1)
        self.files: dict[int, OpenImage] = {}
        """What is open, by handle: device.py reads from it."""
        self.opened: dict[int, OpenedBy] = {}
        """Who has opened it, by handle: for operators."""
        self._listings: dict[int, _Listing] = {}
        self._inodes: dict[int, int] = {}
        """Of what each handle is."""
        self._told: dict[int, _Told] = {}
        self._ends: dict[int, _End] = {}
        self.notify: Callable[[int], None] = lambda _: None
        """Tells the kernel that the attributes of an inode are old (`Device.notify`)."""

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """`name` in a directory; the kernel then knows its inode."""
        node = await self._tree.lookup(self._tree.directory(parent_inode), os.fsdecode(name))
        told = await self._ask(node)
        self._tree.add_lookup(node)
        self._remember(node, told)
        return self._attributes(node, told)

    def forget_inodes(self, lookups: Iterable[tuple[int, int]]) -> None:
        """The kernel has dropped these inodes from its caches: (inode, how many of its lookups it takes back)."""
        for inode, count in lookups:
            if self._tree.forget(inode, count):
                self._told.pop(inode, None)
                self._ends.pop(inode, None)

    @answered_by_inode
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """The attributes as the cluster has had them within ENTRY_SECONDS.

        Beside direct reads that overlap (libaio) the kernel asks again and again: it drops an answer if a read has
        ended in between (fuse_change_attributes: attr_version), and asks at the next read. The cluster is not asked.
        """
        node = self._tree.node(inode)
        told = self._told.get(inode)
        if told is None or told.facts is None or trio.current_time() - told.asked >= ENTRY_SECONDS:
            told = await self._ask(node)
            self._remember(node, told)
        return self._attributes(node, told)

    async def _ask(self, node: Node) -> _Told:
        asked = trio.current_time()
        return _Told(asked, await self._tree.stat(node))

    def invalidate(self, inode: int) -> None:
        """What the kernel was told of an inode is old: have it ask again before it relies on the size."""
        self._told[inode] = _Told(trio.current_time(), None)
        self.notify(inode)

    def seconds_until_end_known(self, inode: int, end: int) -> float | None:
        """In how many seconds the kernel surely knows that a file ends at `end`; None if it was told of a later end."""
        known = self._ends.get(inode, _End(0, -math.inf))
        return None if known.size > end else max(0.0, known.surely_from - trio.current_time())

    @answered_by_inode
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """List the directory afresh; the names that `readdir` answers are frozen in the handle."""
        listing = _Listing(await self._tree.entries(self._tree.directory(inode)))
        handle = next(self._handles)
        self._listings[handle] = listing
        self._inodes[handle] = inode
        return handle

    @answered
    async def readdir(self, handle: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """The entries from `start_id` on, as many as the kernel takes, without those that are gone.

        The kernel believes what it is told here of each file, also of one that is open: it must not be older than what
        it was told before.
        """
        listing = self._listings[handle]
        is_begun = False
        for position in range(start_id, len(listing.entries)):
            if position not in listing.window or trio.current_time() > listing.fresh_until:
                if is_begun:
                    break  # the kernel asks for the rest: an error would take back what it was given
                await self._ask_window(listing, position)
            name, node = listing.entries[position]
            if node.inode not in listing.facts:
                continue
            told = _Told(listing.asked, listing.facts[node.inode])
            before = self._told.get(node.inode)
            if before is not None and before.asked > told.asked:
                told = before if before.facts is not None else await self._ask_or_none(node)
            if told.facts is None and before is not None:
                told = before._replace(asked=-math.inf)
            if not pyfuse3.readdir_reply(token, os.fsencode(name), self._attributes(node, told), position + 1):
                break
            is_begun = True
            self._tree.add_lookup(node)
            self._remember(node, told)

    async def _ask_window(self, listing: _Listing, position: int) -> None:
        listing.asked = trio.current_time()
        listing.window = range(position, min(position + LISTED_AT_ONCE, len(listing.entries)))
        listing.facts = await self._tree.stat_all(listing.entries[number].node for number in listing.window)
        listing.fresh_until = max(listing.asked, trio.current_time() - LISTING_SECONDS / 2) + LISTING_SECONDS

    async def _ask_or_none(self, node: Node) -> _Told:
        try:
            return await self._ask(node)
        except RbdfsError as error:
            log.debug("nothing is known of %s: %s", node.identity, error)
            return _Told(trio.current_time(), None)

    @answered
    async def releasedir(self, handle: int) -> None:
        """The listing is no longer needed."""
        del self._listings[handle]
        self._inodes.pop(handle, None)

    @answered_by_inode
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open an image. The kernel keeps the pages and the size that it has only if nobody can have written since."""
        node = self._tree.node(inode)
        if flags & os.O_ACCMODE != os.O_RDONLY or not isinstance(node, ImageFile):
            raise pyfuse3.FUSEError(errno.EROFS)
        process = process_of(ctx.pid)  # now: it may be gone when the cluster has answered
        image, unchanged = await self._images.open(node.ref, partial(self._open_backend, node.spec, node.ref))
        handle = next(self._handles)
        self.files[handle] = image
        self.opened[handle] = OpenedBy(node.spec, process, monotonic())
        self._inodes[handle] = inode
        if not unchanged:
            self.invalidate(inode)
        return pyfuse3.FileInfo(fh=handle, keep_cache=unchanged, direct_io=self.attributes.direct_io)

    @answered
    async def flush(self, handle: int) -> None:
        """A close(): an error if the image is gone, which cp, dd and cat notice."""
        await self.files[handle].flush()

    @answered
    async def release(self, handle: int) -> None:
        """The last descriptor of an open() was closed."""
        self._inodes.pop(handle, None)
        self.opened.pop(handle, None)
        await self._images.close(self.files.pop(handle))

    @answered
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """A fact of an image. Of what `ls -l` wants to know (security.selinux, system.posix_acl_access) the cluster is
        not asked, and after ENOTSUP `ls` asks no other file. After ENOSYS the kernel would ask for no attribute."""
        if not name.startswith(b"user."):
            raise pyfuse3.FUSEError(errno.ENOTSUP)
        node = self._tree.node(inode)
        if not isinstance(node, ImageFile) or not name.startswith(XATTR_PREFIX):
            raise pyfuse3.FUSEError(errno.ENODATA)
        return os.fsencode(await self._catalog.attribute(node.ref, os.fsdecode(name.removeprefix(XATTR_PREFIX))))

    @answered
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        """The names of all that can be such a name; a key of the image's own metadata can be too long."""
        node = self._tree.node(inode)
        facts = await self._catalog.attribute_names(node.ref) if isinstance(node, ImageFile) else ()
        names = [XATTR_PREFIX + os.fsencode(fact) for fact in facts]
        return [name for name in names if len(name) <= XATTR_NAME_BYTES and b"\0" not in name]

    @answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """The raw capacity of the cluster."""
        usage = await self._catalog.usage()
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = BLOCK_BYTES
        answer.f_blocks = usage.total // BLOCK_BYTES
        answer.f_bfree = answer.f_bavail = usage.available // BLOCK_BYTES
        answer.f_namemax = os.pathconf("/", "PC_NAME_MAX")
        return answer

    def cancel_request_of(self, thread: int) -> None:
        """A thread that waits for an answer was killed. It waits for one answer at a time."""
        if scope := self._scopes.get(thread):
            scope.cancel()

    @contextmanager
    def _in_time(self, operation: str, arguments: tuple[object, ...]) -> Iterator[None]:
        """End what takes too long, and what was asked by a thread that was killed."""
        began = trio.current_time()
        context, request, thread = arguments[-1], None, 0
        if isinstance(context, pyfuse3.RequestContext):
            request, thread = (operation, *arguments[:-1]), context.pid
        if request is not None and self._failed.has(request, began):
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
                self._failed.add(request, trio.current_time())
            raise
        finally:
            if self._scopes.get(thread) is scope:
                del self._scopes[thread]
        if scope.cancelled_caught:
            if trio.current_time() < deadline:
                raise pyfuse3.FUSEError(errno.EINTR)
            if request is not None:
                self._failed.add(request, trio.current_time())
            raise RbdfsError(f"{operation} was not answered within {self.answer_seconds:g} s", errno.ETIMEDOUT)

    def image_of(self, inode: int) -> ImageSpec | None:
        """Which image an inode is, or lists the snapshots of."""
        return self._tree.image_of(inode)

    def _inode(self, operation: str, subject: object) -> int | None:
        """What an operation works on, by its first argument."""
        if not isinstance(subject, int):
            return ROOT_INODE
        return self._inodes.get(subject) if operation in BY_HANDLE else subject

    def _remember(self, node: Node, told: _Told) -> None:
        """The kernel is told this, unless it was told something newer while the cluster was asked: then it drops this
        (fuse_change_attributes: attr_version)."""
        if isinstance(told.facts, ImageStat):
            size, end = told.facts.size, self._ends.get(node.inode)
            if end is None or size > end.size:
                self._ends[node.inode] = _End(size, -math.inf)
            elif size < end.size:
                self._ends[node.inode] = _End(size, trio.current_time() + HEARD_SECONDS)
        before = self._told.get(node.inode)
        if before is None or before.asked <= told.asked:
            self._told[node.inode] = told

    def _attributes(self, node: Node, told: _Told) -> pyfuse3.EntryAttributes:
        """What the kernel is told, until it is ENTRY_SECONDS old; if nothing is known, it asks again at once."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.inode
        entry.st_uid = self.attributes.uid
        entry.st_gid = self.attributes.gid
        facts = told.facts
        left = 0.0 if facts is None else max(0.0, told.asked + ENTRY_SECONDS - trio.current_time())
        entry.attr_timeout = entry.entry_timeout = left
        if isinstance(node, ImageFile):
            entry.st_mode = stat.S_IFREG | 0o444 & ~self.attributes.umask
        else:
            entry.st_mode = stat.S_IFDIR | 0o555 & ~self.attributes.umask
        if isinstance(facts, ImageStat):
            entry.st_size = facts.size
            entry.st_blksize = COPY_BYTES
            entry.st_blocks = -(-facts.used_bytes // STAT_BLOCK_BYTES)
            changed_ns = facts.modified_ns
        else:
            changed_ns = facts or 0
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = changed_ns
        return entry
