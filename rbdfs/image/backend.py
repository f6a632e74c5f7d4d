"""What an open image needs of the cluster. ceph/image/ceph_image.py fulfils it, and a fake for tests."""

from collections.abc import Awaitable, Callable, Hashable
from typing import Protocol

from rbdfs.errors import RbdfsError, StaleError

Buffer = bytes | memoryview
ReadResult = Buffer | RbdfsError
OnRead = Callable[[ReadResult], None]
"""Takes the result of a read, in the trio thread. Must not raise."""


class ImageBackend(Protocol):
    """An image (HEAD or snapshot) that is open in the cluster."""

    object_size: int
    """Bytes. The three that make the image's layout never change while it is open."""
    stripe_unit: int
    """Bytes; the object size, without fancy striping."""
    stripe_count: int
    """Objects; 1 without fancy striping."""
    size: int
    """Bytes, as of the last answer of the cluster. That of a HEAD changes."""
    write_version: int | None
    """A number that changes if anybody may have written to the image, as of when it was opened or revalidated; None if
    nobody can tell: then each open() must read from the cluster."""
    revalidate_due: bool
    """Whether a reader that is served from a cache must call `revalidate_soon` first."""

    @property
    def pool(self) -> Hashable:
        """The id of its pool: all reads of one pool share their limits."""

    @property
    def is_immutable(self) -> bool:
        """Whether its bytes and its size never change again: a snapshot that nobody can be filling.

        What was read before it became immutable may be wrong."""

    @property
    def has_map(self) -> bool:
        """Whether `extents` answers from an object map, in milliseconds."""

    @property
    def stale(self) -> StaleError | None:
        """The error if the image is known to be gone. It does not come back."""

    def start_read(self, offset: int, length: int, callback: OnRead) -> None:
        """Start to read `length` bytes at the image offset `offset`.

        `callback` is called once, later, in the trio thread, with exactly `length` bytes or with an error, never with
        less. Zeros are what the image holds: if it was removed or shrunk, the error is StaleError or BeyondEndError. A
        read cannot be cancelled. Never raises.
        """

    def revalidate_soon(self) -> None:
        """Raise StaleError once the image is known to be gone; else start a check in the background.

        Afterwards `revalidate_due` is False for about a second; of an image that is gone it stays True.
        """

    async def revalidate(self) -> None:
        """Make all reads, seeks and sizes from now on see what was done before this call, and ask for `write_version`.

        Raises RbdfsError, StaleError if the image is gone.
        """

    async def verify(self) -> None:
        """Ask the cluster whether the image is still there. Raises RbdfsError, StaleError if it is gone."""

    async def refresh_size(self) -> int:
        """Ask the cluster for the size. Bytes; raises RbdfsError, StaleError if the image is gone."""

    async def extents_window(self) -> int:
        """Return for how many bytes to ask `extents` at once, so that its answer takes milliseconds."""

    async def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return where a range holds data, its parent's included, as (image offset, length) pairs; the rest is zeros.

        When in doubt, it is data. Raises RbdfsError.
        """

    async def close(self) -> None:
        """Wait for reads in flight, then close the image and its watch. Does not raise."""


OpenBackend = Callable[[], Awaitable[ImageBackend]]
"""Opens one image in the cluster. Raises RbdfsError with the errno that an open() of the file should get."""
