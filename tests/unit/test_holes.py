"""The map of holes, against a model that knows each byte."""

from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from rbdfs.image import holes as holes_module
from rbdfs.image.holes import HoleMap, Kind

SIZE = 64
EXTENTS = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, 20)), max_size=8)
LESSONS = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE), EXTENTS), max_size=6)


def taught(lessons: list[tuple[int, int, list[tuple[int, int]]]]) -> tuple[HoleMap, list[Kind]]:
    """A map and a model that were told the same."""
    holes, model = HoleMap(SIZE), [Kind.UNKNOWN] * SIZE
    for start, length, data in lessons:
        end = min(SIZE, start + length)
        holes.learn(start, end, data)
        for position in range(start, end):
            inside = any(offset <= position < offset + count for offset, count in data)
            model[position] = Kind.DATA if inside else Kind.HOLE
    return holes, model


@given(LESSONS)
def test_every_byte_is_what_was_last_said_of_it(lessons: list[tuple[int, int, list[tuple[int, int]]]]) -> None:
    holes, model = taught(lessons)
    assert [holes.at(position).kind for position in range(SIZE)] == model
    for position in range(SIZE):
        segment = holes.at(position)
        assert segment.start <= position < segment.end
        assert {model[i] for i in range(segment.start, segment.end)} == {segment.kind}


@given(LESSONS, st.integers(0, SIZE), st.sampled_from([Kind.DATA, Kind.HOLE]))
def test_what_is_found_is_the_first_of_its_kind_or_unknown(
    lessons: list[tuple[int, int, list[tuple[int, int]]]], offset: int, kind: Kind
) -> None:
    holes, model = taught(lessons)
    expected = next((i for i in range(offset, SIZE) if model[i] in (kind, Kind.UNKNOWN)), None)
    found = holes.find(offset, kind)
    assert (None if found is None else max(offset, found.start)) == expected


def test_nothing_is_known_of_an_image_at_first_and_an_empty_one_has_neither() -> None:
    assert HoleMap(10).at(3) == (0, 10, Kind.UNKNOWN)
    assert HoleMap(0).find(0, Kind.DATA) is None


@given(LESSONS)
def test_ranks_count_what_is_not_known_to_be_hole_and_lead_back_to_it(
    lessons: list[tuple[int, int, list[tuple[int, int]]]],
) -> None:
    holes, model = taught(lessons)
    present = [position for position in range(SIZE) if model[position] is not Kind.HOLE]
    assert holes.has_holes == (len(present) < SIZE)
    assert [holes.rank(position) for position in range(SIZE + 1)] == [
        sum(kind is not Kind.HOLE for kind in model[:position]) for position in range(SIZE + 1)
    ]
    for start in range(0, len(present) + 1, 5):
        for end in range(start, len(present) + 1, 7):
            found = [position for first, last in holes.present(start, end) for position in range(first, last)]
            assert found == present[start:end]


@given(LESSONS)
def test_of_too_many_segments_only_what_was_learned_last_is_known(
    lessons: list[tuple[int, int, list[tuple[int, int]]]],
) -> None:
    with mock.patch.object(holes_module, "SEGMENTS_MAX", 6):
        holes, model = taught(lessons)
    kinds = [holes.at(position).kind for position in range(SIZE)]
    assert all(kind in (known, Kind.UNKNOWN) for kind, known in zip(kinds, model, strict=True))
    if lessons:
        start, length, data = lessons[-1]
        end = min(SIZE, start + length)
        assert kinds[start:end] == model[start:end]
        assert holes.segments <= max(6, 2 * len(data) + 3)
