"""The one reader of all that Ceph encodes keeps its bounds."""

import struct

import pytest

from rbdfs.ceph.bindings.encoding import MalformedError, Reader


def test_a_structure_is_not_read_past_its_end_and_the_next_value_is_found_behind_it() -> None:
    reader = Reader(struct.pack("<BBIHB", 7, 1, 2, 0x0102, 9))
    version, inside = reader.structure(known=1)
    assert version == 7
    assert inside.u8() == 2
    with pytest.raises(MalformedError):
        inside.u64()
    assert inside.u8() == 1
    with pytest.raises(MalformedError):
        inside.u8()
    assert reader.u8() == 9


def test_a_structure_in_another_ends_where_that_one_does_at_the_latest() -> None:
    inner = struct.pack("<BBI", 1, 1, 5)
    _, outer = Reader(struct.pack("<BBI", 1, 1, len(inner)) + inner + b"after").structure(known=1)
    with pytest.raises(MalformedError):
        outer.structure(known=1)
