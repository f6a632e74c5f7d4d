"""Each FUSE operation in a few lines: bytes ↔ str, attributes, errno. No policy, no state but handles."""

import errno
import itertools
import math
import os
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from time import monotonic
from typing import NamedTuple

import pyfuse3

from rbdfs.catalog import Catalog, ImageRef
from rbdfs.fuse.attributes import FileAttributes, KernelAttributes
from rbdfs.fuse.guard import Guard, answered, answered_by_inode
from rbdfs.fuse.listing import Listing
from rbdfs.fuse.nodes import ROOT_INODE, ImageFile
from rbdfs.fuse.process import Process, process_of
from rbdfs.fuse.tree import Tree
from rbdfs.fuse.trouble_log import TroubleLog
from rbdfs.image.backend import ImageBackend
from rbdfs.image.open_image import OpenImage
from rbdfs.image.open_images import OpenImages
from rbdfs.spec import ImageSpec

BLOCK_BYTES = 4096
"""The unit that statfs counts in."""

XATTR_PREFIX = b"user.rbd."
"""What the names of extended attributes begin with."""

XATTR_NAME_BYTES = 255
"""The longest name of an extended attribute that the kernel takes (XATTR_NAME_MAX)."""

BY_HANDLE = frozenset({"readdir", "releasedir", "flush", "release"})
"""Operations that are given a handle; `statfs` is given neither handle nor inode, all others an inode."""


class OpenedBy(NamedTuple):
    """The open() behind a handle."""

    image: ImageSpec
    process: Process
    since: float
    """As time.monotonic() has it."""


class Operations(pyfuse3.Operations):  # type: ignore[misc, unused-ignore]  # Debian 12's pyfuse3 has no types
    """The file system that the kernel talks to, except READ, LSEEK and FORGET: device.py answers these.

    It is mounted read-only: the kernel answers writes with EROFS.
    """

    def __init__(
        self,
        tree: Tree,
        catalog: Catalog,
        images: OpenImages,
        open_backend: Callable[[ImageSpec, ImageRef], Awaitable[ImageBackend]],
        file_attributes: FileAttributes,
        troubles: TroubleLog,
        answer_seconds: float = math.inf,
    ) -> None:
        """`answer_seconds` is how long a request may wait."""
        super().__init__()
        self._tree = tree
        self._catalog = catalog
        self._images = images
        self._open_backend = open_backend
        self.attributes = KernelAttributes(tree, file_attributes)
        self.direct_io = file_attributes.direct_io
        self.guard = Guard(troubles, answer_seconds)
        self.troubles = troubles
        self._handles = itertools.count(1)
        self.files: dict[int, OpenImage] = {}
        """Open files, by handle: device.py reads from them."""
        self.opened: dict[int, OpenedBy] = {}
        """The open() behind each handle, for operators."""
        self._listings: dict[int, Listing] = {}
        self._inodes: dict[int, int] = {}
        """Of files and directories, by handle."""

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Find `name` in a directory; the kernel then knows its inode."""
        node = await self._tree.lookup(self._tree.directory(parent_inode), os.fsdecode(name))
        known = await self.attributes.fetch(node)
        self._tree.add_lookup(node)
        self.attributes.add(node, known)
        return self.attributes.entry(node, known)

    def forget_inodes(self, lookups: Iterable[tuple[int, int]]) -> None:
        """Lower the lookup counts of inodes that the kernel has dropped from its caches: (inode, lookups)."""
        for inode, count in lookups:
            if self._tree.forget(inode, count):
                self.attributes.forget(inode)

    @answered_by_inode
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Return the attributes, without asking the cluster each time.

        Beside direct reads that overlap (libaio) the kernel asks again and again: it drops an answer if a read has
        ended in between (fuse_change_attributes: attr_version), and asks at the next read.
        """
        return await self.attributes.get(self._tree.node(inode))

    @answered_by_inode
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """List the directory; `readdir` gives out the names that it has now."""
        entries = await self._tree.entries(self._tree.directory(inode))
        handle = next(self._handles)
        self._listings[handle] = Listing(entries, self._tree, self.attributes)
        self._inodes[handle] = inode
        return handle

    @answered
    async def readdir(self, handle: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Give the kernel the entries from `start_id` on, as many as it takes."""
        await self._listings[handle].reply(token, start_id)

    @answered
    async def releasedir(self, handle: int) -> None:
        """Drop a listing."""
        del self._listings[handle]
        self._inodes.pop(handle, None)

    @answered_by_inode
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open an image. The kernel keeps its pages and the size only if nobody can have written since."""
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
            self.attributes.invalidate(inode)
        return pyfuse3.FileInfo(fh=handle, keep_cache=unchanged, direct_io=self.direct_io)

    @answered
    async def flush(self, handle: int) -> None:
        """Check at a close() whether the image is gone: cp, dd and cat notice the error."""
        await self.files[handle].flush()

    @answered
    async def release(self, handle: int) -> None:
        """Close a file: its last descriptor was closed."""
        self._inodes.pop(handle, None)
        self.opened.pop(handle, None)
        await self._images.close(self.files.pop(handle))

    @answered
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        """Return an attribute of an image.

        The cluster is not asked for those that `ls -l` wants (security.selinux, system.posix_acl_access): after
        ENOTSUP `ls` asks no other file. After ENOSYS the kernel would ask for no attribute at all.
        """
        if not name.startswith(b"user."):
            raise pyfuse3.FUSEError(errno.ENOTSUP)
        node = self._tree.node(inode)
        if not isinstance(node, ImageFile) or not name.startswith(XATTR_PREFIX):
            raise pyfuse3.FUSEError(errno.ENODATA)
        return os.fsencode(await self._catalog.attribute(node.ref, os.fsdecode(name.removeprefix(XATTR_PREFIX))))

    @answered
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        """Return the names of all attributes. A key of the image's own metadata that is no valid name is left out."""
        node = self._tree.node(inode)
        attributes = await self._catalog.attribute_names(node.ref) if isinstance(node, ImageFile) else ()
        names = [XATTR_PREFIX + os.fsencode(name) for name in attributes]
        return [name for name in names if len(name) <= XATTR_NAME_BYTES and b"\0" not in name]

    @answered
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        """Return the raw capacity of the cluster."""
        usage = await self._catalog.usage()
        answer = pyfuse3.StatvfsData()
        answer.f_bsize = answer.f_frsize = BLOCK_BYTES
        answer.f_blocks = usage.total // BLOCK_BYTES
        answer.f_bfree = answer.f_bavail = usage.available // BLOCK_BYTES
        answer.f_namemax = os.pathconf("/", "PC_NAME_MAX")
        return answer

    def image_of(self, inode: int) -> ImageSpec | None:
        """Return the image that an inode is, or lists the snapshots of."""
        return self._tree.image_of(inode)

    def inode_of(self, operation: str, subject: object) -> int | None:
        """Return the inode that an operation works on, by its first argument."""
        if not isinstance(subject, int):
            return ROOT_INODE
        return self._inodes.get(subject) if operation in BY_HANDLE else subject
