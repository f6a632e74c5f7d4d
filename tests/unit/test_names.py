"""Every name that RBD takes has a file name, and each of those stands for one name only."""

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rbdfs.fuse.names import NAME_BYTES, SEPARATOR, SNAP, decode, encode, is_abbreviated

ANY_BYTES = st.binary(max_size=300).map(os.fsdecode)
"""RBD takes any bytes."""
LIKELY = st.text("%/@.~snap2F5e\0é\n ", max_size=12)
"""Where mistakes would show."""
LONG = st.builds(
    lambda begin, count, end: begin * count + end, st.text(min_size=1, max_size=3), st.integers(1, 300), LIKELY
)
NAMES = st.one_of(ANY_BYTES, LIKELY, LONG)


def is_file_name(text: str) -> bool:
    """Whether the kernel, and the C library, take it."""
    data = os.fsencode(text)
    return 0 < len(data) <= NAME_BYTES and not {0, ord("/")} & set(data) and text not in {".", ".."}


@given(NAMES)
@example("")
@example(".snap")
@example("%2F")
@example("é" * 128)
def test_each_name_has_a_file_name_that_leads_back_to_it(name: str) -> None:
    file_name = encode(name)
    assert is_file_name(file_name)
    assert is_abbreviated(file_name) or decode(file_name) == name
    assert os.fsdecode(os.fsencode(file_name)) == file_name


@given(NAMES)
def test_no_file_name_is_taken_for_the_snapshot_of_an_image_or_for_the_hidden_directory(name: str) -> None:
    assert SEPARATOR not in encode(name)
    assert encode(name) != SNAP


@given(NAMES, NAMES)
def test_two_names_never_have_the_same_file_name(one: str, other: str) -> None:
    assert (encode(one) == encode(other)) == (one == other)


@given(NAMES)
def test_each_file_name_stands_for_one_name_and_no_name_has_a_second_one(file_name: str) -> None:
    name = decode(file_name)
    assert name is None or encode(name) == file_name


@pytest.mark.parametrize(
    ("name", "file_name"),
    [
        ("vm1", "vm1"),
        (".hidden", ".hidden"),
        ("new\nline and space", "new\nline and space"),
        ("a/b", "a%2Fb"),
        ("a@b", "a%40b"),
        ("100%", "100%25"),
        (".", "%2E"),
        ("..", "%2E."),
        (".snap", "%2Esnap"),
        ("...", "..."),
        (".snapshot", ".snapshot"),
        ("", "%"),
        ("x" * 255, "x" * 255),
        ("\udcff", "\udcff"),
    ],
)
def test_only_what_must_be_is_escaped(name: str, file_name: str) -> None:
    assert encode(name) == file_name
    assert decode(file_name) == name


def test_a_long_name_is_its_beginning_and_a_hash_of_all_of_it() -> None:
    one, other = encode("é/" * 200 + "1"), encode("é/" * 200 + "2")
    assert one.startswith("é%2Fé%2F")
    assert one != other
    assert one[:-32] == other[:-32]
    assert decode(one) is None
    assert is_abbreviated(one)


@pytest.mark.parametrize("file_name", ["", ".", "..", ".snap", "%2f", "%41", "a%", "%2", "x" * 256, "a@b"])
def test_other_spellings_stand_for_nothing(file_name: str) -> None:
    assert decode(file_name) is None
