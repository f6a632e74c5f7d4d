"""The arithmetic of object maps. What real ones say is compared with `rbd du` in test_mount_sparse.py."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from rbdfs.ceph.object_map import decode

STATES = st.lists(st.integers(0, 3), max_size=40)


def encoded(states: list[int]) -> bytes:
    """As `ceph::BitVector<2>` does it."""
    header = struct.pack("<BBIQ", 1, 1, 8, len(states))
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


def test_a_map_that_ceph_wrote_is_understood() -> None:
    assert decode(bytes.fromhex("0e0000000101080000000a0000000000000044001000000000")).count == 3
