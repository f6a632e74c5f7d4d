"""Image specs are read as the `rbd` command reads them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbdfs.errors import UsageError
from rbdfs.spec import ImageSpec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("vm1", ImageSpec("rbd", "vm1")),
        ("vm1@s", ImageSpec("rbd", "vm1", snapshot="s")),
        ("pool/vm1", ImageSpec("pool", "vm1")),
        ("pool/vm1@s", ImageSpec("pool", "vm1", snapshot="s")),
        ("pool/ns/vm1", ImageSpec("pool", "vm1", "ns")),
        ("pool/ns/vm1@s", ImageSpec("pool", "vm1", "ns", "s")),
        ("pool/ns/a/b", ImageSpec("pool", "a/b", "ns")),
        ("pool/vm1@a/b", ImageSpec("pool", "vm1", snapshot="a/b")),
        ("pool/vm1@a@b", ImageSpec("pool", "vm1", snapshot="a@b")),
        ("vm 1", ImageSpec("rbd", "vm 1")),
        ("p@l/vm1", ImageSpec("p@l", "vm1")),
        ("pool/", ImageSpec("rbd", "pool/")),
        ("pool//vm1", ImageSpec("pool", "/vm1")),
    ],
)
def test_a_spec_is_read_as_the_rbd_command_reads_it(text: str, spec: ImageSpec) -> None:
    assert ImageSpec.parse(text) == spec


@pytest.mark.parametrize("text", ["", "@s", "vm1@", "@"])
def test_what_names_no_image_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError, match="is no image"):
        ImageSpec.parse(text)


def test_the_default_pool_is_the_callers() -> None:
    assert ImageSpec.parse("vm1", default_pool="ssd") == ImageSpec("ssd", "vm1")
    assert ImageSpec.parse("hdd/vm1", default_pool="ssd") == ImageSpec("hdd", "vm1")


names = st.text(st.characters(exclude_characters="/@", exclude_categories=["Cs"]), min_size=1)


@given(st.builds(ImageSpec, names, names, names | st.just(""), names | st.just("")))
def test_what_is_written_is_read_again(spec: ImageSpec) -> None:
    assert ImageSpec.parse(str(spec)) == spec
