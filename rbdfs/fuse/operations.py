"""Each FUSE operation in a few lines: bytes ↔ str, attributes, errno. No policy."""

import errno
import functools
import itertools
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from rbdfs.catalog import Catalog, ImageFacts, ImageRef
from rbdfs.errors import RbdfsError
from rbdfs.fuse.nodes import ImageFile, Node
from rbdfs.fuse.tree import Facts, Listed, Tree
from rbdfs.image.backend import ImageBackend
from rbdfs.image.open_image import OpenImage
from rbdfs.image.open_images import OpenImages
from rbdfs.spec import ImageSpec

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

ENTRY_SECONDS = 1.0
"""How long the kernel may go by a name or by attributes before it asks again: changes made elsewhere show within it."""

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
"""Errors that a file system answers in everyday use; all others are logged as errors."""


@dataclass(frozen=True, slots=True)
class Presentation:
    """How files look, whatever they hold."""

    uid: int
    gid: int
    umask: int
    """Permission bits that are taken away from 0444 (files) and 0555 (directories)."""
    direct_io: bool
    """Reads pass by the kernel's page cache (FOPEN_DIRECT_IO)."""


def answered(
    operation: Callable[Concatenate["Operations", P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate["Operations", P], Coroutine[Any, Any, R]]:
    """The one errno guard: whatever an operation raises is answered as an errno, and the mount lives on.

    pyfuse3 ends the main loop, for everyone, on any exception but FUSEError.
    """

    @functools.wraps(operation)
    async def guarded(self: "Operations", /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await operation(self, *args, **kwargs)
        except RbdfsError as error:
            log.log(logging.DEBUG if error.errno in EXPECTED else logging.ERROR, "%s", error)
            raise pyfuse3.FUSEError(error.errno) from error
        except pyfuse3.FUSEError:
            raise
        except Exception:
            log.exception("%s failed; the process that asked gets EIO", operation.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return guarded


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
        presentation: Presentation,
    ) -> None:
        super().__init__()
        self._tree = tree
        self._catalog = catalog
        self._images = images
        self._open_backend = open_backend
        self._presentation = presentation
        self._handles = itertools.count(1)
        self.files: dict[int, OpenImage] = {}
        """What is open, by handle: device.py reads from it."""
        self._listings: dict[int, tuple[Listed, ...]] = {}
        self._looked: dict[int, tuple[float, Facts | None]] = {}

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """`name` in a directory; the kernel then knows its inode."""
        node = await self._tree.lookup(self._tree.directory(parent_inode), os.fsdecode(name))
        attributes = self._attributes(node, await self._tree.facts(node))
        self._tree.remember(node)
        return attributes

    def forget_inodes(self, lookups: Iterable[tuple[int, int]]) -> None:
        """The kernel has dropped these inodes from its caches: (inode, how many of its lookups it takes back)."""
        for inode, count in lookups:
            self._tree.forget(inode, count)
            self._looked.pop(inode, None)

    @answered
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """The attributes as the cluster has had them within ENTRY_SECONDS.

        Beside direct reads that overlap (libaio) the kernel asks again and again: it drops an answer if a read has
        ended meanwhile (fuse_change_attributes: attr_version), and asks at the next read. The cluster is not asked.
        """
        node = self._tree.node(inode)
        now = trio.current_time()
        looked, facts = self._looked.get(inode, (-ENTRY_SECONDS, None))
        if now - looked >= ENTRY_SECONDS:
            looked, facts = now, await self._tree.facts(node)
            self._looked[inode] = looked, facts
        entry = self._attributes(node, facts)
        entry.attr_timeout = min(entry.attr_timeout, max(0.0, looked + ENTRY_SECONDS - trio.current_time()))
        return entry

    @answered
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """List the directory afresh; what `readdir` answers is frozen in the handle."""
        listing = await self._tree.entries(self._tree.directory(inode))
        handle = next(self._handles)
        self._listings[handle] = tuple(listing)
        return handle

    @answered
    async def readdir(self, handle: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """The entries from `start_id` on, as many as the kernel takes."""
        listing = self._listings[handle]
        for position in range(start_id, len(listing)):
            name, node, facts = listing[position]
            attributes = self._attributes(node, facts)
            if not pyfuse3.readdir_reply(token, os.fsencode(name), attributes, position + 1):
                break
            self._tree.remember(node)

    @answered
    async def releasedir(self, handle: int) -> None:
        """The listing is no longer needed."""
        del self._listings[handle]

    @answered
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open an image. The kernel keeps the pages that it has only if nobody can have written to it since."""
        node = self._tree.node(inode)
        if flags & os.O_ACCMODE != os.O_RDONLY or not isinstance(node, ImageFile):
            raise pyfuse3.FUSEError(errno.EROFS)
        image, unchanged = await self._images.open(node.ref, partial(self._open_backend, node.spec, node.ref))
        handle = next(self._handles)
        self.files[handle] = image
        self._looked.pop(inode, None)
        return pyfuse3.FileInfo(fh=handle, keep_cache=unchanged, direct_io=self._presentation.direct_io)

    @answered
    async def flush(self, handle: int) -> None:
        """A close(): an error if the image is gone, which cp, dd and cat notice."""
        await self.files[handle].flush()

    @answered
    async def release(self, handle: int) -> None:
        """The last descriptor of an open() was closed."""
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

    def _attributes(self, node: Node, facts: Facts | None) -> pyfuse3.EntryAttributes:
        """What the kernel is told; it asks again at once where `facts` are None, not known at listing time."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.inode
        entry.st_uid = self._presentation.uid
        entry.st_gid = self._presentation.gid
        entry.attr_timeout = entry.entry_timeout = 0.0 if facts is None else ENTRY_SECONDS
        if isinstance(node, ImageFile):
            entry.st_mode = stat.S_IFREG | 0o444 & ~self._presentation.umask
        else:
            entry.st_mode = stat.S_IFDIR | 0o555 & ~self._presentation.umask
        if isinstance(facts, ImageFacts):
            entry.st_size = facts.size
            entry.st_blksize = COPY_BYTES
            entry.st_blocks = -(-facts.used_bytes // STAT_BLOCK_BYTES)
            changed_ns = facts.modified_ns
        else:
            changed_ns = facts or 0
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = changed_ns
        return entry
