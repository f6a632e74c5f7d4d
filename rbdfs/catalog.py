"""What a cluster holds, as values: pools, images and their facts. `ceph/` finds them, `fuse/` shows them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool with the `rbd` application. The id stays when the pool is renamed, and is never used again."""

    id: int
    name: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace of a pool, which holds images as a pool does. Each pool has the default one, whose name is empty."""

    pool: Pool
    name: str = ""

    def __str__(self) -> str:
        return f"{self.pool.name}/{self.name}" if self.name else self.pool.name


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image's HEAD, or one of its snapshots, by what no renaming changes: where it is, and its ids."""

    namespace: Namespace
    id: str
    """As `rbd info` has it; an image of format 1 has none, and is known by its name."""
    snapshot_id: int | None = None
    """None for HEAD."""
    format: int = 2
    """As `rbd info` has it: 1 for what was made before Ceph 0.61 (Cuttlefish) or by RBD_FORCE_ALLOW_V1."""


@dataclass(frozen=True, slots=True)
class ImageStat:
    """What `ls -l` shows of an image, known without opening it."""

    size: int
    """Bytes."""
    used_bytes: int
    """What it holds, in whole objects; the size, where that is not known without looking at each object."""
    modified_ns: int
    """Nanoseconds since the epoch; RBD moves it once a minute at most (`rbd_mtime_update_interval`). Of a snapshot,
    when it was made."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of the cluster's storage, raw, as `ceph df` counts them."""

    total: int
    available: int


class Catalog(Protocol):
    """The cluster as a file tree sees it. Every method raises RbdfsError with the errno for the process that asks."""

    async def pools(self) -> list[Pool]:
        """The pools with the `rbd` application that the key may read."""

    async def pool(self, name: str) -> Pool:
        """One of them by name: ENOENT if there is none, EACCES if the key may not read it."""

    async def namespaces(self, pool: Pool) -> list[Namespace]:
        """The namespaces of a pool without the default one, by name."""

    async def namespace(self, pool: Pool, name: str) -> Namespace:
        """One of them by name: ENOENT if there is none."""

    async def image_names(self, namespace: Namespace) -> dict[str, ImageRef]:
        """All images of a namespace, by name."""

    async def image(self, namespace: Namespace, name: str) -> ImageRef:
        """One image by name: ENOENT if there is none."""

    async def snapshots(self, image: ImageRef) -> dict[str, ImageRef]:
        """The snapshots that users made of an image, by name, the oldest first: ENOENT if the image is gone.

        Of a broken image there are none.
        """

    async def snapshot(self, image: ImageRef, name: str) -> ImageRef:
        """One of them by name: ENOENT if there is none."""

    async def stat(self, image: ImageRef) -> ImageStat:
        """ENOENT if the image is gone. One that is broken, named by its pool but without a header, has a byte."""

    async def stat_all(self, images: Iterable[ImageRef]) -> Mapping[ImageRef, ImageStat | None]:
        """The facts of many images, asked for at once. Those that are gone are left out; None is for those that the
        cluster could not tell of."""

    async def changed_ns(self, namespace: Namespace) -> int | None:
        """When an image of a namespace was last made, renamed or removed, in nanoseconds since the epoch; None if there
        never was any."""

    async def attribute_names(self, image: ImageRef) -> list[str]:
        """What `attribute` can be asked of an image or a snapshot: its facts, and `meta.KEY` for its own metadata."""

    async def attribute(self, image: ImageRef, name: str) -> str:
        """One of them, in the words of the `rbd` command: ENODATA if there is none of that name."""

    async def usage(self) -> Usage:
        """How full the cluster is."""
