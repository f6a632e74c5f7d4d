"""What an image's header is decoded to, and that nothing in one can do more harm than EIO."""

import errno
import struct
from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbdfs.catalog import ImageRef, Namespace, Pool
from rbdfs.ceph.bindings.encoding import encode_string
from rbdfs.ceph.bindings.librados import Ioctx
from rbdfs.ceph.bindings.read_op import ReadOperations, Reply, Request
from rbdfs.ceph.metadata import header
from rbdfs.errors import RbdfsError
from rbdfs.tasks import SLICE
from tests.in_trio import counted_turns, in_trio

WHERE = Namespace(Pool(1, "rbd"))
HEAD = ImageRef(WHERE, "10f1a2b3c4d5")
SNAPSHOT = ImageRef(WHERE, HEAD.id, snapshot_id=4)
FORMAT_1 = ImageRef(WHERE, "old", format=1)
SNAPSHOT_OF_FORMAT_1 = ImageRef(WHERE, "old", snapshot_id=4, format=1)

# What a clone in Ceph 16.2 had.
ORDER = b"\x16"
SIZE = struct.pack("<Q", 10 << 20)
FEATURES = struct.pack("<Q", 61)
FLAGS = bytes(8)
TIME = bytes.fromhex("c0ffee6500000000")
SPEC = struct.pack("<q", 1) + encode_string("") + encode_string("10f1a2b3c4d6") + struct.pack("<Q", 4)
OVERLAP = b"\1" + SIZE


def versioned(data: bytes, version: int = 1) -> bytes:
    """As ENCODE_START and ENCODE_FINISH have it."""
    return struct.pack("<BBI", version, 1, len(data)) + data


VALUES = {
    b"order": ORDER,
    b"size": SIZE,
    b"features": FEATURES,
    b"flags": FLAGS,
    b"modify_timestamp": TIME,
    b"parent": versioned(SPEC + OVERLAP, version=2),
}
SNAPSHOT_INFO = versioned(
    struct.pack("<Q", 4) + versioned(struct.pack("<I", 0)) + encode_string("one") + SIZE + TIME + bytes(4)
)
ANSWERS = (ORDER + SIZE, SNAPSHOT_INFO, FEATURES + bytes(8), FLAGS, OVERLAP)
PARENTS = {b"parent": versioned(SPEC + b"\0", version=2), b"parent_get": versioned(SPEC)}
"""Where a snapshot's parent is found: since Nautilus (here HEAD has none any more), and before."""
PREFIX = b"rb.0.1018.6b8b4567"
ONDISK = (
    header.FORMAT_1_TEXT.ljust(40, b"\0")
    + PREFIX.ljust(24, b"\0")
    + b"RBD\0"
    + b"001.005\0"
    + ORDER
    + bytes(3)
    + SIZE
    + bytes(24)
)
SNAPSHOTS_OF_FORMAT_1 = struct.pack("<QIQQ", 4, 1, 4, 10 << 20) + encode_string("one")


def of_snapshot(answers: tuple[bytes, ...], where: bytes = b"parent") -> Reply:
    """The reply to what is asked of a snapshot."""
    return Reply(0, [(0, answer) for answer in answers], {where: PARENTS[where]})


def test_what_real_headers_say_is_understood() -> None:
    parent = header.Parent(ImageRef(WHERE, "10f1a2b3c4d6", 4), 10 << 20)
    head = header.decode(HEAD, Reply(0, values=VALUES))
    assert (head.size, head.object_size, head.map_is_valid, head.parent) == (10 << 20, 4 << 20, True, parent)
    for where in PARENTS:
        snapshot = header.decode(SNAPSHOT, of_snapshot(ANSWERS, where))
        assert (snapshot.size, snapshot.object_size, snapshot.map_is_valid) == (10 << 20, 4 << 20, True)
        assert snapshot.parent == parent
    with pytest.raises(RbdfsError, match="does not say which"):
        header.decode(SNAPSHOT, of_snapshot(ANSWERS)._replace(values={}))
    old = header.decode(FORMAT_1, Reply(0, data=ONDISK))
    assert (old.size, old.object_size, old.object_prefix) == (10 << 20, 4 << 20, PREFIX.decode())
    one = header.decode(SNAPSHOT_OF_FORMAT_1, Reply(0, [(0, SNAPSHOTS_OF_FORMAT_1)], data=ONDISK))
    assert (one.size, one.object_size, one.object_prefix) == (10 << 20, 4 << 20, PREFIX.decode())


class Answering(ReadOperations):
    """Gives replies that are at hand, to the first questions and to those that follow from them."""

    def __init__(self, *replies: Sequence[Reply]) -> None:
        self.asked: list[list[bytes]] = []
        self._replies = list(replies)

    async def operate(self, requests: Sequence[Request]) -> Sequence[Reply]:
        self.asked.append([request.calls[-1].method for request in requests])
        return self._replies.pop(0)


@in_trio
async def test_a_parent_is_asked_for_by_itself_only_where_it_is_as_it_was_before_nautilus() -> None:
    ioctx = cast(Ioctx, None)
    requests = [header.request(ioctx, SNAPSHOT)] * 3
    clone = of_snapshot(ANSWERS)
    plain = of_snapshot((*ANSWERS[:-1], b"\0"))._replace(values={})
    old = of_snapshot(ANSWERS)._replace(values={})
    now = Answering([clone, plain, Reply(-errno.ENOENT)])
    await header.ask(now, requests)
    assert now.asked == [[b"parent_overlap_get"] * 3]
    before = Answering([clone, old, plain], [Reply(0, [(0, PARENTS[b"parent_get"])])])
    replies = await header.ask(before, requests)
    assert before.asked == [[b"parent_overlap_get"] * 3, [b"parent_get"]]
    shown = header.decode(SNAPSHOT, replies[0]).parent
    assert shown is not None
    assert [header.decode(SNAPSHOT, reply).parent for reply in replies] == [shown, shown, None]


def decode_or_fail(image: ImageRef, reply: Reply) -> None:
    """What is not understood is an RbdfsError; what is, is a file."""
    try:
        found = header.decode(image, reply)
    except RbdfsError:
        return
    assert 0 <= found.size < 1 << 63
    assert 512 <= found.object_size <= 1 << 31
    assert 0 <= found.modified_ns < 1 << 63


@st.composite
def mutated(draw: st.DrawFn, original: bytes) -> bytes:
    """Bytes that were flipped, cut or replaced."""
    data = bytearray(original)
    for _ in range(draw(st.integers(0, 3))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    cut = bytes(data[: draw(st.integers(0, len(data)))])
    return draw(st.sampled_from([bytes(data), cut, draw(st.binary(max_size=40))]))


@given(st.fixed_dictionaries({}, optional={key: mutated(value) for key, value in VALUES.items()}))
def test_no_value_of_a_header_raises_anything_but_an_error_of_the_image(values: dict[bytes, bytes]) -> None:
    decode_or_fail(HEAD, Reply(0, values={**VALUES, **values}))
    decode_or_fail(HEAD, Reply(0, values=values))


@given(st.tuples(*map(mutated, ANSWERS)), st.tuples(*[st.sampled_from([0, 0, 0, -errno.EIO])] * len(ANSWERS)))
def test_no_answer_of_a_snapshot_raises_anything_but_an_error_of_the_image(
    answers: tuple[bytes, ...], results: tuple[int, ...]
) -> None:
    decode_or_fail(SNAPSHOT, Reply(0, list(zip(results, answers, strict=True))))


@given(mutated(ONDISK), mutated(SNAPSHOTS_OF_FORMAT_1))
def test_no_header_of_format_1_raises_anything_but_an_error_of_the_image(data: bytes, snapshots: bytes) -> None:
    decode_or_fail(FORMAT_1, Reply(0, data=data))
    decode_or_fail(SNAPSHOT_OF_FORMAT_1, Reply(0, [(0, snapshots)], data=data))
    decode_or_fail(SNAPSHOT_OF_FORMAT_1, Reply(0, [(0, SNAPSHOTS_OF_FORMAT_1)], data=ONDISK[:40] + data))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"order", b"\xff"),
        (b"order", b"\x20"),
        (b"order", b"\x00"),
        (b"order", b""),
        (b"size", struct.pack("<q", -1)),
        (b"size", SIZE[:7]),
        (b"features", b""),
        (b"flags", b""),
        (b"modify_timestamp", b""),
        (b"parent", b""),
        (b"parent", VALUES[b"parent"][:20]),
    ],
)
def test_a_malformed_value_is_eio_of_its_image(key: bytes, value: bytes) -> None:
    with pytest.raises(RbdfsError, match=f"rbd_header.{HEAD.id}") as caught:
        header.decode(HEAD, Reply(0, values={**VALUES, key: value}))
    assert caught.value.errno == errno.EIO


class ManySnapshots(ReadOperations):
    """An image with so many snapshots, each with the one answer."""

    def __init__(self, count: int, answer: bytes) -> None:
        self.most_requests = 0
        self._context = Reply(0, [(0, struct.pack("<QI", count, count) + bytes(8 * count))], version=7)
        self._answer = answer

    async def operate(self, requests: Sequence[Request]) -> Sequence[Reply]:
        if requests[0].calls[0].method == b"get_snapcontext":
            return [self._context]
        self.most_requests = max(self.most_requests, len(requests))
        return [Reply(0, [(0, self._answer)] * len(request.calls)) for request in requests]


@in_trio
async def test_ten_thousand_snapshots_are_asked_for_and_decoded_a_few_at_a_time() -> None:
    image = ManySnapshots(10_000, ANSWERS[1])
    async with counted_turns() as turns:
        version, snapshots = await header.snapshots(image, cast(Ioctx, None), HEAD)
    assert (version, len(snapshots)) == (7, 10_000)
    assert image.most_requests == 16
    assert turns.count > 10_000 // SLICE // 2
