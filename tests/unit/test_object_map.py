"""The arithmetic of object maps. What real ones say is compared with `rbd du` in mount/test_sparse.py."""

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbdfs.ceph.bindings.encoding import MalformedError
from rbdfs.ceph.metadata.object_map import ObjectSet, decode

STATES = st.lists(st.integers(0, 3), max_size=40)


def encoded(states: list[int], version: int = 1, readable_as: int = 1, more: bytes = b"") -> bytes:
    """As `ceph::BitVector<2>` does it; a newer version of its header may have more."""
    header = struct.pack("<BBIQ", version, readable_as, 8 + len(more), len(states)) + more
    data = bytearray(-(-len(states) // 4))
    for number, state in enumerate(states):
        data[number // 4] |= state << (6 - 2 * (number % 4))
    return struct.pack("<I", len(header)) + header + bytes(data) + b"\0\0\0\0"


@given(STATES)
def test_all_that_is_not_nonexistent_is_counted(states: list[int]) -> None:
    assert decode(encoded(states)).count == sum(state != 0 for state in states)


@given(STATES, STATES, st.integers(0, 40))
def test_a_parent_shows_through_as_far_as_it_overlaps(child: list[int], parent: list[int], overlap: int) -> None:
    shown = min(overlap, len(child))
    expected = sum(
        state != 0 or (number < min(shown, len(parent)) and parent[number] != 0) for number, state in enumerate(child)
    )
    assert decode(encoded(child)).over(decode(encoded(parent)), shown).count == expected


@given(STATES, st.integers(0, 45), st.integers(0, 45))
def test_runs_are_the_objects_that_hold_data_as_few_ranges_as_can_be(states: list[int], first: int, last: int) -> None:
    runs = decode(encoded(states)).runs(first, last)
    held = [number for start, end in runs for number in range(start, end)]
    assert held == [number for number in range(first, min(last, len(states))) if states[number]]
    assert all(before[1] < after[0] for before, after in pairwise(runs))


def test_a_map_that_ceph_wrote_is_understood() -> None:
    assert decode(bytes.fromhex("0e0000000101080000000a0000000000000044001000000000")).count == 3


@given(STATES, st.binary(max_size=20))
def test_a_header_of_a_newer_version_is_read_as_far_as_we_know_it(states: list[int], more: bytes) -> None:
    assert decode(encoded(states, version=2, more=more)) == decode(encoded(states))


def test_what_only_newer_readers_can_read_is_not_read() -> None:
    with pytest.raises(MalformedError):
        decode(encoded([1], version=2, readable_as=2))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 100))
def test_a_map_that_was_cut_off_is_malformed(states: list[int], kept: int) -> None:
    whole = encoded(states).removesuffix(bytes(4))
    with pytest.raises(MalformedError):
        decode(whole[: min(kept, len(whole) - 1)])


@given(st.binary(max_size=60))
def test_random_bytes_are_a_map_or_malformed(data: bytes) -> None:
    try:
        found = decode(data)
    except MalformedError:
        return
    assert 0 <= found.count <= found.slots <= 4 * len(data)


@given(STATES, st.data())
def test_what_stands_in_a_header_never_has_more_objects_counted_than_there_are_bytes(
    states: list[int], data: st.DataObject
) -> None:
    changed = bytearray(encoded(states))
    changed[data.draw(st.integers(0, 17))] = data.draw(st.integers(0, 255))
    found: ObjectSet | None = None
    try:
        found = decode(bytes(changed))
    except MalformedError:
        return
    assert found.slots <= 4 * len(changed)
