"""Which blocks of an image the object cache holds anything of: for those who must not look into the cache itself."""

from array import array

BLOCK_BYTES = 64 * 1024
_COUNTS = 1 << 16


class HeldBlocks:
    """For each block, how many fetches of the cache touch it, read or being read.

    Blocks that are 4 GiB apart share a count: one that is not 0 says little, 0 says that nothing is held.
    """

    def __init__(self) -> None:
        self.counts = array("I", bytes(4 * _COUNTS))

    def add(self, offset: int, length: int) -> None:
        """The cache holds these bytes of the image from now on."""
        self._count(offset, length, 1)

    def remove(self, offset: int, length: int) -> None:
        """What was added with the same numbers is held no more."""
        self._count(offset, length, -1)

    def _count(self, offset: int, length: int, step: int) -> None:
        counts = self.counts
        for block in range(offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES + 1):
            counts[block % _COUNTS] += step
