"""What an open image needs of the cluster, and no more. ceph/image/ceph_image.py has the real one, tests a fake."""

from collections.abc import Awaitable, Callable, Hashable
from typing import Protocol

from rbdfs.errors import RbdfsError, StaleError

Buffer = bytes | memoryview
ReadResult = Buffer | RbdfsError
OnRead = Callable[[ReadResult], None]
"""Takes what a read gave, in the trio thread. Must not raise."""


class ImageBackend(Protocol):
    """An image (HEAD or snapshot) that is open in the cluster."""

    object_size: int
    """Bytes. The three that make the image's layout never change while it is open."""
    stripe_unit: int
    """Bytes; the object size, without fancy striping."""
    stripe_count: int
    """Objects; 1 without fancy striping."""
    size: int
    """Bytes, as last heard of the cluster. A HEAD's changes."""
    write_version: int | None
    """A number that stays the same as long as nobody can have written to the image, as of when it was opened or brought
    up to date; None if that cannot be known: each open must then read afresh."""
    revalidate_due: bool
    """Whether who answers from a cache must call `revalidate_soon` first."""

    @property
    def pool(self) -> Hashable:
        """What its reads share their limits with: the id of its pool."""

    @property
    def is_immutable(self) -> bool:
        """Whether nothing of it ever changes any more, neither bytes nor size: a snapshot that nobody can be filling.
        What was read of it before may be wrong, unless it was immutable by then."""

    @property
    def has_map(self) -> bool:
        """Whether `extents` answers from an object map, in milliseconds."""

    @property
    def stale(self) -> StaleError | None:
        """That the image is known to be gone. It does not come back."""

    def start_read(self, offset: int, length: int, callback: OnRead) -> None:
        """Start to read `length` bytes at the image offset `offset`.

        `callback` is called once, later, in the trio thread, with exactly `length` bytes or with an error, never with
        less. Zeros are what the image holds, never what is left of an image or a snapshot that was removed or shrunk:
        then it is StaleError or BeyondEndError. What was started cannot be cancelled. Never raises.
        """

    def revalidate_soon(self) -> None:
        """Raise StaleError once the image is known to be gone; else start a check in the background.

        Afterwards `revalidate_due` is False for about a second; of an image that is gone it stays True.
        """

    async def revalidate(self) -> None:
        """Have all reads, seeks and sizes from now on see what was done before this call, and ask for `write_version`.

        Raises RbdfsError, StaleError if the image is gone.
        """

    async def verify(self) -> None:
        """Ask the cluster whether the image is still there. Raises RbdfsError, StaleError if it is gone."""

    async def refresh_size(self) -> int:
        """Ask the cluster for the size. Bytes; raises RbdfsError, StaleError if the image is gone."""

    async def extents_window(self) -> int:
        """How many bytes `extents` should be asked for at once, so that its answer takes milliseconds."""

    async def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Where a range holds data, its parent's included, as (image offset, length) pairs; the rest reads as zeros.

        When in doubt, it is data. Raises RbdfsError.
        """

    async def close(self) -> None:
        """Wait for reads in flight, then give the image and its watch back. Does not raise."""


OpenBackend = Callable[[], Awaitable[ImageBackend]]
"""Opens one image in the cluster. Raises RbdfsError with the errno that an open() of the file should get."""
