"""The attributes that the kernel has of each inode, and for how long it may rely on them."""

import logging
import math
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pyfuse3
import trio

from rbdfs.catalog import ImageStat
from rbdfs.errors import RbdfsError
from rbdfs.fuse.nodes import ImageFile, Node
from rbdfs.fuse.tree import Stat, Tree

log = logging.getLogger(__name__)

ENTRY_SECONDS = 1.0
"""How long the kernel may rely on a name or on attributes before it asks again: what others change shows within it."""

SIZE_HEARD_SECONDS = 0.25
"""How long after an answer the kernel may still use the size that it had before: it stores the new one when the process
that asked runs again."""

COPY_BYTES = 256 * 1024
"""st_blksize: what `cp`, `cat` and Python's open() read at once. Through a buffer of an object's size, 4 MiB, which the
CPU's caches do not hold, `cp` took twice the time and three times the CPU (coreutils 9.1; with 1 MiB a tenth more)."""

STAT_BLOCK_BYTES = 512
"""The unit of st_blocks, whatever the block size."""


@dataclass(frozen=True, slots=True)
class FileAttributes:
    """Owner, permissions and page cache, the same for all files."""

    uid: int
    gid: int
    umask: int
    """Permission bits that are taken away from 0444 (files) and 0555 (directories)."""
    direct_io: bool
    """Reads pass by the kernel's page cache (FOPEN_DIRECT_IO)."""


class KnownStat(NamedTuple):
    """What the kernel knows of an inode."""

    asked: float
    """When the cluster was asked, in trio's time: the kernel knows nothing older."""
    stat: Stat | None
    """None if the cluster must be asked again at the next chance."""


class _KnownEnd(NamedTuple):
    """How long the kernel believes a file to be."""

    size: int
    surely_from: float
    """In trio's time; until then it may believe it to be longer."""


class KernelAttributes:
    """The attributes that the kernel has, by inode."""

    def __init__(self, tree: Tree, file_attributes: FileAttributes) -> None:
        self._tree = tree
        self._file_attributes = file_attributes
        self._known: dict[int, KnownStat] = {}
        self._ends: dict[int, _KnownEnd] = {}
        self.notify: Callable[[int], None] = lambda _: None
        """Makes the kernel drop the attributes of an inode (`Device.notify`)."""

    async def fetch(self, node: Node) -> KnownStat:
        """Ask the cluster. Raises RbdfsError."""
        asked = trio.current_time()
        return KnownStat(asked, await self._tree.stat(node))

    async def get(self, node: Node) -> pyfuse3.EntryAttributes:
        """Return the attributes as the cluster has had them within ENTRY_SECONDS."""
        known = self._known.get(node.inode)
        if known is None or known.stat is None or trio.current_time() - known.asked >= ENTRY_SECONDS:
            known = await self.fetch(node)
            self.add(node, known)
        return self.entry(node, known)

    async def newest(self, node: Node, listed: KnownStat) -> KnownStat:
        """Return the attributes of a node in a listing, or those that the kernel has already, if they are newer.

        The kernel takes those of a listing for each file, even if it is open.
        """
        before = self._known.get(node.inode)
        if before is None:
            return listed
        if before.asked > listed.asked:
            listed = before if before.stat is not None else await self._fetch_if_known(node)
        return listed if listed.stat is not None else before._replace(asked=-math.inf)

    async def _fetch_if_known(self, node: Node) -> KnownStat:
        try:
            return await self.fetch(node)
        except RbdfsError as error:
            log.debug("nothing is known of %s: %s", node.identity, error)
            return KnownStat(trio.current_time(), None)

    def add(self, node: Node, known: KnownStat) -> None:
        """Note that the kernel gets these attributes.

        It drops them if it got newer ones while the cluster was asked (fuse_change_attributes: attr_version).
        """
        if isinstance(known.stat, ImageStat):
            size, end = known.stat.size, self._ends.get(node.inode)
            if end is None or size > end.size:
                self._ends[node.inode] = _KnownEnd(size, -math.inf)
            elif size < end.size:
                self._ends[node.inode] = _KnownEnd(size, trio.current_time() + SIZE_HEARD_SECONDS)
        before = self._known.get(node.inode)
        if before is None or before.asked <= known.asked:
            self._known[node.inode] = known

    def invalidate(self, inode: int) -> None:
        """Make the kernel ask again before it relies on the size of a file."""
        self._known[inode] = KnownStat(trio.current_time(), None)
        self.notify(inode)

    def forget(self, inode: int) -> None:
        """Drop an inode that the kernel has forgotten."""
        self._known.pop(inode, None)
        self._ends.pop(inode, None)

    def seconds_until_end_known(self, inode: int, end: int) -> float | None:
        """Return in how many seconds the kernel surely knows that a file ends at `end`; None if it has a later end."""
        known = self._ends.get(inode, _KnownEnd(0, -math.inf))
        return None if known.size > end else max(0.0, known.surely_from - trio.current_time())

    def entry(self, node: Node, known: KnownStat) -> pyfuse3.EntryAttributes:
        """Return the reply to the kernel, valid until it is ENTRY_SECONDS old; not at all if nothing is known.

        The age counts from when the cluster was asked: a slow listing gives the kernel nothing older than a quick one.
        """
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.inode
        entry.st_uid = self._file_attributes.uid
        entry.st_gid = self._file_attributes.gid
        left = 0.0 if known.stat is None else max(0.0, known.asked + ENTRY_SECONDS - trio.current_time())
        entry.attr_timeout = entry.entry_timeout = left
        if isinstance(node, ImageFile):
            entry.st_mode = stat.S_IFREG | 0o444 & ~self._file_attributes.umask
        else:
            entry.st_mode = stat.S_IFDIR | 0o555 & ~self._file_attributes.umask
        if isinstance(known.stat, ImageStat):
            entry.st_size = known.stat.size
            entry.st_blksize = COPY_BYTES
            entry.st_blocks = -(-known.stat.used_bytes // STAT_BLOCK_BYTES)
            changed_ns = known.stat.modified_ns
        else:
            changed_ns = known.stat or 0
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = changed_ns
        return entry
