"""The model's own rules, without a cluster."""

import pytest

from tests.model.reference import BLOCK_BYTES, Descriptor, Image, Place, Readable, Reference, Spec

OLD, NEW = b"o" * BLOCK_BYTES, b"n" * BLOCK_BYTES


@pytest.fixture
def written() -> Descriptor:
    """Opened when there were three old blocks; then the second was written, and the third, which is old again now."""
    readable = Readable(OLD * 3, 0)
    descriptor = Descriptor(readable)
    readable.write(BLOCK_BYTES, NEW * 2, 1)
    readable.write(2 * BLOCK_BYTES, OLD, 2)
    return descriptor


@pytest.mark.parametrize("data", [OLD * 3, OLD + NEW + OLD, OLD + NEW * 2, OLD * 2 + NEW])
def test_each_block_may_be_of_another_time_since_the_open(written: Descriptor, data: bytes) -> None:
    assert written.wrong_read(0, len(data), data) is None


@pytest.mark.parametrize("data", [NEW + OLD * 2, bytes(BLOCK_BYTES) + OLD * 2, OLD * 2, OLD * 2 + NEW[:-1] + b"o"])
def test_what_never_was_there_and_short_reads_are_wrong(written: Descriptor, data: bytes) -> None:
    assert written.wrong_read(0, 3 * BLOCK_BYTES, data)


def test_what_was_there_before_the_open_is_wrong(written: Descriptor) -> None:
    later = Descriptor(written.readable)
    assert later.wrong_read(0, 3 * BLOCK_BYTES, OLD + NEW + OLD) is None
    assert later.wrong_read(0, 3 * BLOCK_BYTES, OLD * 3)


def test_a_hole_may_be_where_zeros_were_at_some_time_since_the_open() -> None:
    readable = Readable(OLD + bytes(BLOCK_BYTES), 0)
    descriptor = Descriptor(readable)
    readable.write(BLOCK_BYTES, NEW, 1)
    assert descriptor.wrong_holes([(BLOCK_BYTES, 2 * BLOCK_BYTES)]) is None
    assert descriptor.wrong_holes([(0, BLOCK_BYTES)])
    assert Descriptor(readable).wrong_holes([(BLOCK_BYTES, 2 * BLOCK_BYTES)])


def test_a_name_was_anothers_for_as_long_as_the_kernel_may_think_so() -> None:
    reference, spec = Reference(), Spec(Place("rbd"), "a")
    first, second = Image(b"", 0), Image(b"", 0)
    reference.bind(spec, first, 10)
    reference.bind(spec, None, 20)
    reference.bind(spec, second, 30)
    assert reference.bound(spec, 31) == {second}
    assert reference.bound(spec, 25) == {second, None}
    assert reference.bound(spec, 15) == {first, second, None}
