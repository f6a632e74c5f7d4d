"""What an open image needs of the cluster, and no more. `ceph/image.py` has the real one, the tests a fake."""

import ctypes
from collections.abc import Awaitable, Callable
from typing import Protocol

from rbdfs.errors import RbdfsError
from rbdfs.shortcut import RawImage, Shortcut

Buffer = bytes | bytearray | memoryview
Data = bytes | ctypes.Array[ctypes.c_ubyte]
"""What was read: either has a length, bytes by index as numbers, an address for ctypes, and `view`."""
ReadResult = Data | RbdfsError
OnComplete = Callable[[ReadResult], None]


def view(data: Data) -> memoryview:
    """The bytes, in place; keeps them alive."""
    return memoryview(data).cast("B")


class ImageSource(Protocol):
    """An image (HEAD or snapshot) that is open in the cluster."""

    object_size: int
    """Bytes. The three that make the image's layout never change while it is open."""
    stripe_unit: int
    """Bytes; the object size, without fancy striping."""
    stripe_count: int
    """Objects; 1 without fancy striping."""
    size: int
    """Bytes, as last heard of the cluster. A HEAD's changes."""
    is_constant: bool
    """Whether nothing of it ever changes, neither bytes nor size: a snapshot."""

    def aio_read(self, offset: int, length: int, oncomplete: OnComplete) -> None:
        """Start to read `length` bytes at the image offset `offset`.

        `oncomplete` is called once, later, in the trio thread, with exactly `length` bytes or with an error, never
        with less. Zeros are what the image holds, never what is left of an image or a snapshot that was removed or
        shrunk: then it is StaleError or BeyondEndError. What was started cannot be cancelled. Never raises.
        """

    def heed(self) -> None:
        """To be called at each read that is answered without asking: raises StaleError once the image is known to be
        gone. Asks for that behind the caller's back, every so often."""

    async def verify(self) -> None:
        """Ask the cluster whether the image is still there. Raises RbdfsError, StaleError where it is gone."""

    async def refresh(self) -> int:
        """Ask the cluster for the size. Bytes; raises RbdfsError, StaleError where the image is gone."""

    async def extents_window(self) -> int:
        """How many bytes `extents` should be asked for at once, so that its answer takes milliseconds."""

    async def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Where a range holds data, its parent's included, as (image offset, length) pairs; all else reads as zeros.

        What is in doubt is data. Raises RbdfsError.
        """

    async def write_version(self) -> int | None:
        """A number that stays the same as long as nobody can have written to the image.

        None where that cannot be known: each open must then read afresh.
        """

    async def shorten(self, make: Callable[[RawImage], Shortcut]) -> Shortcut | None:
        """A shortcut to the image's data, made by `make` if there is none yet.

        The source opens it for as long as reads need no look at the image, and closes it for good when it is closed
        itself, or when the size has changed. None where bytes alone are never an answer. Raises RbdfsError.
        """

    def settle(self, offset: int, length: int, result: int, data: bytes, oncomplete: OnComplete) -> None:
        """As `aio_read`, for a read that a shortcut has made: `result` is librbd's, bytes or a negative errno."""

    async def close(self) -> None:
        """Wait for reads in flight, then give the image and its watch back. Does not raise."""


Connector = Callable[[], Awaitable[ImageSource]]
"""Opens one image in the cluster anew. Raises RbdfsError with the errno that an open() of the file should get."""
