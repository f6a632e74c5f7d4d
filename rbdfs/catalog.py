"""What a cluster holds, as values: pools, namespaces, images, snapshots. `ceph/` finds them, `fuse/` shows them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool with the `rbd` application. Its id survives renames, and is never used again."""

    id: int
    name: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace of a pool, which holds images. Each pool has the default namespace, whose name is empty."""

    pool: Pool
    name: str = ""

    def __str__(self) -> str:
        return f"{self.pool.name}/{self.name}" if self.name else self.pool.name


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image's HEAD or one of its snapshots, by what no rename changes: namespace and ids."""

    namespace: Namespace
    id: str
    """As `rbd info` shows it; for an image of format 1, which has none, its name."""
    snapshot_id: int | None = None
    """None for HEAD."""
    format: int = 2
    """As `rbd info` shows it: 1 for images made before Ceph 0.61 (Cuttlefish) or with RBD_FORCE_ALLOW_V1."""


@dataclass(frozen=True, slots=True)
class ImageStat:
    """What `ls -l` shows about an image, known without opening it."""

    size: int
    """Bytes."""
    used_bytes: int
    """What the image holds, in whole objects; its size if that cannot be known without looking at each object."""
    modified_ns: int
    """Nanoseconds since the epoch; RBD updates it once a minute at most (`rbd_mtime_update_interval`). For a
    snapshot, when it was made."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of the cluster's storage, raw, as `ceph df` counts them."""

    total: int
    available: int


class Catalog(Protocol):
    """The cluster as a file tree sees it. Every method raises RbdfsError with the errno for the calling process."""

    async def pools(self) -> list[Pool]:
        """The pools with the `rbd` application that the key may read."""

    async def pool(self, name: str) -> Pool:
        """A pool by name: ENOENT if there is none, EACCES if the key may not read it."""

    async def namespaces(self, pool: Pool) -> list[Namespace]:
        """The namespaces of a pool except the default one, sorted by name."""

    async def namespace(self, pool: Pool, name: str) -> Namespace:
        """A namespace by name: ENOENT if there is none."""

    async def image_names(self, namespace: Namespace) -> dict[str, ImageRef]:
        """All images of a namespace, by name."""

    async def image(self, namespace: Namespace, name: str) -> ImageRef:
        """One image by name: ENOENT if there is none."""

    async def snapshots(self, image: ImageRef) -> dict[str, ImageRef]:
        """The snapshots that users made of an image, by name, the oldest first: ENOENT if the image is gone.

        A broken image has none.
        """

    async def snapshot(self, image: ImageRef, name: str) -> ImageRef:
        """A snapshot by name: ENOENT if there is none."""

    async def stat(self, image: ImageRef) -> ImageStat:
        """ENOENT if the image is gone. A broken image, which its pool names but which has no header, has one byte."""

    async def stat_all(self, images: Iterable[ImageRef]) -> Mapping[ImageRef, ImageStat | None]:
        """`stat` for many images at once. Images that are gone are left out; None if the cluster did not answer for an
        image."""

    async def changed_ns(self, namespace: Namespace) -> int | None:
        """When an image of a namespace was last created, renamed or removed, in nanoseconds since the epoch; None if
        there never was one."""

    async def attribute_names(self, image: ImageRef) -> list[str]:
        """The names that `attribute` takes for an image or a snapshot; `meta.KEY` is for the image's own metadata."""

    async def attribute(self, image: ImageRef, name: str) -> str:
        """An attribute in the words of the `rbd` command: ENODATA if there is none of that name."""

    async def usage(self) -> Usage:
        """How full the cluster is."""
