"""Names that come page by page end, whatever the pages say."""

import struct

import pytest

from rbdfs.ceph.bindings.encoding import MalformedError, Reader, encode_string
from rbdfs.ceph.metadata.paging import NO_PAGE, listed
from tests.in_trio import in_trio


def page(*names: str) -> bytes:
    """A page of these names, each with a string."""
    return struct.pack("<I", len(names)) + b"".join(encode_string(name) + encode_string(name * 2) for name in names)


@in_trio
async def test_pages_are_asked_for_until_one_is_not_full() -> None:
    pages = {"": page("a", "b"), "b": page("c", "d"), "d": NO_PAGE}

    async def ask(last: str, argument: bytes) -> bytes:
        assert argument == encode_string(last) + struct.pack("<Q", 2)
        return pages.pop(last)

    assert await listed(ask, 2, Reader.string) == {"a": "aa", "b": "bb", "c": "cc", "d": "dd"}
    assert not pages


@in_trio
async def test_the_same_page_again_and_again_is_an_error() -> None:
    async def ask(_last: str, _argument: bytes) -> bytes:
        return page("a", "b")

    with pytest.raises(MalformedError, match="the same again"):
        await listed(ask, 2, Reader.string)
