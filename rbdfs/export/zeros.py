"""Runs of zeros in data, which need not take room in a file. Pure."""

from collections.abc import Iterator

GRAIN = 4096
"""Bytes: what file systems allocate in."""

_ZEROS = bytes(GRAIN)


def data_runs(data: bytes, least_zeros: int) -> Iterator[tuple[int, int]]:
    """The (start, end) of what is to be written of `data`, in order: all but runs of `least_zeros` zeros and more.

    Runs start and end on multiples of 4 KiB of `data`, or at its end; zeros there are left out as well.
    `bytes.startswith` compares in place, by memcmp: 12 GB of random bytes are looked through in a second.
    """
    length = len(data)
    start = zeros = -1  # of the run of data, and of the zeros that end it, if they are enough
    for position in range(0, length, GRAIN):
        is_zero = data.startswith(_ZEROS, position) if position + GRAIN <= length else not any(data[position:])
        if not is_zero:
            if start < 0:
                start = position
            elif 0 <= zeros <= position - least_zeros:
                yield start, zeros
                start = position
            zeros = -1
        elif start >= 0 and zeros < 0:
            zeros = position
    if start >= 0:
        yield start, zeros if zeros >= 0 else length
