"""`rbdfs diff` lists what `rbd diff` lists, and what it does not list has not changed."""

import json
import os
import random
import signal
import subprocess
from collections.abc import Iterable
from typing import Any

import pytest
import rbd
from hypothesis import given
from hypothesis import strategies as st

from rbdfs.ceph.bindings.librbd import Diff
from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.ceph.image import diff as ceph_diff
from rbdfs.commands.diff import DiffOptions, diff, whole_objects
from rbdfs.image.striper import Layout, file_to_extents
from tests.cluster import MIB, RBDFS, READ_ONLY_CAPS, Ceph, random_bytes, rbdfs
from tests.commands.test_export import ALL_FEATURES, HOLED, make_holed, snapshot
from tests.histories import KINDS, History

SEED = 20_261_127
HISTORIES = 2
SNAPSHOTS = 4
WRITTEN = (7 * MIB, len(b"written after the snapshot"))
"""By `snapshot`."""


def listed(
    ceph: Ceph, capfd: pytest.CaptureFixture[str], spec: str, since: str | None = None, *, whole: bool = False
) -> tuple[list[dict[str, Any]], str]:
    """The list, as a script reads it, and what was said beside it."""
    capfd.readouterr()
    options = DiffOptions(ClusterOptions(conf=ceph.conf), spec, since, whole_objects=whole, as_json=True)
    status = diff(options)
    said = capfd.readouterr()
    assert status == 0, said.err
    found: list[dict[str, Any]] = json.loads(said.out)
    return found, said.err


def theirs(ceph: Ceph, spec: str, since: str | None = None, *more: str) -> list[dict[str, Any]]:
    """What `rbd diff` lists, in the order of the image; of a striped image it follows the objects."""
    from_snap = () if since is None else ("--from-snap", since)
    found: list[dict[str, Any]] = json.loads(ceph.run("rbd", "diff", *from_snap, *more, "--format", "json", spec))
    return sorted(found, key=lambda extent: extent["offset"])


def covered(found: Iterable[dict[str, Any]]) -> set[int]:
    """The sectors that are listed."""
    return {
        sector
        for extent in found
        for sector in range(extent["offset"] // 512, -(-(extent["offset"] + extent["length"]) // 512))
    }


def differing(one: bytes, other: bytes) -> set[int]:
    """The sectors of the second that the first does not have; beyond its end it has zeros."""
    one = one.ljust(len(other), b"\0")
    return {at // 512 for at in range(0, len(other), 512) if one[at : at + 512] != other[at : at + 512]}


@pytest.mark.parametrize("kind", KINDS)
def test_of_any_history_it_lists_what_rbd_diff_lists_and_nothing_else_has_changed(
    ceph: Ceph, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(ceph_diff, "OBJECTS_AT_ONCE", 5)  # so that there are many windows
    for number in range(int(os.environ.get("HISTORIES", HISTORIES))):
        seed = SEED + number
        source = random.Random(f"{seed} {kind}")
        history = History.begin(ceph, source, kind)
        told: list[object] = [seed, kind]
        for index in range(SNAPSHOTS):
            told.append(history.go_on(source.randrange(1, 6)))
            history.snap(f"s{index}")
        told.append(history.go_on(2))
        names = [*(f"s{index}" for index in range(SNAPSHOTS)), ""]
        found: list[tuple[str | None, str, set[int]]] = []
        for new in source.sample(names, 3):
            spec = f"rbd/{history.name}@{new}" if new else f"rbd/{history.name}"
            for since in (None, *names[: names.index(new)]):
                extents, said = listed(ceph, capfd, spec, since)
                assert extents == theirs(ceph, spec, since), (spec, since, told)
                if not said:  # else it says of which bytes nobody can tell
                    found.append((since, new, covered(extents)))
            assert covered(extents) <= covered(listed(ceph, capfd, spec, since, whole=True)[0]), (spec, since, told)
        history.drop_maps()  # by one that librbd copied from a wrong one in a roll back, rbd export reads zeros
        content = {each: ceph.exported(f"{history.name}@{each}" if each else history.name) for each in names}
        for old, new, sectors in found:
            changed = differing(b"" if old is None else content[old], content[new])
            assert changed <= sectors, (old, new, told)


def test_whole_objects_are_those_of_rbd_diff_unless_it_goes_by_maps_after_a_roll_back(
    ceph: Ceph, capfd: pytest.CaptureFixture[str]
) -> None:
    name = make_holed(ceph, order=20)
    spec = snapshot(ceph, name)
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
        image.create_snap("old")  # in the map of which all but one object is as it was before
        image.write(random_bytes(3 * MIB, seed=4), 9 * MIB)
        image.discard(8 * MIB, MIB)
        image.create_snap("t")
    for each, since in ((spec, None), (f"rbd/{name}@t", "s"), (f"rbd/{name}", "s"), (f"rbd/{name}", None)):
        assert listed(ceph, capfd, each, since, whole=True)[0] == theirs(ceph, each, since, "--whole-object")
    new = ceph.exported(f"{name}@t")
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
        image.rollback_to_snap("old")
        image.create_snap("u")
    old = ceph.exported(f"{name}@u")
    changed = differing(new, old)
    assert changed
    for whole in (False, True):
        assert changed <= covered(listed(ceph, capfd, f"rbd/{name}@u", "t", whole=whole)[0])
    # By the maps, Ceph 16.2 finds less: if this fails, it does so no more.
    assert not changed <= covered(theirs(ceph, f"rbd/{name}@u", "t", "--whole-object"))


def test_a_clone_shows_its_parents_from_the_beginning_and_a_striped_image_whole_stripes(
    ceph: Ceph, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceph_diff, "OBJECTS_AT_ONCE", 2)
    parent, child = make_holed(ceph, order=20), ceph.unique("clone")
    snapshot(ceph, parent)
    with ceph.ioctx() as ioctx:
        with rbd.Image(ioctx, parent) as image:
            image.protect_snap("s")
        rbd.RBD().clone(ioctx, parent, "s", ioctx, child, features=ALL_FEATURES)
        with rbd.Image(ioctx, child) as image:
            image.create_snap("s")
            image.write(b"own", 20 * MIB)
            image.resize(64 * MIB)
            image.write(b"end", 60 * MIB)
    for since in (None, "s"):
        found, said = listed(ceph, capfd, f"rbd/{child}", since)
        assert (found, said) == (theirs(ceph, f"rbd/{child}", since), "")
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, child) as image:
        image.resize(10 * MIB)
        image.resize(64 * MIB)
    found, said = listed(ceph, capfd, f"rbd/{child}", "s")
    assert found == theirs(ceph, f"rbd/{child}", "s")
    assert f"bytes {10 * MIB} to {len(HOLED)} may have changed without being listed" in said
    assert said.count("\n") == 1

    striped = make_holed(ceph, order=20, stripe_unit=1 << 16, stripe_count=3)
    snapshot(ceph, striped)
    found, _ = listed(ceph, capfd, f"rbd/{striped}", "s", whole=True)
    assert len(found) == 16  # the stripe units of one object
    assert {extent["length"] for extent in found} == {1 << 16}
    layout = Layout(MIB, 1 << 16, 3)
    (number,) = {
        part.object_no for extent in found for part in file_to_extents(layout, extent["offset"], extent["length"])
    }
    assert number == file_to_extents(layout, *WRITTEN)[0].object_no


def test_the_table_says_what_is_compared_and_ends_with_a_picture_and_totals(ceph: Ceph) -> None:
    name = make_holed(ceph)
    spec = snapshot(ceph, name)
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
        image.discard(24 * MIB, 4 * MIB)
    key = ceph.credentials(READ_ONLY_CAPS)
    done = rbdfs("diff", *key, "--from-snap", "s", f"rbd/{name}", conf=ceph.conf)
    assert (done.returncode, done.stderr) == (0, "")
    head, columns, data, zero, picture, legend, total = done.stdout.splitlines()
    assert head == f"rbd/{name}, 33 MiB in objects of 4 MiB: changes since {spec}"
    assert columns.split() == ["Offset", "Length", "Type"]
    assert [int(cell) for cell in data.split()[:2]] == list(WRITTEN)
    assert zero.split() == [str(24 * MIB), str(4 * MIB), "zero"]
    assert picture == "·░····o··"
    assert legend == "░ to █ changed data, o changed to zeros, · unchanged; a cell is 4 MiB"
    assert total == f"{4 * MIB + 26} bytes in 2 objects: 26 data (26 B), {4 * MIB} zero (4 MiB)"
    same = rbdfs("diff", *key, "--from-snap", "s", spec, conf=ceph.conf)
    assert "Offset" not in same.stdout
    assert same.stdout.endswith("0 bytes in 0 objects: 0 data (0 B), 0 zero (0 B)\n")


def test_each_error_is_one_line(ceph: Ceph) -> None:
    name = make_holed(ceph)
    old = snapshot(ceph, name)
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
        image.create_snap("t")
    source, moved = make_holed(ceph), ceph.unique("moved")
    ceph.run("rbd", "migration", "prepare", f"rbd/{source}", f"rbd/{moved}")
    for arguments, status, sentence in (
        ((f"rbd/{name}", "--from-snap", "nope"), 1, f"rbd/{name} has no snapshot nope"),
        ((old, "--from-snap", "t"), 1, f"--from-snap t is later than {old}"),
        (("rbd/nope",), 1, "there is no image nope"),
        ((f"rbd/{name}", "--from-snap", ""), 2, "--from-snap"),
        ((f"rbd/{moved}",), 1, "is being migrated"),
    ):
        done = rbdfs("diff", *arguments, conf=ceph.conf)
        assert done.returncode == status
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""
    ceph.run("rbd", "migration", "abort", "--no-progress", f"rbd/{moved}")


def test_a_thin_image_of_64_tib_is_listed_by_what_it_ever_held(ceph: Ceph, capfd: pytest.CaptureFixture[str]) -> None:
    name = ceph.unique("large")
    with ceph.ioctx() as ioctx:
        rbd.RBD().create(ioctx, name, 64 << 40, old_format=False, features=ALL_FEATURES)
        with rbd.Image(ioctx, name) as image:
            image.create_snap("s")
            image.write(b"here", 1 << 40)
            image.create_snap("t")
            image.discard(1 << 40, 4 * MIB)
            image.write(b"there", 63 << 40)
    here, there = {"offset": 1 << 40, "length": 4}, {"offset": 63 << 40, "length": 5, "exists": "true"}
    assert listed(ceph, capfd, f"rbd/{name}", "s")[0] == [there]
    assert listed(ceph, capfd, f"rbd/{name}@t", "s")[0] == [here | {"exists": "true"}]
    assert listed(ceph, capfd, f"rbd/{name}", "t")[0] == [here | {"exists": "false"}, there]


def test_a_reader_that_is_gone_and_a_signal_end_it(ceph: Ceph) -> None:
    name = ceph.unique("slow")
    with ceph.ioctx() as ioctx:
        rbd.RBD().create(ioctx, name, 1 << 40, old_format=False, features=1)  # without a map: a million questions
        with rbd.Image(ioctx, name) as image:
            for offset in range(0, 64 * MIB, MIB):
                image.write(b"x", offset)
    command = [*RBDFS, "diff", "--conf", str(ceph.conf), f"rbd/{name}", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[\n"
        assert json.loads(process.stdout.readline().rstrip(",\n"))["offset"] == 0  # long before the end
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (143, "rbdfs: stopped by SIGTERM\n")
    assert not out.endswith("]\n")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.wait(20), process.stderr.read()) == (1, "")


LAYOUTS = (Layout.of_objects(64), Layout(64, 16, 3), Layout(64, 64, 2), Layout(32, 8, 1))


@given(st.sampled_from(LAYOUTS), st.integers(1, 1000), st.lists(st.tuples(st.integers(0, 999), st.booleans())))
def test_whole_objects_cover_the_image_once_and_each_change(
    layout: Layout, size: int, changes: list[tuple[int, bool]]
) -> None:
    extents = [Diff(offset, 1, exists) for offset, exists in sorted(dict(changes).items()) if offset < size]
    found = list(whole_objects(layout, size, extents))
    assert found == sorted(found)
    all_of = [at for offset, length, _ in found for at in range(offset, offset + length)]
    numbers = {file_to_extents(layout, offset, 1)[0].object_no for offset, _, _ in extents}
    assert all_of == [at for at in range(size) if file_to_extents(layout, at, 1)[0].object_no in numbers]
    data = {file_to_extents(layout, offset, 1)[0].object_no for offset, _, exists in extents if exists}
    assert all(row.exists == (file_to_extents(layout, row.offset, 1)[0].object_no in data) for row in found)
