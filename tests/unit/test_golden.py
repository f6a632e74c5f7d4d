"""What Ceph 16 and 18 really replied is decoded to what their `rbd` command said; damaged replies are errors.

The replies are in tests/golden, captured by `python -m tests.golden.capture`. No cluster is needed here.
"""

import errno
import resource
import struct
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbdfs.catalog import ImageStat
from rbdfs.ceph.bindings.encoding import Reader, encode_string
from rbdfs.ceph.image.image_state import ImageState
from rbdfs.ceph.metadata import stat
from rbdfs.errors import RbdfsError
from tests.attributes import compare, parent_spec
from tests.golden.questions import OPENS_FORMAT_1, Question, Questions
from tests.golden.replies import FOLDER, RELEASES, Key, Replay, load, places
from tests.in_trio import in_trio

LOOK_FULL = {
    *("layering", "journal", "no-features", "locked-shared", "flattened"),  # no object map
    *("invalid", "migrating", "migrated", "clone-striped"),
    *("old", "old-plain"),
}
"""Images of which not all is known that they hold."""

ROOM_BYTES = 256 << 20
"""More than any reply of a few KiB may take."""

STRUCTURES = {"value parent", *(f"call rbd.{name}" for name in ("migration_get", "snapshot_get", "trash_get"))} | {
    "call lock.get_info",
    "call rbd.object_map_load",
}
"""Which replies are versioned structures, or have one in them."""


class Waits(Exception):  # noqa: N818
    """A question waits for something else than a reply."""


def at_once(question: Awaitable[Any]) -> Any:
    """The answer to a question whose replies are all at hand."""
    steps = question.__await__()
    try:
        next(steps)
    except StopIteration as end:
        return end.value
    raise Waits


@dataclass(frozen=True, slots=True)
class Failed:
    """A question that ended with an RbdfsError."""

    errno: int


def outcome(question: Question) -> Any:
    """The answer, or how it failed. Raises any exception that is no RbdfsError."""
    try:
        return at_once(question.ask())
    except RbdfsError as error:
        return Failed(error.errno)


class Golden:
    """The replies of one release."""

    def __init__(self, release: str) -> None:
        self.objects, more = load(FOLDER / f"{release}.json")
        self.truth: dict[str, Any] = more["truth"]
        self.pools = {int(pool_id): name for pool_id, name in more["pools"].items()}
        self.replay = Replay(self.objects)
        self.asking = Questions(self.replay, places(self.pools), self.pools)
        self.questions = at_once(self.asking.all())
        self.users: dict[Key, list[Question]] = {}
        """Which questions each reply is for."""
        self.outcomes: dict[Question, Any] = {}
        """Of the replies as they are."""
        for question in self.questions:
            self.replay.consulted.clear()
            self.outcomes[question] = outcome(question)
            for key in self.replay.consulted:
                self.users.setdefault(key, []).append(question)

    def answers(self) -> Iterator[tuple[Key, bytes]]:
        """All that was replied, but what another object has replied likewise."""
        seen = set()
        for key, questions in self.users.items():
            answers = self.objects[key[0]]
            assert answers is not None
            answer = answers.get(key[1])
            like = key[1], answer, frozenset(question.name for question in questions)
            if isinstance(answer, bytes) and like not in seen:
                seen.add(like)
                yield key, answer

    def changed(self, key: Key, answer: bytes) -> Iterator[tuple[Question, Any]]:
        """What becomes of each question for this reply if it is another one."""
        self.replay.changed = {key: answer}
        try:
            for question in self.users[key]:
                yield question, outcome(question)
        finally:
            self.replay.changed = {}

    def is_harmless(self, question: Question, found: Any) -> bool:
        """Whether it is an error, or what it was before, or an image that looks broken or full."""
        if isinstance(found, ImageStat):
            before = self.outcomes[question]
            return found in (before, stat.BROKEN) or (found.size == before.size == found.used_bytes)
        return isinstance(found, Failed) or found == self.outcomes[question]

    def of(self, spec: str) -> dict[str, Any]:
        """What was answered of an image, a snapshot or a namespace, by what was asked."""
        return {question.name: found for question, found in self.outcomes.items() if question.spec == spec}

    def namespaces(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each with what `rbd` said of it."""
        for pool, said in self.truth.items():
            yield pool, said
            for name, inside in said["namespaces"].items():
                yield f"{pool}/{name}", inside

    def images(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each with what `rbd` said of it."""
        for where, said in self.namespaces():
            for name, inside in said["images"].items():
                yield f"{where}/{name}", inside


@pytest.fixture(scope="module", params=RELEASES)
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    """The replies of each release, to one who lives where they were captured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield Golden(request.param)
    time.tzset()


def is_after(said: str, nanoseconds: int) -> bool:
    """Whether a time of `rbd` is that of a header."""
    return said == time.ctime(nanoseconds // 10**9)


def test_names_are_those_that_rbd_ls_says(golden: Golden) -> None:
    for where, said in golden.namespaces():
        found = golden.of(where)
        assert set(found["image_names"]) == set(said["images"])
        assert found["changed_ns"] > 0 or not said["images"]
        for name, image in found["image_names"].items():
            assert golden.of(f"{where}/{name}")["image"] == image
    for pool, said in golden.truth.items():
        assert golden.of(pool)["namespaces"] == sorted(said["namespaces"])


def test_sizes_times_and_what_is_held_are_what_rbd_info_and_rbd_diff_say(golden: Golden) -> None:
    for spec, said in golden.images():
        found = golden.of(spec)["facts"]
        assert found.size == said["info"]["size"]
        assert found.used_bytes == held(spec, said, found.size), spec
        if said["info"]["format"] == 2:
            assert is_after(said["info"]["modify_timestamp"], found.modified_ns)
        for snapshot in said["snapshots"]:
            of_snapshot = golden.of(f"{spec}@{snapshot['name']}")["facts"]
            assert of_snapshot.size == snapshot["size"]
            assert is_after(snapshot["timestamp"], of_snapshot.modified_ns) or not snapshot["timestamp"]
            if snapshot["name"] in said["of_snapshots"]:
                inside = said["of_snapshots"][snapshot["name"]]
                assert of_snapshot.used_bytes == held(spec, inside, of_snapshot.size), (spec, snapshot)


def held(spec: str, said: dict[str, Any], size: int) -> int:
    """Bytes in objects that hold data, by `rbd diff`."""
    if spec.removeprefix("golden/") in LOOK_FULL:
        return size
    return sum(extent["length"] for extent in said["diff"] if extent["exists"] == "true")


def test_snapshots_are_those_that_rbd_snap_ls_says(golden: Golden) -> None:
    kinds = set()
    for spec, said in golden.images():
        found = golden.of(spec)["snapshots"]
        assert [(each.id, each.name) for each in found] == [(each["id"], each["name"]) for each in said["snapshots"]]
        for each, snapshot in zip(found, said["snapshots"], strict=True):
            kind = snapshot["namespace"]["type"]
            kinds.add(kind)
            assert each.is_users == (kind == "user")
            assert is_after(snapshot["timestamp"], each.created_ns) or (
                not snapshot["timestamp"] and not each.created_ns
            )
    assert kinds == {"user", "trash", "group", "mirror"}


def test_locks_and_parents_are_those_that_rbd_lock_ls_and_rbd_info_say(golden: Golden) -> None:
    locked = set()
    for spec, said in golden.images():
        state = golden.of(spec)["state"]
        assert isinstance(state, ImageState)
        if said["info"]["format"] == 2:
            locks = {(f"client.{locker.client}", locker.cookie) for locker in state.own.lockers}
            assert locks == {(each["locker"], each["id"]) for each in said["locks"]}
            locked |= {spec} if locks else set()
        compare_parent(golden, state, said["info"])
        for name, inside in said["of_snapshots"].items():
            compare_parent(golden, golden.of(f"{spec}@{name}")["state"], inside["info"])
    assert {"golden/held", "golden/locked", "golden/locked-shared"} <= locked


def compare_parent(golden: Golden, state: ImageState, info: dict[str, Any]) -> None:
    """Of an image or a snapshot: its layers, and `rbd info`."""
    parent, said = state.own.header.parent, info.get("parent")
    if parent is None or said is None:
        assert parent is said is None
        return
    assert parent.overlap == said["overlap"]
    pool = golden.pools[parent.image.namespace.pool.id]
    assert (pool, parent.image.namespace.name) == (said["pool"], said["pool_namespace"])
    assert state.ancestors[0] == parent.image
    if not said["trash"]:
        snapshot = next(iter(each for each in golden.asking.images.items() if same_place(each[1], parent.image)))[0]
        assert snapshot == parent_spec(said)


def same_place(mine: Any, other: Any) -> bool:
    """Whether two references are to one snapshot: a parent's pool has its number for a name."""
    return (mine.namespace.pool.id, mine.namespace.name, mine.id, mine.snapshot_id) == (
        other.namespace.pool.id,
        other.namespace.name,
        other.id,
        other.snapshot_id,
    )


def test_a_snapshot_that_its_users_do_not_have_is_gone_and_nothing_else_fails(golden: Golden) -> None:
    failed = {question.spec: question.name for question, found in golden.outcomes.items() if isinstance(found, Failed)}
    others = {
        f"{spec}@{snapshot['name']}": "state"
        for spec, said in golden.images()
        for snapshot in said["snapshots"]
        if snapshot["namespace"]["type"] != "user"
    }
    assert failed == others
    assert {found.errno for found in golden.outcomes.values() if isinstance(found, Failed)} == {errno.ENOENT}


def test_attributes_are_what_rbd_info_and_rbd_image_meta_say(golden: Golden) -> None:
    for spec, said in golden.images():
        found = golden.of(spec)
        assert found["snapshots"] is not None
        attributes = of_attributes(golden, spec)
        if said["info"]["format"] == 1:
            assert set(attributes) == set(found["attributes"]) - OPENS_FORMAT_1
            continue
        compare(attributes, said["info"])
        metadata = {key.removeprefix("meta."): value for key, value in attributes.items() if key.startswith("meta.")}
        assert metadata == (said["metadata"] or {})
        for name, inside in said["of_snapshots"].items():
            of_snapshot = of_attributes(golden, f"{spec}@{name}")
            compare(of_snapshot, inside["info"])
            assert of_snapshot["snapshot"] == name


def of_attributes(golden: Golden, spec: str) -> dict[str, str]:
    """All that were asked for."""
    found = golden.of(spec)
    return {name: found[name] for name in found["attributes"] if name in found}


def test_a_reply_that_was_cut_off_is_an_error_or_what_was_cut_off_did_not_matter(golden: Golden) -> None:
    for key, answer in golden.answers():
        for length in range(key[1] == "data", len(answer)):  # an object without data is a sound one
            for question, found in golden.changed(key, answer[:length]):
                assert golden.is_harmless(question, found), (key, length, question, found)


def test_what_follows_a_reply_changes_nothing(golden: Golden) -> None:
    for key, answer in filter(lambda each: each[1], golden.answers()):
        for question, found in golden.changed(key, answer + b"\1more"):
            assert found == golden.outcomes[question], (key, question)


@dataclass(frozen=True, slots=True)
class Structure:
    """A versioned structure in a reply."""

    key: Key
    answer: bytes
    start: int
    end: int
    """Past its last byte."""
    around: tuple[int, ...]
    """Where the structures start that it is in."""

    @property
    def length_at(self) -> int:
        """Where its length stands."""
        return self.start + 2

    def longer(self, more: bytes) -> bytes:
        """As a newer Ceph writes it, which older readers can read: with a higher version, and more at its end."""
        changed = bytearray(self.answer[: self.end] + more + self.answer[self.end :])
        changed[self.start] += 1
        for at in (self.length_at, *(start + 2 for start in self.around)):
            add(changed, at, len(more))
        if "object_map_load" in self.key[1]:  # in a string
            add(changed, 0, len(more))
        return bytes(changed)

    def too_new(self) -> bytes:
        """As only newer readers can read it."""
        changed = bytearray(self.answer)
        changed[self.start : self.start + 2] = b"\x0f\x0f"
        return bytes(changed)

    def lying(self, length: int) -> bytes:
        """With another length."""
        changed = bytearray(self.answer)
        struct.pack_into("<I", changed, self.length_at, length)
        return bytes(changed)


def add(data: bytearray, offset: int, count: int) -> None:
    """To a length of 32 bits."""
    struct.pack_into("<I", data, offset, struct.unpack_from("<I", data, offset)[0] + count)


@pytest.fixture(scope="module")
def structures(golden: Golden) -> list[Structure]:
    """All that the decoders find in the replies."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        seen: set[tuple[bytes, int, int]] = set()
        original = Reader.structure

        def structure(reader: Reader, known: int) -> tuple[int, Reader]:
            start = reader.position
            answer = original(reader, known)
            seen.add((reader.data, start, reader.position))
            return answer

        patch.setattr(Reader, "structure", structure)
        for key, answer in golden.answers():
            seen.clear()
            for question in golden.users[key]:
                outcome(question)
            if "object_map_load" in key[1] and answer:
                header_bytes = struct.unpack_from("<I", answer)[0]
                seen.add((answer, 4, 4 + header_bytes))
            places_in_it = [(start, end) for data, start, end in seen if data == answer]
            found += [
                Structure(key, answer, start, end, tuple(s for s, e in places_in_it if s < start and end <= e))
                for start, end in places_in_it
            ]
    assert {structure.key[1].partition("(")[0] for structure in found} == STRUCTURES
    return found


def test_a_longer_structure_of_a_newer_ceph_is_read_as_far_as_it_is_known(
    golden: Golden, structures: list[Structure]
) -> None:
    for structure in structures:
        for more in (b"\0", b"\xff" * 9):
            for question, found in golden.changed(structure.key, structure.longer(more)):
                assert found == golden.outcomes[question], (structure, question)


def test_a_structure_that_only_newer_readers_can_read_is_an_error_of_its_image(
    golden: Golden, structures: list[Structure]
) -> None:
    for structure in structures:
        errors = 0
        for question, found in golden.changed(structure.key, structure.too_new()):
            assert golden.is_harmless(question, found), (structure, question, found)
            errors += found != golden.outcomes[question] or isinstance(found, ImageStat)
        assert errors


def test_a_structure_whose_length_lies_raises_nothing_but_an_error_of_its_image(
    golden: Golden, structures: list[Structure]
) -> None:
    for structure in structures:
        inside, length = structure.start + 6, structure.end - structure.start - 6
        for lie in (0, 1, length - 1, length + 1, length + 1000, 0x7FFFFFFF, 0xFFFFFFFF):
            is_beyond_the_end = inside + lie > len(structure.answer)
            for question, found in golden.changed(structure.key, structure.lying(lie)):
                assert not is_beyond_the_end or golden.is_harmless(question, found), (structure, lie, question, found)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """For a test that would get a MemoryError from a large allocation."""
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + ROOM_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.usefixtures("little_memory")
def test_no_count_or_length_makes_for_a_large_allocation(golden: Golden) -> None:
    for key, answer in golden.answers():
        for size in (4, 8):
            for start in range(len(answer) - size + 1):
                for _ in golden.changed(key, answer[:start] + b"\xff" * size + answer[start + size :]):
                    pass


@given(st.data())
def test_damaged_replies_raise_nothing_but_errors_of_their_image(golden: Golden, data: st.DataObject) -> None:
    key, answer = data.draw(st.sampled_from(sorted(golden.answers())))
    damaged = bytearray(answer)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(damaged)))
        damaged[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    for _ in golden.changed(key, bytes(damaged)):
        pass  # any other exception would have come out of it


def test_a_header_that_names_itself_as_its_ancestor_is_an_error_and_not_asked_for_ever(golden: Golden) -> None:
    clone = golden.asking.images["golden/clone-2@s"]
    assert clone.snapshot_id is not None
    its_own = struct.pack("<q", clone.namespace.pool.id) + encode_string("") + encode_string(clone.id)
    its_own += struct.pack("<Q", clone.snapshot_id)
    header = f"{clone.namespace.pool.id}//rbd_header.{clone.id}", "value parent"
    changed = golden.changed(header, struct.pack("<BBI", 2, 1, len(its_own)) + its_own)
    states = {question.spec: found for question, found in changed if question.name == "state"}
    assert states["golden/clone-2@s"] == states["golden/grandchild"] == Failed(errno.EIO)


@in_trio
async def test_a_malformed_header_spoils_no_other_image_of_a_listing(golden: Golden) -> None:
    images = list(golden.of("golden")["image_names"].values())
    sound = await golden.asking.stat_reader.stat_all(images)
    for image in images:
        if image.format == 1:
            continue
        golden.replay.changed = {(f"{image.namespace.pool.id}//rbd_header.{image.id}", "value size"): b"\1"}
        try:
            found = await golden.asking.stat_reader.stat_all(images)
        finally:
            golden.replay.changed = {}
        assert found[image] == stat.BROKEN
        for other in images:
            mine, sound_one = found[other], sound[other]
            if other != image and mine != sound_one:  # a clone of its snapshot looks full
                assert sound_one is not None
                assert mine == replace(sound_one, used_bytes=sound_one.size)
