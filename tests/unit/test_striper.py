"""The arithmetic of layouts, against a model that places each byte by itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbdfs.image.striper import Layout, extent_to_file, file_to_extents

LAYOUTS = st.builds(
    lambda unit, per_object, count: Layout(unit * per_object, unit, count),
    unit=st.sampled_from([1, 2, 4, 16]),
    per_object=st.sampled_from([1, 2, 4, 8]),
    count=st.integers(1, 5),
)


def place(layout: Layout, position: int) -> tuple[int, int]:
    """Where one byte lies, as the documentation of RBD's striping tells it: (object number, offset)."""
    block, offset = divmod(position, layout.stripe_unit)
    stripe, column = divmod(block, layout.stripe_count)
    object_set, row = divmod(stripe, layout.object_size // layout.stripe_unit)
    return object_set * layout.stripe_count + column, row * layout.stripe_unit + offset


@given(LAYOUTS, st.integers(0, 500), st.integers(0, 300))
def test_every_byte_of_a_range_is_where_the_model_places_it(layout: Layout, offset: int, length: int) -> None:
    placed = [
        (extent.object_no, extent.offset + i, extent.image_offset + i)
        for extent in file_to_extents(layout, offset, length)
        for i in range(extent.length)
    ]
    assert placed == [(*place(layout, position), position) for position in range(offset, offset + length)]


@given(LAYOUTS, st.integers(0, 500), st.integers(0, 300))
def test_extent_to_file_undoes_file_to_extents(layout: Layout, offset: int, length: int) -> None:
    for extent in file_to_extents(layout, offset, length):
        assert list(extent_to_file(layout, extent.object_no, extent.offset, extent.length)) == [
            (extent.image_offset, extent.length)
        ]


@given(LAYOUTS, st.integers(0, 20))
def test_a_whole_object_is_whole_in_the_image(layout: Layout, object_no: int) -> None:
    ranges = list(extent_to_file(layout, object_no, 0, layout.object_size))
    placed = [place(layout, position) for offset, length in ranges for position in range(offset, offset + length)]
    assert placed == [(object_no, offset) for offset in range(layout.object_size)]


def test_without_striping_an_extent_ends_only_at_objects() -> None:
    extents = list(file_to_extents(Layout.of_objects(4096), 4000, 5000))
    assert [(extent.object_no, extent.offset, extent.length) for extent in extents] == [
        (0, 4000, 96),
        (1, 0, 4096),
        (2, 0, 808),
    ]


@pytest.mark.parametrize(
    ("layout", "fetch_bytes"),
    [
        (Layout.of_objects(4 << 20), 4 << 20),
        (Layout.of_objects(32 << 20), 4 << 20),
        (Layout.of_objects(4096), 4 << 20),
        (Layout(4 << 20, 64 << 10, 4), 4 << 20),
        (Layout(4 << 20, 64 << 10, 3), 21 * (192 << 10)),
        (Layout(4 << 20, 2 << 20, 4), 2 << 20),
    ],
)
def test_a_fetch_is_of_whole_objects_or_stripes_and_at_most_4_mib(layout: Layout, fetch_bytes: int) -> None:
    assert layout.fetch_bytes == fetch_bytes


def test_what_is_no_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="not a layout"):
        Layout(0, 0, 1)
    with pytest.raises(ValueError, match="must divide"):
        Layout(4096, 1000, 2)
