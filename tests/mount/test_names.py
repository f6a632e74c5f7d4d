"""Names of any kind, namespaces and snapshots as files, on a real mount."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import rbd

from rbdfs.fuse.names import encode
from tests.cluster import MIB, READ_ONLY_CAPS, Ceph, Mount, wait_until

Mounts = Callable[..., Mount]

ODD = [
    *("a/b", "a@b", "@", "/", "100%", "%41", "%", ".", "..", "...", ".snap", ".hidden", "-x", " lead", "trail "),
    *("new\nline", "tab\t\x01", "back\\slash", "é", "日本", "x" * 255, "x" * 256, "y" * 1000, "é/" * 120),
]
"""All that librbd takes for an image: it refuses only the empty name, and what makes an object's name too long."""
ODD_NAMESPACES = ["ns", "a/b", "a@b", ".", "..", ".snap", "%41", "é", "x" * 255]
ODD_SNAPSHOTS = ["", *ODD]
"""librbd takes the empty name for a snapshot."""
NOT_UTF8 = b"not\xffutf8"


@pytest.fixture(scope="module")
def pool(ceph: Ceph) -> Iterator[str]:
    """A pool for the odd ones."""
    name = ceph.unique("odd")
    ceph.make_pool(name)
    yield name
    ceph.remove_pool(name)


@contextmanager
def opened(ceph: Ceph, pool: str, name: str, namespace: str = "") -> Iterator[rbd.Image]:
    """An image, to change it."""
    with ceph.ioctx(pool) as ioctx:
        ioctx.set_namespace(namespace)
        with rbd.Image(ioctx, name) as image:
            yield image


def make(ceph: Ceph, pool: str, name: str, content: bytes = b"", namespace: str = "") -> None:
    """A small image."""
    with ceph.ioctx(pool) as ioctx:
        ioctx.set_namespace(namespace)
        rbd.RBD().create(ioctx, name, max(len(content), MIB), order=20, old_format=False)
        if content:
            with rbd.Image(ioctx, name) as image:
                image.write(content, 0)


def make_namespace(ceph: Ceph, pool: str, name: str) -> None:
    """As `rbd namespace create`."""
    with ceph.ioctx(pool) as ioctx:
        rbd.RBD().namespace_create(ioctx, name)


def test_every_name_that_librbd_takes_is_listed_and_can_be_opened(ceph: Ceph, mounts: Mounts) -> None:
    pool = ceph.unique("names")
    ceph.make_pool(pool)
    try:
        for number, name in enumerate(ODD):
            make(ceph, pool, name, bytes([number]) * 10)
        namespace = pool.encode() + b"/n" + NOT_UTF8
        for command in (
            (b"create", b"--size", b"1M", pool.encode() + b"/" + NOT_UTF8),
            (b"namespace", b"create", namespace),
            (b"create", b"--size", b"1M", namespace + b"/" + NOT_UTF8),
        ):
            subprocess.run([b"rbd", *command], env=os.environ | {"CEPH_CONF": str(ceph.conf)}, check=True)
        expected = {encode(name): number for number, name in enumerate(ODD)}
        not_utf8 = os.fsdecode(NOT_UTF8)
        for caps in (None, READ_ONLY_CAPS):
            folder = mounts("--pool", pool, *ceph.credentials(caps)).path / pool
            assert set(os.listdir(folder)) == {not_utf8, f"n{not_utf8}", *expected}
            assert (folder / not_utf8).read_bytes() == bytes(MIB)
            assert (folder / f"n{not_utf8}" / not_utf8).read_bytes() == bytes(MIB)
            for name, number in expected.items():
                assert (folder / name).read_bytes()[:10] == bytes([number]) * 10, name
            # One file has one name: no other spelling leads to it.
            assert not [name for name in ("%2f", "%61", "%", "y" * 200 + "%~") if (folder / name).exists()]
    finally:
        ceph.remove_pool(pool)


# Ceph's own binding does so, up to 18.2 at least, and Python 3.12 and later warn of it.
@pytest.mark.filterwarnings("ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning")
def test_snapshots_are_files_by_name_and_in_a_hidden_directory(ceph: Ceph, mounts: Mounts, pool: str) -> None:
    image = ceph.unique("snapped@")
    make(ceph, pool, image)
    with opened(ceph, pool, image) as writer:
        for number, name in enumerate(ODD_SNAPSHOTS):
            writer.resize((number + 1) * MIB)
            writer.write(b"x" * MIB, number * MIB)
            writer.create_snap(name)
        times = {each["name"]: writer.get_snap_timestamp(each["id"]) for each in writer.list_snaps()}
    mount = mounts("--pool", pool)
    folder, file_name = mount.path / pool, encode(image)
    assert file_name in os.listdir(folder)
    assert not [name for name in os.listdir(folder) if "@" in name or name == ".snap"]
    listed = folder / ".snap" / file_name
    assert file_name in os.listdir(folder / ".snap")
    assert sorted(os.listdir(listed)) == sorted(map(encode, ODD_SNAPSHOTS))
    for number, name in enumerate(ODD_SNAPSHOTS):
        status = (listed / encode(name)).stat()
        assert status.st_size == status.st_blocks * 512 == (number + 1) * MIB
        assert int(status.st_mtime) == int(times[name].timestamp())
        by_name = f"{file_name}@{encode(name)}"
        if len(os.fsencode(by_name)) <= 255:
            assert (folder / by_name).stat().st_ino == status.st_ino
            assert (folder / by_name).stat().st_size == status.st_size
    inodes = [entry.inode() for entry in os.scandir(listed)]
    assert len({*inodes, (folder / file_name).stat().st_ino}) == len(ODD_SNAPSHOTS) + 1
    assert int(listed.stat().st_mtime) == max(int(each.timestamp()) for each in times.values())
    for missing in (".snap/nope", f".snap/{file_name}/nope", f"{file_name}@nope", f"{file_name}@", "nope@%", "@"):
        assert not (folder / missing).exists()


def test_snapshots_made_renamed_and_removed_elsewhere_show_within_a_second(ceph: Ceph, mount: Mount) -> None:
    image = ceph.unique("later")
    make(ceph, "rbd", image)
    folder = mount.path / "rbd" / ".snap" / image
    assert os.listdir(folder) == []
    with opened(ceph, "rbd", image) as writer:
        writer.create_snap("one")
        wait_until((folder / "one").exists, 3)
        writer.rename_snap("one", "two")
        wait_until(lambda: os.listdir(folder) == ["two"] and not (folder / "one").exists(), 3)
        writer.remove_snap("two")
    wait_until(lambda: not mount.image(f"{image}@two").exists(), 3)
    assert os.listdir(folder) == []


def test_only_what_users_made_is_a_snapshot(ceph: Ceph, mount: Mount) -> None:
    image, clone, group = ceph.unique("mixed"), ceph.unique("clone"), ceph.unique("group")
    make(ceph, "rbd", image)
    with ceph.ioctx() as ioctx, opened(ceph, "rbd", image) as writer:
        writer.create_snap("mine")
        writer.create_snap("trashed")
        ceph.run("rbd", "clone", "--rbd-default-clone-format=2", f"rbd/{image}@trashed", f"rbd/{clone}")
        writer.remove_snap("trashed")  # its clone keeps it, in the trash
        rbd.RBD().group_create(ioctx, group)
        rbd.Group(ioctx, group).add_image(ioctx, image)
        rbd.Group(ioctx, group).create_snap("groups")
        assert len(list(writer.list_snaps())) == 3
    assert os.listdir(mount.path / "rbd" / ".snap" / image) == ["mine"]
    assert mount.image(clone).stat().st_size == MIB


def test_namespaces_are_directories_with_images_and_snapshots(ceph: Ceph, mounts: Mounts) -> None:
    pool = ceph.unique("spaces")
    ceph.make_pool(pool)
    try:
        for name in ODD_NAMESPACES:
            make_namespace(ceph, pool, name)
        make(ceph, pool, "image", b"in ns", namespace="ns")
        make(ceph, pool, "image", b"in the default one")
        with opened(ceph, pool, "image", "ns") as image:
            image.create_snap("snap")
        for caps in (None, READ_ONLY_CAPS):
            check_namespaces(mounts("--pool", pool, *ceph.credentials(caps)).path / pool)
    finally:
        ceph.remove_pool(pool)


def check_namespaces(folder: Path) -> None:
    """What the test above has made, in a mount of it."""
    assert set(os.listdir(folder)) == {"image", *(encode(name, 254) for name in ODD_NAMESPACES)}
    assert all((folder / encode(name, 254)).is_dir() for name in ODD_NAMESPACES)
    assert os.listdir(folder / "ns") == os.listdir(folder / "ns" / ".snap") == ["image"]
    assert os.listdir(folder / "a%2Fb") == []
    assert (folder / "ns" / "image").read_bytes().startswith(b"in ns")
    assert (folder / "image").read_bytes().startswith(b"in the default one")
    snapshot = folder / "ns" / "image@snap"
    assert os.listdir(folder / "ns/.snap/image") == ["snap"]
    assert (folder / "ns/.snap/image/snap").stat().st_ino == snapshot.stat().st_ino
    assert not [name for name in ("ns/ns", "ns/nope", "ns/@ns", "@nope", "image@snap") if (folder / name).exists()]
    inodes = [path.stat().st_ino for path in (folder, folder / ".snap", folder / "ns" / ".snap", *folder.rglob("*"))]
    assert len(set(inodes)) == len(inodes)


def test_a_namespace_with_the_name_of_an_image_is_reached_by_an_at_before_it(
    ceph: Ceph, mounts: Mounts, pool: str
) -> None:
    both, alone = ceph.unique("both"), ceph.unique("alone")
    for name in (both, alone):
        make_namespace(ceph, pool, name)
        make(ceph, pool, "inside", namespace=name)
    make(ceph, pool, both)
    folder = mounts("--pool", pool).path / pool
    assert {both, f"@{both}", alone} <= set(os.listdir(folder))
    assert f"@{alone}" not in os.listdir(folder)
    assert (folder / both).is_file()
    assert os.listdir(folder / f"@{both}") == os.listdir(folder / f"@{alone}") == os.listdir(folder / alone)
    assert (folder / f"@{alone}").stat().st_ino == (folder / alone).stat().st_ino


def test_a_directory_has_the_time_of_the_last_image_that_was_made_in_it(ceph: Ceph, mount: Mount, pool: str) -> None:
    folder = mount.path / pool
    before = folder.stat().st_mtime
    wait_until(lambda: time.time() > before + 1.1)  # librados tells of whole seconds
    make(ceph, pool, ceph.unique("newer"))
    wait_until(lambda: folder.stat().st_mtime > before, 3)
    listed = {entry.name: entry.stat().st_mtime for entry in os.scandir(mount.path)}
    assert listed[pool] == folder.stat().st_mtime == (folder / ".snap").stat().st_mtime


def test_a_pool_whose_name_is_no_file_name_is_listed_and_can_be_entered(ceph: Ceph, mounts: Mounts) -> None:
    ceph.rados.create_pool("..")
    try:
        with ceph.ioctx("..") as ioctx:
            rbd.RBD().pool_init(ioctx, True)
        make(ceph, "..", "inside")
        mount = mounts("--pool", "..")
        assert os.listdir(mount.path) == ["%2E."]
        assert os.listdir(mount.path / "%2E.") == ["inside"]
    finally:
        ceph.remove_pool("..")


def entries(folder: Path) -> list[str]:
    """What `find` finds, without the folder itself."""
    done = subprocess.run(["find", folder, "-mindepth", "1", "-printf", "%P\\0"], check=True, capture_output=True)
    return sorted(os.fsdecode(done.stdout).split("\0")[:-1])


def test_rsync_and_find_see_each_image_once(ceph: Ceph, mounts: Mounts, tmp_path: Path) -> None:
    pool = ceph.unique("once")
    ceph.make_pool(pool)
    try:
        make_namespace(ceph, pool, "ns")
        for name in ("a/b", "vm1", ".."):
            make(ceph, pool, name, name.encode())
        make(ceph, pool, "vm1", b"other", namespace="ns")
        for namespace in ("", "ns"):
            with opened(ceph, pool, "vm1", namespace) as image:
                image.create_snap("snap")
        folder = mounts("--pool", pool).path / pool
        subprocess.run(["rsync", "-a", f"{folder}/", f"{tmp_path}/"], check=True)
        assert entries(folder) == entries(tmp_path) == sorted(["a%2Fb", "vm1", "%2E.", "ns", "ns/vm1"])
        subprocess.run(["diff", "-r", folder, tmp_path], check=True)
        # What has not changed is not copied again, also by times and sizes alone.
        again = subprocess.run(["rsync", "-ai", f"{folder}/", f"{tmp_path}/"], check=True, capture_output=True)
        assert again.stdout == b""
        tar = subprocess.run(["tar", "-cf", "-", "-C", folder, "."], check=True, capture_output=True)
        assert tar.stderr == b""
    finally:
        ceph.remove_pool(pool)
