"""The file tree: pools as directories, images as files, each with an inode that is the same at every mount.

The kernel names a file by its inode once it has looked it up, until it forgets it (lookup counts); this keeps what
the inode stands for meanwhile. Names are looked up in the cluster each time: what others rename, make or remove shows
as soon as the kernel asks again (`operations.ENTRY_SECONDS`).
"""

import errno
import hashlib
from dataclasses import dataclass

from rbdfs.catalog import Catalog, ImageFacts, ImageRef, Namespace, Pool
from rbdfs.errors import RbdfsError
from rbdfs.spec import ImageSpec

ROOT_INODE = 1
"""FUSE_ROOT_ID of the kernel's interface."""


@dataclass(frozen=True, slots=True)
class Directory:
    """The root, or a pool."""

    inode: int
    pool: Pool | None = None

    @property
    def identity(self) -> Pool | None:
        """What makes it this directory and no other, whatever its name."""
        return self.pool


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image's HEAD, or a snapshot. `spec` is what it was called when it was looked up."""

    inode: int
    ref: ImageRef
    spec: ImageSpec

    @property
    def identity(self) -> ImageRef:
        """What makes it this file and no other, whatever its name."""
        return self.ref


Node = Directory | ImageFile
Listed = tuple[str, Node, ImageFacts | None]
"""A directory entry: its name, what it is, and an image's facts."""

ROOT = Directory(ROOT_INODE)


class Tree:
    """What the inodes that the kernel knows stand for."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._nodes: dict[int, Node] = {ROOT_INODE: ROOT}
        self._lookups: dict[int, int] = {}

    def node(self, inode: int) -> Node:
        """What an inode stands for; the kernel asks only for those that it has looked up."""
        return self._nodes[inode]

    def directory(self, inode: int) -> Directory:
        """As `node`, of a directory. Raises RbdfsError (ENOTDIR) for a file."""
        node = self._nodes[inode]
        if isinstance(node, Directory):
            return node
        raise RbdfsError(f"{node.spec} is not a directory", errno.ENOTDIR)

    async def lookup(self, parent: Directory, name: str) -> Node:
        """The entry of a directory. Raises RbdfsError: ENOENT, EACCES for a pool that the key may not read."""
        if name == ".":
            return parent
        if name == "..":
            return ROOT
        if parent.pool is None:
            return self._pool(await self._catalog.pool(name))
        image, at, snapshot = name.partition("@")
        spec = ImageSpec(parent.pool.name, image, snapshot=snapshot)
        ref = await self._catalog.image(Namespace(parent.pool), image)
        return self._image(await self._catalog.snapshot(ref, snapshot) if at else ref, spec)

    async def list(self, directory: Directory) -> list[Listed]:
        """All entries of a directory, sorted by name. An image that goes away meanwhile is left out."""
        if directory.pool is None:
            return [(pool.name, self._pool(pool), None) for pool in await self._catalog.pools()]
        names = await self._catalog.image_names(Namespace(directory.pool))
        facts = await self._catalog.facts_of_all(names.values())
        return [
            (name, self._image(ref, ImageSpec(directory.pool.name, name)), facts[ref])
            for name, ref in sorted(names.items())
            if ref in facts
        ]

    def remember(self, node: Node) -> None:
        """The kernel is told of a node: its lookup count goes up by one.

        Raises RbdfsError (EIO) where it knows another node by the same inode: one image must never answer for another.
        """
        known = self._nodes.get(node.inode, node)
        if known.identity != node.identity:
            raise RbdfsError(f"{node.identity} and {known.identity} have the same inode {node.inode}", errno.EIO)
        self._nodes[node.inode] = node
        self._lookups[node.inode] = self._lookups.get(node.inode, 0) + 1

    def forget(self, inode: int, lookups: int) -> None:
        """The kernel takes back `lookups` of its lookups."""
        left = self._lookups.get(inode, 0) - lookups
        if left > 0:
            self._lookups[inode] = left
        elif inode != ROOT_INODE:
            self._lookups.pop(inode, None)
            self._nodes.pop(inode, None)

    def _pool(self, pool: Pool) -> Directory:
        return Directory(_inode("pool", str(pool.id)), pool)

    def _image(self, ref: ImageRef, spec: ImageSpec) -> ImageFile:
        identity = ["image", str(ref.namespace.pool.id), ref.id]
        if ref.snapshot_id is not None:
            identity.append(str(ref.snapshot_id))
        return ImageFile(_inode(*identity), ref, spec)


def _inode(*identity: str) -> int:
    """63 bits of a hash of what never changes, so that backup programs see the same inode at the next mount.

    Two of a million images have the same one with a probability of 1 in 18 million; then the second of them that is
    looked up gets EIO (`Tree.remember`).
    """
    digest = hashlib.blake2b("\0".join(identity).encode(), digest_size=8).digest()
    return max(2, int.from_bytes(digest, "little") >> 1)
