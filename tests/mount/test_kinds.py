"""Every kind of image is listed with what `rbd info` says of it, and a broken one spoils nothing for the others."""

import json
import os
import struct
import subprocess
from collections.abc import Callable, Iterator

import pytest
import rados
import rbd

from tests.cluster import MIB, Ceph, Mount

Mounts = Callable[..., Mount]

MADE_BY = {
    "plain": ("create --size 10M POOL/plain",),
    "journal": ("create --size 10M --image-feature exclusive-lock,journaling POOL/journal",),
    "striped": ("create --size 10M --object-size 1M --stripe-unit 64K --stripe-count 4 POOL/striped",),
    "smallest-objects": ("create --size 1M --object-size 4K POOL/smallest-objects",),
    "largest-objects": ("create --size 50M --object-size 32M POOL/largest-objects",),
    "data-pool": ("create --size 10M --data-pool rbd POOL/data-pool",),
    "odd-size": ("create --size 1234567B POOL/odd-size",),
    "empty": ("create --size 0 POOL/empty",),
    "old": ("create --size 10M --image-format 1 POOL/old", "snap create POOL/old@one", "resize --size 20M POOL/old"),
    "parent": ("create --size 10M POOL/parent", "snap create POOL/parent@s", "snap protect POOL/parent@s"),
    "clone-1": ("clone --rbd-default-clone-format 1 POOL/parent@s POOL/clone-1", "resize --size 30M POOL/clone-1"),
    "clone-2": ("clone --rbd-default-clone-format 2 POOL/parent@s POOL/clone-2",),
    "of-other-pool": (
        "create --size 10M rbd/POOL-parent",
        "snap create rbd/POOL-parent@s",
        "clone --rbd-default-clone-format 2 rbd/POOL-parent@s POOL/of-other-pool",
    ),
    "of-namespace": (
        "namespace create POOL/ns",
        "create --size 10M POOL/ns/parent",
        "snap create POOL/ns/parent@s",
        "clone --rbd-default-clone-format 2 POOL/ns/parent@s POOL/of-namespace",
    ),
    "migrating": ("create --size 10M POOL/source", "migration prepare POOL/source POOL/migrating"),
}
"""The commands of `rbd` that make each kind."""
NO_FEATURE = "no-feature"
"""Made by the library; the command always gives it some."""


@pytest.fixture(scope="module")
def pool(ceph: Ceph) -> Iterator[str]:
    """A pool with one image of each kind. (Encrypted ones: mount/test_read.py.)"""
    name = ceph.unique("kinds")
    ceph.make_pool(name)
    environment = os.environ | {"CEPH_CONF": str(ceph.conf), "RBD_FORCE_ALLOW_V1": "1"}
    for commands in MADE_BY.values():
        for command in commands:
            arguments = ["rbd", *command.replace("POOL", name).split()]
            subprocess.run(arguments, env=environment, check=True, capture_output=True)
    with ceph.ioctx(name) as ioctx:
        rbd.RBD().create(ioctx, NO_FEATURE, 10 * MIB, old_format=False, features=0)
    yield name
    ceph.remove_pool(name)


def test_every_kind_of_image_is_listed_with_the_size_that_rbd_info_says(ceph: Ceph, mounts: Mounts, pool: str) -> None:
    folder = mounts("--pool", pool).path / pool
    assert set(os.listdir(folder)) == {*MADE_BY, NO_FEATURE, "ns"}
    for name in (*MADE_BY, NO_FEATURE):
        info = json.loads(ceph.run("rbd", "info", "--format", "json", f"{pool}/{name}"))
        status = (folder / name).stat()
        assert (name, status.st_size) == (name, info["size"])
        assert status.st_mode == 0o100444
    old = folder / ".snap" / "old"
    assert [(entry.name, entry.stat().st_size) for entry in os.scandir(old)] == [("one", 10 * MIB)]
    assert (folder / "old@one").stat().st_ino == (old / "one").stat().st_ino
    # Nothing says what an image of format 1 holds, nor one that is being migrated: each may be full.
    for name in ("old", "migrating"):
        assert (folder / name).stat().st_blocks * 512 == (folder / name).stat().st_size


def test_the_blocks_of_a_clone_are_its_parents_also_of_another_pool_and_of_a_namespace(
    ceph: Ceph, mounts: Mounts
) -> None:
    pool = ceph.unique("clones")
    ceph.make_pool(pool)
    try:
        with ceph.ioctx(pool) as ioctx, ceph.ioctx() as other, ceph.ioctx(pool) as inside:
            rbd.RBD().namespace_create(ioctx, "ns")
            inside.set_namespace("ns")
            for where in (other, inside):
                rbd.RBD().create(where, f"{pool}-parent", 8 * MIB, order=20, old_format=False)
                with rbd.Image(where, f"{pool}-parent") as image:
                    image.write(b"x" * MIB, MIB)
                    image.write(b"x" * MIB, 7 * MIB)
                    image.create_snap("s")
        for parent, clone in ((f"rbd/{pool}-parent", "of-pool"), (f"{pool}/ns/{pool}-parent", "of-namespace")):
            ceph.run("rbd", "clone", "--rbd-default-clone-format=2", f"{parent}@s", f"{pool}/{clone}")
            ceph.write_image(clone, b"y" * MIB, 3 * MIB, pool=pool)
            ceph.run("rbd", "snap", "create", "--no-progress", f"{pool}/{clone}@before")
            ceph.write_image(clone, b"y" * MIB, 4 * MIB, pool=pool)
        folder = mounts("--pool", pool).path / pool
        for clone in ("of-pool", "of-namespace"):
            assert (folder / clone).stat().st_blocks * 512 == 4 * MIB
            assert (folder / f"{clone}@before").stat().st_blocks * 512 == 3 * MIB
    finally:
        ceph.remove_pool(pool)


def test_a_clone_whose_parents_pool_was_removed_is_listed_and_looks_full(ceph: Ceph, mounts: Mounts) -> None:
    pool, removed = ceph.unique("orphans"), ceph.unique("removed")
    ceph.make_pool(pool)
    ceph.make_pool(removed)
    try:
        ceph.make_image("parent", b"content", pool=removed)
        ceph.run("rbd", "snap", "create", "--no-progress", f"{removed}/parent@s")
        ceph.run("rbd", "clone", "--rbd-default-clone-format=2", f"{removed}/parent@s", f"{pool}/orphan")
        ceph.make_image("other", b"content", pool=pool)
        ceph.remove_pool(removed)
        folder = mounts("--pool", pool).path / pool
        listed = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        assert listed == {"orphan": 7, "other": 7}
        assert (folder / "orphan").stat().st_blocks == 1
        with pytest.raises(FileNotFoundError):
            os.getxattr(folder / "orphan", "user.rbd.parent")
    finally:
        ceph.remove_pool(pool)


def test_a_broken_image_is_listed_and_fails_alone_with_a_line_that_says_why(ceph: Ceph, mounts: Mounts) -> None:
    pool = ceph.unique("broken")
    ceph.make_pool(pool)
    try:
        for name in ("fine", "no-header", "no-size"):
            ceph.make_image(name, b"content", pool=pool)
        with ceph.ioctx(pool) as ioctx:
            ids = {each["name"]: each["id"] for each in rbd.RBD().list2(ioctx)}
            ioctx.remove_object(f"rbd_header.{ids['no-header']}")
        ceph.run("rados", "-p", pool, "rmomapkey", f"rbd_header.{ids['no-size']}", "size")
        mount = mounts("--pool", pool)
        folder = mount.path / pool
        for command in ("ls -l", "find", "du", "stat -c %s"):
            targets = [folder, folder / ".snap"]
            if command.startswith("stat"):
                targets = [folder / name for name in sorted(ids)]
            done = subprocess.run([*command.split(), *targets], check=True, capture_output=True, text=True)
            assert done.stderr == ""
        assert done.stdout.split() == ["7", "1", "1"]
        assert (folder / "fine").read_bytes() == b"content"
        assert os.listdir(folder / ".snap" / "fine") == []
        mount.expect("ERROR")
        with pytest.raises(OSError, match="Input/output error"):
            (folder / "no-header").open("rb")
        assert f"cannot open {pool}/no-header" in mount.log
        assert f"rbd_header.{ids['no-header']} is missing" in mount.log
        with pytest.raises(OSError, match="Input/output error"):
            (folder / "no-size").open("rb")
        assert f"cannot open {pool}/no-size" in mount.log
        copied = subprocess.run(
            ["rsync", "-a", f"{folder}/", f"{folder.parent.parent}/copy"], check=False, capture_output=True
        )
        assert copied.returncode == 23  # some files could not be copied: a backup program must notice
        assert (folder.parent.parent / "copy" / "fine").read_bytes() == b"content"
    finally:
        ceph.remove_pool(pool)


DAMAGE = {
    "order-huge": ("order", b"\xff"),
    "order-zero": ("order", b"\0"),
    "order-cut": ("order", b""),
    "size-negative": ("size", b"\xff" * 8),
    "size-cut": ("size", b"\1"),
    "features-cut": ("features", b""),
    "flags-cut": ("flags", b"\1\1"),
    "time-cut": ("modify_timestamp", b"\1"),
    "parent-empty": ("parent", b""),
    "parent-cut": ("parent", b"\2\1\x20\0\0\0\1"),
    "parent-too-long": ("parent", b"\2\1\xff\xff\xff\xff" + bytes(8) + b"\xff" * 8),
}
"""Values of a header's omap, each of an image of this name."""


def set_value(ioctx: rados.Ioctx, name: str, key: str, value: bytes) -> None:
    """Set a value of an image's header, as `rados setomapval` does."""
    with rbd.Image(ioctx, name, read_only=True) as image:
        header = f"rbd_header.{image.id()}"
    with rados.WriteOpCtx() as operation:
        ioctx.set_omap(operation, (key,), (value,))
        ioctx.operate_write_op(operation, header)


def test_a_header_with_a_damaged_value_is_one_broken_image_and_spoils_no_listing(ceph: Ceph, mounts: Mounts) -> None:
    pool = ceph.unique("damaged")
    ceph.make_pool(pool)
    try:
        for name in ("fine", *DAMAGE):
            ceph.make_image(name, b"content", pool=pool)
        with ceph.ioctx(pool) as ioctx:
            for name, (key, value) in DAMAGE.items():
                set_value(ioctx, name, key, value)
        folder = mounts("--pool", pool).path / pool
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        assert sizes == dict.fromkeys(DAMAGE, 1) | {"fine": 7}
        assert {name: (folder / name).stat().st_size for name in sizes} == sizes
        assert (folder / "fine").read_bytes() == b"content"
    finally:
        ceph.remove_pool(pool)


def test_a_clone_that_names_its_own_snapshot_as_its_parent_is_listed_and_looks_full(ceph: Ceph, mounts: Mounts) -> None:
    pool = ceph.unique("circle")
    ceph.make_pool(pool)
    try:
        ceph.make_image("parent", b"x" * MIB, pool=pool)
        ceph.make_image("fine", b"content", pool=pool)
        with ceph.ioctx(pool) as ioctx:
            with rbd.Image(ioctx, "parent") as image:
                image.create_snap("s")
                image.protect_snap("s")
            rbd.RBD().clone(ioctx, "parent", "s", ioctx, "circle")
            with rbd.Image(ioctx, "circle") as image:
                image.create_snap("s")
                image.resize(9 * MIB)
                (snapshot,) = image.list_snaps()
                image_id = image.id().encode()
            spec = struct.pack("<qII", ioctx.get_pool_id(), 0, len(image_id)) + image_id
            spec += struct.pack("<QBQ", snapshot["id"], 1, MIB)
            set_value(ioctx, "circle", "parent", struct.pack("<BBI", 2, 1, len(spec)) + spec)
        folder = mounts("--pool", pool).path / pool
        sizes = {entry.name: (entry.stat().st_size, entry.stat().st_blocks * 512) for entry in os.scandir(folder)}
        assert sizes["fine"][0] == 7
        assert sizes["circle"] == (9 * MIB, 9 * MIB)
    finally:
        ceph.remove_pool(pool)


def test_a_pool_of_130_images_is_listed_whole(ceph: Ceph, mounts: Mounts) -> None:
    pool = ceph.unique("many")
    ceph.make_pool(pool)
    try:
        with ceph.ioctx(pool) as ioctx:
            for number in range(130):
                rbd.RBD().create(ioctx, f"image{number}", (number + 1) * MIB, old_format=False)
        folder = mounts("--pool", pool).path / pool
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        assert sizes == {f"image{number}": (number + 1) * MIB for number in range(130)}
    finally:
        ceph.remove_pool(pool)
