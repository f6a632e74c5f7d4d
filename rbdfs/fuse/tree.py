"""The file tree: pools and namespaces as directories, images and snapshots as files.

    POOL/IMAGE, POOL/NAMESPACE/IMAGE       HEAD
    POOL/IMAGE@SNAPSHOT                    a snapshot: found by name, not listed
    POOL/.snap/IMAGE/SNAPSHOT              the same file, listed; `.snap` itself is not listed, as in CephFS
    POOL/@NAMESPACE                        the namespace again: listed so if an image has its name

The kernel names a file by its inode from its lookup until it forgets it (lookup counts); this keeps the node of each
such inode. Each lookup asks the cluster: what others rename, make or remove shows as soon as the kernel asks again
(`attributes.ENTRY_SECONDS`).
"""

import errno
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from operator import attrgetter
from typing import NamedTuple, TypeVar

import trio

from rbdfs.catalog import Catalog, ImageRef, ImageStat, Namespace, Pool
from rbdfs.errors import RbdfsError
from rbdfs.fuse import names
from rbdfs.fuse.nodes import (
    ROOT_INODE,
    Directory,
    ImageDirectory,
    ImageFile,
    Node,
    Root,
    SnapDirectory,
    SnapshotDirectory,
    image_file,
    namespace_directory,
    parent_of,
    pool_directory,
    snap_directory,
    snapshot_directory,
)
from rbdfs.spec import ImageSpec
from rbdfs.tasks import in_slices

log = logging.getLogger(__name__)

T = TypeVar("T")

DIRECTORIES_AT_ONCE = 32
"""To ask about; if all 500 namespaces of a pool were asked at once, a read would wait for all those answers."""

NAMESPACE_NAME_BYTES = names.NAME_BYTES - len(names.SEPARATOR)
"""Room for `@` before it."""

Stat = ImageStat | int
"""The attributes of an image; for a directory, when its entries last changed, in nanoseconds since the epoch."""


class DirEntry(NamedTuple):
    """An entry of a directory."""

    name: str
    """Its file name."""
    node: Node


class Tree:
    """The nodes of all inodes that the kernel knows."""

    def __init__(self, catalog: Catalog, mounted_ns: int) -> None:
        self._catalog = catalog
        self._mounted_ns = mounted_ns
        self._nodes: dict[int, Node] = {ROOT_INODE: Root()}
        self._lookups: dict[int, int] = {}

    def node(self, inode: int) -> Node:
        """Return the node of an inode; the kernel asks only for those that it has looked up."""
        return self._nodes[inode]

    def image_of(self, inode: int) -> ImageSpec | None:
        """Return the image that an inode is, or lists the snapshots of."""
        node = self._nodes.get(inode)
        return node.spec if isinstance(node, ImageFile | SnapshotDirectory) else None

    def directory(self, inode: int) -> Directory:
        """As `node`, for a directory. Raises RbdfsError (ENOTDIR) for a file."""
        node = self._nodes[inode]
        if isinstance(node, ImageFile):
            raise RbdfsError(f"{node.spec} is not a directory", errno.ENOTDIR)
        return node

    async def lookup(self, parent: Directory, name: str) -> Node:
        """Find an entry of a directory. Raises RbdfsError: ENOENT, EACCES for a pool that the key may not read."""
        if name in {".", ".."}:
            return parent if name == "." else parent_of(parent)
        match parent:
            case Root():
                return pool_directory(await _find(name, self._catalog.pool, self._pools))
            case ImageDirectory(namespace=namespace) if name == names.SNAP:
                return snap_directory(namespace)
            case ImageDirectory(namespace=namespace):
                return await self._lookup_image(namespace, name)
            case SnapDirectory(namespace=namespace):
                return snapshot_directory(*await self._image(namespace, name))
            case SnapshotDirectory(ref=ref, spec=spec):
                return await self._snapshot(ref, spec, name)

    async def stat(self, node: Node) -> Stat:
        """Ask the cluster about a node. Raises RbdfsError: ENOENT if it is gone."""
        match node:
            case Root():
                return self._mounted_ns
            case ImageFile(ref=ref):
                return await self._catalog.stat(ref)
            case SnapshotDirectory(ref=ref):
                snapshots = list((await self._catalog.snapshots(ref)).values())
                newest = snapshots[-1] if snapshots else ref
                return (await self._catalog.stat(newest)).modified_ns
            case ImageDirectory(namespace=namespace) | SnapDirectory(namespace=namespace):
                changed_ns = await self._catalog.changed_ns(namespace)
                return self._mounted_ns if changed_ns is None else changed_ns

    async def stat_all(self, nodes: Iterable[Node]) -> Mapping[int, Stat | None]:
        """Ask the cluster about many nodes of one directory. Returns the answers by inode; does not raise.

        Nodes that are gone are left out. Those that are not known are None, and so are directories of snapshots: most
        programs that list `.snap` do not need the time of each image's newest snapshot.
        """
        files: dict[ImageRef, int] = {}
        stats: dict[int, Stat | None] = {}
        at_once = trio.CapacityLimiter(DIRECTORIES_AT_ONCE)

        async def ask(node: ImageDirectory) -> None:
            async with at_once:
                try:
                    stats[node.inode] = await self.stat(node)
                except RbdfsError as error:
                    log.debug("nothing is known of %s: %s", node.identity, error)

        async with trio.open_nursery() as nursery:
            for node in nodes:
                if isinstance(node, ImageFile):
                    files[node.ref] = node.inode
                else:
                    stats[node.inode] = None
                    if isinstance(node, ImageDirectory):
                        nursery.start_soon(ask, node)
        found = await self._catalog.stat_all(files)
        return stats | {files[ref]: each for ref, each in found.items()}

    async def entries(self, directory: Directory) -> list[DirEntry]:
        """Return all entries of a directory, sorted by name."""
        match directory:
            case Root():
                found = [
                    DirEntry(names.encode(pool.name), pool_directory(pool)) for pool in await self._catalog.pools()
                ]
            case ImageDirectory(namespace=namespace):
                found = await self._list_images(namespace)
            case SnapDirectory(namespace=namespace):
                refs = await self._catalog.image_names(namespace)
                found = [
                    DirEntry(names.encode(name), snapshot_directory(ref, _spec(namespace, name)))
                    async for name, ref in in_slices(refs.items())
                ]
            case SnapshotDirectory(ref=ref, spec=spec):
                snapshots = await self._catalog.snapshots(ref)
                found = [
                    DirEntry(names.encode(name), image_file(snapshot, _at(spec, name)))
                    async for name, snapshot in in_slices(snapshots.items())
                ]
        return sorted(found, key=attrgetter("name"))

    def add_lookup(self, node: Node) -> None:
        """Raise the lookup count of a node by one: the kernel gets its inode.

        Raises RbdfsError (EIO) if it knows another node by the same inode: one image must never answer for another.
        """
        known = self._nodes.get(node.inode, node)
        if known.identity != node.identity:
            raise RbdfsError(f"{node.identity} and {known.identity} have the same inode {node.inode}", errno.EIO)
        self._nodes[node.inode] = node
        self._lookups[node.inode] = self._lookups.get(node.inode, 0) + 1

    def forget(self, inode: int, lookups: int) -> bool:
        """Lower the lookup count of an inode. Returns whether the kernel does not know the inode any more."""
        left = self._lookups.get(inode, 0) - lookups
        if left > 0:
            self._lookups[inode] = left
        elif inode != ROOT_INODE:
            self._lookups.pop(inode, None)
            self._nodes.pop(inode, None)
            return True
        return False

    async def _lookup_image(self, namespace: Namespace, name: str) -> Node:
        image, at, snapshot = name.partition(names.SEPARATOR)
        if at and image:
            return await self._snapshot(*await self._image(namespace, image), snapshot)
        if at:
            return await self._namespace_directory(namespace, snapshot)
        try:
            return image_file(*await self._image(namespace, name))
        except RbdfsError as error:
            if error.errno != errno.ENOENT or namespace.name:
                raise
        return await self._namespace_directory(namespace, name)

    async def _image(self, namespace: Namespace, name: str) -> tuple[ImageRef, ImageSpec]:
        find = partial(self._catalog.image, namespace)
        found, ref = await _find_named(name, find, partial(self._catalog.image_names, namespace))
        return ref, _spec(namespace, found)

    async def _snapshot(self, ref: ImageRef, spec: ImageSpec, name: str) -> ImageFile:
        find = partial(self._catalog.snapshot, ref)
        found, snapshot = await _find_named(name, find, partial(self._catalog.snapshots, ref))
        return image_file(snapshot, _at(spec, found))

    async def _namespace_directory(self, parent: Namespace, name: str) -> ImageDirectory:
        if parent.name:
            raise RbdfsError(f"{parent}: there are no namespaces in a namespace", errno.ENOENT)
        find = partial(self._catalog.namespace, parent.pool)
        namespace = await _find(name, find, partial(self._namespaces, parent.pool), NAMESPACE_NAME_BYTES)
        return namespace_directory(namespace)

    async def _pools(self) -> Mapping[str, Pool]:
        return {pool.name: pool for pool in await self._catalog.pools()}

    async def _namespaces(self, pool: Pool) -> Mapping[str, Namespace]:
        return {namespace.name: namespace for namespace in await self._catalog.namespaces(pool)}

    async def _list_images(self, namespace: Namespace) -> list[DirEntry]:
        refs = await self._catalog.image_names(namespace)
        found = [
            DirEntry(names.encode(name), image_file(ref, _spec(namespace, name)))
            async for name, ref in in_slices(refs.items())
        ]
        if not namespace.name:
            async for each in in_slices(await self._catalog.namespaces(namespace.pool)):
                at = names.SEPARATOR if each.name in refs else ""
                file_name = at + names.encode(each.name, NAMESPACE_NAME_BYTES)
                found.append(DirEntry(file_name, namespace_directory(each)))
        return found


async def _find(
    file_name: str,
    by_name: Callable[[str], Awaitable[T]],
    all_names: Callable[[], Awaitable[Mapping[str, T]]],
    room: int = names.NAME_BYTES,
) -> T:
    """Return what has the name that a file name stands for. Raises RbdfsError: ENOENT."""
    _, found = await _find_named(file_name, by_name, all_names, room)
    return found


async def _find_named(
    file_name: str,
    by_name: Callable[[str], Awaitable[T]],
    all_names: Callable[[], Awaitable[Mapping[str, T]]],
    room: int = names.NAME_BYTES,
) -> tuple[str, T]:
    name = names.decode(file_name, room)
    if name is not None:
        return name, await by_name(name)
    if names.is_abbreviated(file_name):
        for name, found in (await all_names()).items():
            if names.encode(name, room) == file_name:
                return name, found
    raise RbdfsError(f"no name is written {file_name!r}: see SEMANTICS.md, 'Names'", errno.ENOENT)


def _spec(namespace: Namespace, image: str) -> ImageSpec:
    return ImageSpec(namespace.pool.name, image, namespace.name)


def _at(image: ImageSpec, snapshot: str) -> ImageSpec:
    return ImageSpec(image.pool, image.image, image.namespace, snapshot)
