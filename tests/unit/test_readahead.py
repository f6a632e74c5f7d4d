"""What is read ahead, and what is not."""

import itertools
import random

import pytest

from rbdfs.image.readahead import RANDOM_READS, SKIP_BYTES_MAX, STREAMS, WINDOW_BYTES, Readahead
from rbdfs.image.striper import MIB

KIB = 1024
TRANSFER = 4 * MIB
SIZE = 2048 * MIB


def unlimited() -> int:
    return SIZE


def run(reads: list[tuple[int, int]], size: int = SIZE) -> list[tuple[int, int]]:
    """The ranges that a list of (offset, length) has read ahead."""
    readahead = Readahead(TRANSFER)
    ranges = [readahead.on_read(offset, length, size, unlimited) for offset, length in reads]
    return [found for found in ranges if found]


def sequence(start: int, length: int, count: int) -> list[tuple[int, int]]:
    return [(start + i * length, length) for i in range(count)]


@pytest.mark.parametrize("length", [512, 4 * KIB, 128 * KIB, MIB])
def test_a_sequential_reader_has_a_full_window_ahead_of_it_and_each_byte_once(length: int) -> None:
    ranges = run(sequence(0, length, 32 * MIB // length))
    assert ranges[-1][1] >= 32 * MIB + WINDOW_BYTES - TRANSFER
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))


def test_the_first_read_alone_reads_nothing_ahead() -> None:
    assert run([(0, 128 * KIB)]) == []


def test_the_second_read_in_a_row_reads_one_transfer_ahead() -> None:
    assert run(sequence(0, 128 * KIB, 2)) == [(128 * KIB, 2 * TRANSFER)]


def test_ranges_end_at_transfers_or_at_the_end_of_the_image() -> None:
    size = 50 * MIB + 7
    ranges = run(sequence(0, MIB, 50), size)
    assert all(end % TRANSFER == 0 or end == size for _, end in ranges)
    assert ranges[-1][1] == size


@pytest.mark.parametrize("size", [64 * MIB, SIZE])
def test_small_random_reads_are_not_read_ahead_for(size: int) -> None:
    chance = random.Random(7)
    reads = [(chance.randrange(size // 4096) * 4096, 4096) for _ in range(2000)]
    assert len(run(reads, size)) <= 2


def test_a_random_reader_is_known_by_reads_that_are_near_no_other() -> None:
    readahead, chance = Readahead(4 * MIB), random.Random(7)
    for _ in range(RANDOM_READS):
        assert not readahead.is_random
        readahead.on_read(chance.randrange(SIZE // 4096) * 4096, 4096, SIZE, lambda: SIZE)
    assert readahead.is_random
    readahead.on_read(SIZE // 2, 4096, SIZE, lambda: SIZE)
    readahead.on_read(SIZE // 2 + 4096, 4096, SIZE, lambda: SIZE)
    assert not readahead.is_random


def test_a_reader_that_goes_backwards_is_not_read_ahead_for() -> None:
    assert run(sequence(0, 128 * KIB, 400)[::-1]) == []


@pytest.mark.parametrize("distance", [2, 4, 8])
def test_requests_that_the_kernel_reorders_are_one_sequential_reader(distance: int) -> None:
    reads = sequence(0, 128 * KIB, 512)
    shuffled = [read for i in range(0, len(reads), distance) for read in reads[i : i + distance][::-1]]
    ranges = run(shuffled)
    assert ranges[-1][1] >= 64 * MIB + WINDOW_BYTES - TRANSFER
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))


def test_small_skips_forth_stay_one_stream() -> None:
    assert run([(i * 192 * KIB, 128 * KIB) for i in range(400)])[-1][1] >= 60 * MIB + WINDOW_BYTES


def test_after_a_seek_the_second_read_reads_ahead_again() -> None:
    far = 1024 * MIB
    ranges = run(sequence(0, MIB, 16) + sequence(far, MIB, 2))
    assert ranges[-1] == (far + MIB, far + 12 * MIB)


def test_several_sequential_readers_of_one_file_are_told_apart() -> None:
    readahead = Readahead(TRANSFER)
    ends = dict.fromkeys(range(STREAMS), 0)
    for step in range(32):
        for stream in range(STREAMS):
            found = readahead.on_read(stream * 256 * MIB + step * MIB, MIB, SIZE, unlimited)
            if found:
                ends[stream] = found[1]
    assert readahead.sequential_streams == STREAMS
    assert all(end >= min(SIZE, stream * 256 * MIB + 32 * MIB + WINDOW_BYTES) for stream, end in ends.items())


def test_the_limit_bounds_the_window() -> None:
    readahead = Readahead(TRANSFER)
    ends = [readahead.on_read(i * MIB, MIB, SIZE, lambda: 8 * MIB) for i in range(64)]
    assert max(end[1] - i * MIB for i, end in enumerate(ends) if end) <= MIB + 8 * MIB + TRANSFER


def test_a_limit_below_one_transfer_reads_nothing_ahead() -> None:
    readahead = Readahead(TRANSFER)
    assert [readahead.on_read(i * MIB, MIB, SIZE, lambda: TRANSFER - 1) for i in range(8)] == [None] * 8


def test_a_read_far_ahead_of_the_stream_is_another_stream() -> None:
    assert run([(0, MIB), (MIB + SKIP_BYTES_MAX + 8 * MIB, MIB)]) == []


def test_latency_that_stalls_a_sequential_reader_widens_the_window_up_to_the_limit() -> None:
    readahead = Readahead(TRANSFER)
    end = 0
    for step in range(64):
        readahead.on_wait(0.05)
        found = readahead.on_read(step * MIB, MIB, SIZE, lambda: 120 * MIB)
        end = found[1] if found else end
    assert 64 * MIB + 120 * MIB <= end <= 64 * MIB + 120 * MIB + TRANSFER


def test_short_waits_and_random_readers_leave_the_window_as_it_is() -> None:
    readahead = Readahead(TRANSFER)
    readahead.on_wait(5.0)
    for step in range(32):
        readahead.on_read(step * MIB, MIB, SIZE, unlimited)
        readahead.on_wait(0.005)
    assert readahead.window == WINDOW_BYTES
