"""What is known of an image as extended attributes of its file, and the same as the `rbd` command says it."""

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rbd

from tests.attributes import compare
from tests.cluster import MIB, READ_ONLY_CAPS, Ceph, Mount, silent
from tests.mount.test_device import opened

Mounts = Callable[..., Mount]

RICH = ("--object-size", "1M", "--stripe-unit", "64K", "--stripe-count", "4", "--data-pool", "rbd")
KEYS = ["note", "with space and ü", "new\nline", "%2F/=@", "x" * 241, "too long" * 31, *(f"many{i}" for i in range(70))]


def attributes(path: Path) -> dict[str, str]:
    """All that getfattr would show, without the prefix."""
    found = {}
    for name in os.listxattr(path):
        assert name.startswith("user.rbd.")
        found[name.removeprefix("user.rbd.")] = os.fsdecode(os.getxattr(path, name))
    return found


def clone(ceph: Ceph, snapshot: str, child: str, *options: str) -> None:
    """Of version 2, which may be in another namespace than its parent, and whose parent may go to the trash."""
    ceph.run("rbd", "clone", "--rbd-default-clone-format", "2", snapshot, child, *options)


@dataclass(frozen=True, slots=True)
class Rich:
    """A clone in a namespace, with everything that an image can have; its parent in another pool and namespace."""

    pool: str
    parent_pool: str
    snapshot_id: int

    @property
    def spec(self) -> str:
        """As the `rbd` command has it."""
        return f"{self.pool}/team/rich"


@pytest.fixture(scope="module")
def rich(ceph: Ceph) -> Iterator[Rich]:
    pool, parent_pool = ceph.unique("rich"), ceph.unique("golden")
    for name in (pool, parent_pool):
        ceph.make_pool(name)
    with ceph.ioctx(pool) as ioctx, ceph.ioctx(parent_pool) as parent_ioctx:
        rbd.RBD().namespace_create(ioctx, "team")
        rbd.RBD().namespace_create(parent_ioctx, "base")
        ioctx.set_namespace("team")
        parent_ioctx.set_namespace("base")
        rbd.RBD().create(parent_ioctx, "parent", 8 * MIB, old_format=False)
        with rbd.Image(parent_ioctx, "parent") as image:
            image.create_snap("s1")
        clone(ceph, f"{parent_pool}/base/parent@s1", f"{pool}/team/rich", *RICH)
        with rbd.Image(ioctx, "rich") as image:
            image.create_snap("before")
            image.protect_snap("before")
            image.resize(3 * MIB)
            image.create_snap("after a\nshrink")
            snapshot_id = next(each["id"] for each in image.list_snaps() if each["name"] == "before")
            for key in KEYS:
                image.metadata_set(key, f"value of {key}")
        with rbd.Image(ioctx, "rich") as image:
            image.lock_exclusive("a cookie")
    yield Rich(pool, parent_pool, snapshot_id)
    for name in (pool, parent_pool):
        ceph.remove_pool(name)


def said(ceph: Ceph, *command: str) -> Any:
    """What a command of rbd says, in JSON."""
    return json.loads(ceph.run("rbd", *command, "--format", "json"))


@pytest.mark.parametrize("caps", [None, READ_ONLY_CAPS], ids=["watching", "read-only caps"])
def test_attributes_are_what_the_rbd_command_says(
    ceph: Ceph, mounts: Mounts, rich: Rich, caps: tuple[str, ...] | None
) -> None:
    mount = mounts(*ceph.credentials(caps))
    file = mount.path / rich.spec
    with ceph.ioctx(rich.pool) as ioctx:
        ioctx.set_namespace("team")
        with rbd.Image(ioctx, "rich") as image:  # somebody who watches
            found = attributes(file)
            (watcher,) = said(ceph, "status", rich.spec)["watchers"]
            assert found["watchers"] == "{address} client.{client} cookie={cookie}".format(**watcher)
            assert image.stat()["size"] == 3 * MIB
    assert attributes(file)["watchers"] == ""
    compare(found, said(ceph, "info", rich.spec))
    assert found["parent"] == f"{rich.parent_pool}/base/parent@s1"
    assert (found["pool"], found["namespace"], found["data_pool"]) == (rich.pool, "team", "rbd")
    assert (found["stripe_unit"], found["stripe_count"], found["object_size"]) == ("65536", "4", str(MIB))
    (lock,) = said(ceph, "lock", "ls", rich.spec)
    assert found["lock_owner"] == f"{lock['locker']} {lock['id']} {lock['address']}"
    assert found["snapshots"] == "before\nafter a\nshrink"
    metadata = {key.removeprefix("meta."): value for key, value in found.items() if key.startswith("meta.")}
    assert metadata == {key: f"value of {key}" for key in KEYS if len(key) <= 241}
    assert not {"snapshot", "snapshot_id", "protected"} & found.keys()

    found = attributes(file.with_name("rich@before"))
    compare(found, said(ceph, "info", f"{rich.spec}@before"))
    assert (found["snapshot"], found["snapshot_id"]) == ("before", str(rich.snapshot_id))
    assert (found["protected"], found["parent_overlap"]) == ("True", str(8 * MIB))
    assert attributes(file.with_name("rich@after a\nshrink"))["parent_overlap"] == str(3 * MIB)


def test_a_value_that_is_too_long_for_an_attribute_is_e2big(ceph: Ceph, mount: Mount) -> None:
    name = ceph.unique("long")
    ceph.make_image(name, b"x")
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
        image.metadata_set("longest", "x" * 65536)
        image.metadata_set("too long", "x" * 65537)
    assert os.getxattr(mount.image(name), "user.rbd.meta.longest") == b"x" * 65536
    with pytest.raises(OSError, match="Argument list too long"):
        os.getxattr(mount.image(name), "user.rbd.meta.too long")


def test_a_plain_image_has_empty_attributes_for_what_it_has_not(ceph: Ceph, mount: Mount) -> None:
    name = ceph.unique("plain")
    ceph.make_image(name, b"x", stripe_count=0)
    found = attributes(mount.image(name))
    compare(found, said(ceph, "info", f"rbd/{name}"))
    empty = {"namespace", "flags", "data_pool", "parent", "parent_overlap", "snapshots", "watchers", "lock_owner"}
    assert {key for key, value in found.items() if not value} == empty
    shown = subprocess.run(["getfattr", "-d", mount.image(name)], check=True, capture_output=True, text=True).stdout
    assert 'user.rbd.object_size="4194304"\n' in shown


def test_an_image_of_format_1_says_what_it_knows(ceph: Ceph, mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBD_FORCE_ALLOW_V1", "1")
    name = ceph.unique("old")
    with ceph.ioctx() as ioctx:
        rbd.RBD().create(ioctx, name, 3 * MIB, order=20, old_format=True)
        with rbd.Image(ioctx, name) as image:
            image.create_snap("s")
    info = said(ceph, "info", f"rbd/{name}")
    for path in (mount.image(name), mount.image(f"{name}@s")):
        found = attributes(path)
        assert (found["object_size"], found["stripe_count"], found["snapshots"]) == (str(MIB), "1", "s")
        assert found["block_name_prefix"] == info["block_name_prefix"]
    assert (found["snapshot"], found["protected"]) == ("s", "False")


def test_a_parent_in_the_trash_is_named_as_rbd_info_names_it(ceph: Ceph, mount: Mount) -> None:
    parent, child = ceph.unique("parent"), ceph.unique("child")
    with ceph.ioctx() as ioctx:
        rbd.RBD().create(ioctx, parent, MIB, old_format=False)
        with rbd.Image(ioctx, parent) as image:
            image.create_snap("s")
            parent_id = image.id()
        clone(ceph, f"rbd/{parent}@s", f"rbd/{child}")
        rbd.RBD().trash_move(ioctx, parent)
    assert attributes(mount.image(child))["parent"] == f"rbd/{parent}@s (trash {parent_id})"
    assert f"parent: rbd/{parent}@s (trash {parent_id})\n" in ceph.run("rbd", "info", f"rbd/{child}")


def test_other_attributes_and_directories_have_none_and_the_cluster_is_not_asked(
    ceph: Ceph, mounts: Callable[..., Mount]
) -> None:
    mount = mounts(module="tests.patient_mount")
    name = ceph.unique("asked")
    ceph.make_image(name, b"x")
    # A descriptor, so that the kernel need not look it up again. A question to the cluster would wait.
    with opened(mount.image(name), os.O_PATH) as file, silent(ceph, "osd.0"):
        path = f"/proc/self/fd/{file}"
        answers = {
            "security.selinux": errno.ENOTSUP,
            "system.posix_acl_access": errno.ENOTSUP,
            "user.other": errno.ENODATA,
        }
        for attribute, answer in answers.items():
            with pytest.raises(OSError, match=r"No data|not supported") as caught:
                os.getxattr(path, attribute)
            assert caught.value.errno == answer
        assert os.getxattr(path, "user.rbd.pool") == b"rbd"
        assert os.listxattr(mount.path) == []
    for attribute in ("user.rbd.nothing", "user.rbd.meta.nothing", "user.rbd.protected"):
        with pytest.raises(OSError, match="No data"):
            os.getxattr(mount.image(name), attribute)
    assert os.listxattr(mount.path / "rbd") == []


def test_a_broken_image_fails_alone_and_says_what_it_can(ceph: Ceph, mount: Mount) -> None:
    fine, broken = ceph.unique("fine"), ceph.unique("broken")
    for name in (fine, broken):
        ceph.make_image(name, b"content")
    with ceph.ioctx() as ioctx:
        with rbd.Image(ioctx, broken, read_only=True) as image:
            image_id = image.id()
        ioctx.remove_object(f"rbd_header.{image_id}")
        try:
            assert attributes(mount.image(broken)) == {"id": image_id, "pool": "rbd", "namespace": ""}
            with pytest.raises(FileNotFoundError):
                os.getxattr(mount.image(broken), "user.rbd.features")
            assert attributes(mount.image(fine))["pool"] == "rbd"
        finally:
            ioctx.remove_object(f"rbd_id.{broken}")
            ceph.run("rados", "-p", "rbd", "rmomapkey", "rbd_directory", f"name_{broken}")
            ceph.run("rados", "-p", "rbd", "rmomapkey", "rbd_directory", f"id_{image_id}")
