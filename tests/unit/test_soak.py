"""The soak itself tells right from wrong."""

from pathlib import Path

import pytest

from tests.cluster import MIB
from tests.soak.blocks import BLOCK_BYTES, UNWRITTEN, content, garbage, wrong_blocks
from tests.soak.fixed import compare
from tests.soak.gauge import Sample
from tests.soak.ledger import WrongError, errnos_in


def test_a_block_may_be_as_new_as_a_write_that_has_begun_and_no_older_than_one_that_has_ended() -> None:
    oldest, newest = [3, UNWRITTEN, 5, 7], [4, 2, 5, 9]
    for generations in (oldest, newest, [4, UNWRITTEN, 5, 8]):
        assert wrong_blocks(content(generations), oldest, newest) == []
    assert wrong_blocks(content([2, 2, 6, UNWRITTEN]), oldest, newest) == [
        "block 0 is generation 2, not 3 to 4",
        "block 2 is generation 6, not 5 to 5",
        "block 3 is zeros, not 7 to 9",
    ]


def test_a_block_of_another_place_and_one_with_a_wrong_bit_are_garbage() -> None:
    data = bytearray(content([1, 2, 3, 4]))
    data[BLOCK_BYTES : 2 * BLOCK_BYTES] = data[2 * BLOCK_BYTES : 3 * BLOCK_BYTES]
    data[-1] ^= 1
    assert garbage(bytes(data)) == [1, 3]
    assert len(wrong_blocks(bytes(data), [1, 2, 3, 4], [9, 9, 9, 9])) == 2


def test_a_copy_with_a_wrong_byte_or_a_wrong_size_is_wrong(tmp_path: Path) -> None:
    copy, reference = tmp_path / "copy", tmp_path / "reference"
    reference.write_bytes(content([1, 2, 3]))
    copy.write_bytes(content([1, 2, 3]))
    assert compare("cp", copy, reference) == 3 * BLOCK_BYTES
    for wrong in (content([1, 4, 3]), content([1, 2])):
        copy.write_bytes(wrong)
        with pytest.raises(WrongError, match="cp: "):
            compare("cp", copy, reference)


def test_errors_are_known_by_what_programs_call_them() -> None:
    assert errnos_in("dd: error reading 'x': Connection timed out") == {"ETIMEDOUT"}
    assert errnos_in("read /x: input/output error") == {"EIO"}
    assert errnos_in("nothing is wrong") == set()


def test_a_mount_that_has_grown_is_noticed() -> None:
    begin = Sample(100 * MIB, 40, 30)
    assert Sample(120 * MIB, 42, 31).grown_since(begin) == []
    assert len(Sample(200 * MIB, 60, 50).grown_since(begin)) == 3
