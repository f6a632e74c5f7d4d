"""What the entries of the file tree are: directories and files, each with an inode that is the same at every mount."""

import hashlib
from dataclasses import dataclass

from rbdfs.catalog import ImageRef, Namespace, Pool
from rbdfs.fuse.names import SNAP
from rbdfs.spec import ImageSpec

ROOT_INODE = 1
"""FUSE_ROOT_ID of the kernel's interface."""


@dataclass(frozen=True, slots=True)
class Root:
    """Where the pools are."""

    inode: int = ROOT_INODE

    @property
    def identity(self) -> object:
        """What makes it this directory and no other, whatever its name."""
        return None


@dataclass(frozen=True, slots=True)
class ImageDirectory:
    """The images of a pool, or of a namespace of it."""

    inode: int
    namespace: Namespace

    @property
    def identity(self) -> object:
        """See `Root.identity`."""
        return self.namespace


@dataclass(frozen=True, slots=True)
class SnapDirectory:
    """`.snap`: a directory for each image."""

    inode: int
    namespace: Namespace

    @property
    def identity(self) -> object:
        """See `Root.identity`."""
        return SNAP, self.namespace


@dataclass(frozen=True, slots=True)
class SnapshotDirectory:
    """`.snap/IMAGE`: the snapshots of an image. `spec` is what the image was called when it was looked up."""

    inode: int
    ref: ImageRef
    spec: ImageSpec

    @property
    def identity(self) -> object:
        """See `Root.identity`."""
        return SNAP, self.ref


Directory = Root | ImageDirectory | SnapDirectory | SnapshotDirectory


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An image's HEAD, or a snapshot. `spec` is what it was called when it was looked up."""

    inode: int
    ref: ImageRef
    spec: ImageSpec

    @property
    def identity(self) -> object:
        """What makes it this file and no other, whatever its name."""
        return self.ref


Node = Directory | ImageFile


def parent_of(directory: Directory) -> Directory:
    """What `..` is."""
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
    """A pool, which is its default namespace."""
    return ImageDirectory(_inode("pool", str(pool.id)), Namespace(pool))


def namespace_directory(namespace: Namespace) -> ImageDirectory:
    """A namespace that is not the default one."""
    return ImageDirectory(_inode("namespace", str(namespace.pool.id), namespace.name), namespace)


def snap_directory(namespace: Namespace) -> SnapDirectory:
    """The `.snap` of a pool or a namespace."""
    return SnapDirectory(_inode("snap", str(namespace.pool.id), namespace.name), namespace)


def snapshot_directory(ref: ImageRef, spec: ImageSpec) -> SnapshotDirectory:
    """An image in `.snap`."""
    return SnapshotDirectory(_inode("snapshots", *_identity(ref)), ref, spec)


def image_file(ref: ImageRef, spec: ImageSpec) -> ImageFile:
    """An image, or a snapshot."""
    kind = "image" if ref.snapshot_id is None else "snapshot"
    return ImageFile(_inode(kind, *_identity(ref)), ref, spec)


def _identity(ref: ImageRef) -> list[str]:
    """Different for all images and snapshots of a kind: an id has no `:`."""
    identity = [str(ref.namespace.pool.id), ref.id]
    if ref.namespace.name:
        identity.append(f"namespace:{ref.namespace.name}")
    if ref.snapshot_id is not None:
        identity.append(f"snapshot:{ref.snapshot_id}")
    if ref.format == 1:  # where the id is a name, which can be anything
        identity.append("format:1")
    return identity


def _inode(*identity: str) -> int:
    """63 bits of a hash of what never changes, so that backup programs see the same inode at the next mount.

    Two of a million images have the same one with a probability of 1 in 18 million; then the second of them that is
    looked up gets EIO (`Tree.remember`).
    """
    digest = hashlib.blake2b("\0".join(identity).encode(errors="surrogateescape"), digest_size=8).digest()
    return max(2, int.from_bytes(digest, "little") >> 1)
