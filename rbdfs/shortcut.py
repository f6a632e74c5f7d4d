"""Reads without Python: what the cluster's side opens for them, and what the kernel's side makes of it."""

from typing import NamedTuple, Protocol


class RawImage(NamedTuple):
    """An image that is open, for reads by C calls alone: librbd's functions and its image, all by address."""

    image: int
    """A `rbd_image_t`."""
    create_completion: int
    aio_read: int
    get_return_value: int
    release: int
    size: int
    """Bytes."""
    object_size: int
    """Bytes; without fancy striping."""
    is_constant: bool


class Shortcut(Protocol):
    """A way from the kernel to one image by C calls alone, for the scattered reads of files that are open on it."""

    def open(self, seconds: float) -> None:
        """Reads may begin, and of a snapshot be answered, for so long from now; none if that is not positive."""

    @property
    def in_flight(self) -> int:
        """Reads that librbd has not answered yet."""

    @property
    def answered(self) -> int:
        """Reads that took it to the end so far."""

    def begin(self, handle: int) -> None:
        """An open file takes this way, until `end`. Raises RbdfsError."""

    def end(self, handle: int) -> None:
        """Before the file is closed."""
