"""`rbdfs map` says what `rados`, `ceph osd map` and `rbd diff` say."""

import json
import random
import string
from typing import Any

import pytest
import rbd
from hypothesis import given
from hypothesis import strategies as st

from rbdfs.ceph.placement import PlacementGroups, stable_mod
from rbdfs.commands.allocation_bar import draw_bar
from tests.cluster import MIB, READ_ONLY_CAPS, Ceph, random_bytes, rbdfs
from tests.commands.test_export import make_holed, snapshot


def mapped(ceph: Ceph, *arguments: str) -> Any:
    """The answer, as a script reads it."""
    done = rbdfs("map", "--json", *arguments, conf=ceph.conf)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def osd_map(ceph: Ceph, pool: str, name: str, namespace: str = "") -> Any:
    """`ceph osd map`, without the time that the command takes to start."""
    command = {"prefix": "osd map", "pool": pool, "object": name, "format": "json"}
    command |= {"nspace": namespace} if namespace else {}
    result, answer, said = ceph.rados.mon_command(json.dumps(command, ensure_ascii=False), b"")
    assert result == 0, said
    return json.loads(answer)


def test_the_placement_group_of_any_name_is_that_of_ceph_osd_map(ceph: Ceph) -> None:
    chance = random.Random(5)
    pool_id = ceph.rados.pool_lookup("rbd")
    dump = json.loads(ceph.run("ceph", "osd", "dump", "--format", "json"))
    groups = PlacementGroups(pool_id, next(pool["pg_num"] for pool in dump["pools"] if pool["pool"] == pool_id))
    for length in range(1, 50):
        name = "".join(chance.choices(string.printable + "äß🐙", k=length))
        for namespace in ("", "ns", "a longer namespace"):
            command = {"prefix": "osd map", "pool": "rbd", "object": name, "format": "json"}
            command |= {"nspace": namespace} if namespace else {}
            _, answer, _ = ceph.rados.mon_command(json.dumps(command, ensure_ascii=False), b"")
            assert json.loads(answer)["pgid"] == groups.of(name, namespace), (name, namespace)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5000))
def test_a_group_splits_in_two_when_there_is_one_more(value: int, count: int) -> None:
    group = stable_mod(value, count)
    assert 0 <= group < count
    assert stable_mod(value, count + 1) in (group, count)


def check(ceph: Ceph, spec: str, namespace: str = "") -> Any:
    """Compare with what Ceph's own commands say, and return it."""
    found = mapped(ceph, spec)
    extents = found["extents"]
    assert [extent["offset"] for extent in extents] == [
        0,
        *(extent["offset"] + extent["length"] for extent in extents[:-1]),
    ]
    assert extents[-1]["offset"] + extents[-1]["length"] == found["size"]

    diff = json.loads(ceph.run("rbd", "diff", "--whole-object", "--format", "json", spec))
    said = {offset for piece in diff for offset in range(piece["offset"], piece["offset"] + piece["length"], 4096)}
    ours = {
        offset
        for extent in extents
        if extent["kind"] != "hole"
        for offset in range(extent["offset"], extent["offset"] + extent["length"], 4096)
    }
    assert ours == {offset for offset in said if offset < found["size"]}

    within = ("--namespace", namespace) if namespace else ()
    present = set(ceph.run("rados", "-p", found["data_pool"], *within, "ls").split())
    named = {extent["object"] for extent in extents if extent["kind"] == "data"}
    if "@" not in spec:
        assert named == {name for name in present if name.startswith(found["object_prefix"] + ".")}
    for extent in extents:
        if extent["object"] is None:
            assert extent["kind"] == "hole"
            continue
        where = osd_map(ceph, found["data_pool"], extent["object"], namespace)
        assert (extent["pg"], extent["osds"]) == (where["pgid"], where["acting"])
    return found


def test_it_says_what_ceph_says_of_a_plain_image_and_of_a_snapshot(ceph: Ceph) -> None:
    name = make_holed(ceph)
    found = check(ceph, f"rbd/{name}")
    assert [(extent["offset"], extent["kind"], extent["object_no"]) for extent in found["extents"]] == [
        (0, "hole", 0),
        (4 * MIB, "data", 1),
        (8 * MIB, "data", 2),
        (12 * MIB, "hole", None),
        (24 * MIB, "data", 6),
        (28 * MIB, "hole", 7),
        (32 * MIB, "data", 8),
    ]
    check(ceph, snapshot(ceph, name))


def test_it_says_what_ceph_says_of_stripes_data_pools_and_namespaces(ceph: Ceph) -> None:
    pool = ceph.unique("mappool")
    ceph.make_pool(pool)
    name = make_holed(ceph, order=20, stripe_unit=1 << 18, stripe_count=3, data_pool=pool)
    found = check(ceph, f"rbd/{name}")
    assert found["data_pool"] == pool
    with ceph.ioctx() as ioctx:
        for extent in found["extents"]:
            if extent["kind"] == "data":
                with rbd.Image(ioctx, name, read_only=True) as image, ceph.ioctx(pool) as objects:
                    stored = objects.read(extent["object"], extent["length"], extent["object_offset"])
                    assert image.read(extent["offset"], extent["length"]).startswith(stored)
        rbd.RBD().namespace_create(ioctx, pool)
        ioctx.set_namespace(pool)
        rbd.RBD().create(ioctx, "vm1", 9 * MIB, old_format=False)
        with rbd.Image(ioctx, "vm1") as image:
            image.write(random_bytes(MIB), 5 * MIB)
    assert len(check(ceph, f"rbd/{pool}/vm1", pool)["extents"]) == 3


def test_a_clone_shows_what_is_its_own_and_what_is_its_parents(ceph: Ceph) -> None:
    parent = make_holed(ceph)
    spec, child = snapshot(ceph, parent), ceph.unique("mapclone")
    with ceph.ioctx() as ioctx:
        with rbd.Image(ioctx, parent) as image:
            image.protect_snap("s")
        rbd.RBD().clone(ioctx, parent, "s", ioctx, child)
        with rbd.Image(ioctx, child) as image:
            image.write(b"own", 8 * MIB)
            image.write(b"own", 16 * MIB)
    found = check(ceph, f"rbd/{child}")
    assert found["parent"] == spec
    kinds = {extent["offset"] // (4 * MIB): extent["kind"] for extent in found["extents"]}
    assert kinds == {
        0: "hole",
        1: "parent",
        2: "data",
        3: "hole",
        4: "data",
        5: "hole",
        6: "parent",
        7: "hole",
        8: "parent",
    }


def test_a_range_is_cut_to_the_byte_and_a_key_that_may_only_read_may_ask(ceph: Ceph) -> None:
    name = make_holed(ceph)
    arguments = (*ceph.credentials(READ_ONLY_CAPS), "--offset", "4195304", "--length", "7", f"rbd/{name}")
    (extent,) = mapped(ceph, *arguments)["extents"]
    assert (extent["offset"], extent["length"], extent["object_no"], extent["object_offset"]) == (4195304, 7, 1, 1000)
    beyond = rbdfs("map", "--offset", "1G", f"rbd/{name}", conf=ceph.conf)
    assert beyond.returncode == 2
    assert beyond.stderr.count("\n") == 1
    gone = rbdfs("map", "rbd/nope", conf=ceph.conf)
    assert (gone.returncode, gone.stderr) == (1, "rbdfs: there is no image nope in rbd; 'rbd ls rbd' lists them\n")


def test_the_table_is_for_people_and_has_an_end(ceph: Ceph) -> None:
    name = make_holed(ceph, order=15)
    done = rbdfs("map", f"rbd/{name}", conf=ceph.conf)
    head, picture_line, legend, _, columns, *rows = done.stdout.splitlines()
    assert head.startswith(f"rbd/{name}: 33 MiB in objects of 32 KiB, rbd_data.")
    assert len(picture_line) <= 80
    assert "a cell is" in legend
    assert columns.split() == ["OFFSET", "LENGTH", "WHAT", "OBJECT", "NAME", "AT", "PG", "OSDS"]
    assert len(rows) == 101
    assert rows[-1] == "and 96 more: choose with --offset and --length, or take --json"


def test_a_picture_has_a_cell_for_each_object_or_for_several() -> None:
    data, shown = [(0, 4), (4, 2), (16, 4)], [(0, 12), (16, 4)]
    assert draw_bar(0, 24, 4, data, shown, 80, "utf-8") == ("█▓o·█·", 4)
    assert draw_bar(0, 24, 4, data, shown, 3, "utf-8") == ("█o▓", 8)
    assert draw_bar(0, 24, 4, data, shown, 3, "ascii") == ("#o=", 8)
    assert draw_bar(9, 18, 4, data, shown, 80, "utf-8") == ("o·█", 4)
    assert draw_bar(0, 0, 4, [], [], 80, "utf-8") == ("", 4)


def test_the_user_is_that_of_ceph_args_unless_the_command_line_has_another(
    ceph: Ceph, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = ceph.unique("whose")
    ceph.make_image(name, random_bytes(4096))
    _, user, _, keyring = ceph.credentials(READ_ONLY_CAPS)
    _, stranger, _, other_keyring = ceph.credentials(("mon", "profile rbd", "osd", "profile rbd pool=another"))
    monkeypatch.setenv("CEPH_ARGS", f"--keyring {other_keyring} --id={stranger}")
    done = rbdfs("map", f"rbd/{name}", conf=ceph.conf)
    assert done.returncode == 1
    assert f"client.{stranger}" in done.stderr
    assert mapped(ceph, "--id", user, "--keyring", keyring, f"rbd/{name}")["extents"]
    monkeypatch.setenv("CEPH_ARGS", f"-n client.{user} --keyring {keyring} -c {ceph.conf}")
    done = rbdfs("map", f"rbd/{name}")
    assert (done.returncode, done.stderr) == (0, "")
