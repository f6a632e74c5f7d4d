"""The entries of the file tree: directories and files, each with an inode that is the same at every mount."""

import hashlib
from dataclasses import dataclass

from rbdfs.catalog import ImageRef, Namespace, Pool
from rbdfs.fuse.names import SNAP
from rbdfs.spec import ImageSpec

ROOT_INODE = 1
"""FUSE_ROOT_ID of the kernel's interface."""


@dataclass(frozen=True, slots=True)
class Root:
    """The directory of pools."""

    inode: int = ROOT_INODE

    @property
    def identity(self) -> object:
        """What tells this node from all others, whatever its name."""
        return None


@dataclass(frozen=True, slots=True)
class ImageDirectory:
    """The images of a pool, or of a namespace of it."""

    inode: int
    namespace: Namespace

    @property
    def identity(self) -> object:
        return self.namespace


@dataclass(frozen=True, slots=True)
class SnapDirectory:
    """`.snap`: a directory for each image."""

    inode: int
    namespace: Namespace

    @property
    def identity(self) -> object:
        return SNAP, self.namespace


@dataclass(frozen=True, slots=True)
class SnapshotDirectory:
    """`.snap/IMAGE`: the snapshots of an image. `spec` is the image's name when it was looked up."""

    inode: int
    ref: ImageRef
    spec: ImageSpec

    @property
    def identity(self) -> object:
        return SNAP, self.ref


Directory = Root | ImageDirectory | SnapDirectory | SnapshotDirectory


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image's HEAD, or a snapshot. `spec` is its name when it was looked up."""

    inode: int
    ref: ImageRef
    spec: ImageSpec

    @property
    def identity(self) -> object:
        return self.ref


Node = Directory | ImageFile


def parent_of(directory: Directory) -> Directory:
    """Return the directory that `..` is."""
    match directory:
        case ImageDirectory(namespace=namespace) if namespace.name:
            return pool_directory(namespace.pool)
        case SnapDirectory(namespace=namespace):
            return pool_directory(namespace.pool) if not namespace.name else namespace_directory(namespace)
        case SnapshotDirectory(ref=ref):
            return snap_directory(ref.namespace)
        case _:
            return Root()


def pool_directory(pool: Pool) -> ImageDirectory:
    """Return the directory of a pool, which is that of its default namespace."""
    return ImageDirectory(_inode("pool", str(pool.id)), Namespace(pool))


def namespace_directory(namespace: Namespace) -> ImageDirectory:
    """Return the directory of a namespace that is not the default one."""
    return ImageDirectory(_inode("namespace", str(namespace.pool.id), namespace.name), namespace)


def snap_directory(namespace: Namespace) -> SnapDirectory:
    """Return the `.snap` of a pool or a namespace."""
    return SnapDirectory(_inode("snap", str(namespace.pool.id), namespace.name), namespace)


def snapshot_directory(ref: ImageRef, spec: ImageSpec) -> SnapshotDirectory:
    """Return the directory of an image in `.snap`."""
    return SnapshotDirectory(_inode("snapshots", *_identity(ref)), ref, spec)


def image_file(ref: ImageRef, spec: ImageSpec) -> ImageFile:
    """Return the file of an image or a snapshot."""
    kind = "image" if ref.snapshot_id is None else "snapshot"
    return ImageFile(_inode(kind, *_identity(ref)), ref, spec)


def _identity(ref: ImageRef) -> list[str]:
    """Return what tells an image or a snapshot from all others of its kind: an id has no `:`."""
    identity = [str(ref.namespace.pool.id), ref.id]
    if ref.namespace.name:
        identity.append(f"namespace:{ref.namespace.name}")
    if ref.snapshot_id is not None:
        identity.append(f"snapshot:{ref.snapshot_id}")
    if ref.format == 1:  # where the id is a name, which can be anything
        identity.append("format:1")
    return identity


def _inode(*identity: str) -> int:
    """Hash what never changes to 63 bits, so that backup programs see the same inode at the next mount.

    Two of a million images have the same inode with a probability of 1 in 18 million; then a lookup of the second one
    gets EIO (`Tree.add_lookup`).
    """
    digest = hashlib.blake2b("\0".join(identity).encode(errors="surrogateescape"), digest_size=8).digest()
    return max(2, int.from_bytes(digest, "little") >> 1)
