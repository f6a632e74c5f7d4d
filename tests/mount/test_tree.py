"""Pools and images as directories and files, and what others do to them meanwhile; on a real mount."""

import errno
import os
from collections.abc import Callable

import pytest
import rbd

from tests.cluster import MIB, READ_ONLY_CAPS, Ceph, Mount, random_bytes, wait_until

Mounts = Callable[..., Mount]
FRESH_SECONDS = 3.0
"""The promised second, and what a busy machine needs to ask."""


def test_the_root_lists_pools_and_a_pool_its_images_as_read_only_files(ceph: Ceph, mount: Mount) -> None:
    name = ceph.unique("listed")
    ceph.make_image(name, random_bytes(5 * MIB), MIB)
    assert "rbd" in os.listdir(mount.path)
    assert name in os.listdir(mount.path / "rbd")
    status = mount.image(name).stat()
    assert (status.st_mode, status.st_size, status.st_blksize) == (0o100444, 5 * MIB, 256 << 10)
    assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name, read_only=True) as image:
        assert int(status.st_mtime) == int(status.st_ctime) == int(image.modify_timestamp().timestamp())


def test_inodes_are_the_same_at_the_next_mount_and_after_a_rename(ceph: Ceph, mounts: Mounts) -> None:
    name, renamed = ceph.unique("inode"), ceph.unique("renamed")
    ceph.make_image(name, b"x")
    first = mounts()
    inodes = [first.path.joinpath(path).stat().st_ino for path in ("rbd", f"rbd/{name}")]
    listed = {entry.name: entry.inode() for entry in os.scandir(first.path / "rbd")}
    assert listed[name] == inodes[1]
    ceph.run("rbd", "rename", f"rbd/{name}", f"rbd/{renamed}")
    second = mounts()
    assert [second.path.joinpath(path).stat().st_ino for path in ("rbd", f"rbd/{renamed}")] == inodes
    assert len(set(inodes)) == 2


@pytest.mark.parametrize(
    "attempt",
    [
        lambda path: path.open("r+b"),
        lambda path: path.open("ab"),
        lambda path: path.with_name("new").open("wb"),
        lambda path: path.unlink(),
        lambda path: path.rename(path.with_name("other")),
        lambda path: path.with_name("dir").mkdir(),
        lambda path: path.parent.rmdir(),
        lambda path: os.truncate(path, 0),
        lambda path: path.chmod(0o644),
        lambda path: os.utime(path),
        lambda path: path.with_name("link").symlink_to("x"),
    ],
)
def test_writes_creates_and_removals_fail_with_erofs(ceph: Ceph, mount: Mount, attempt: Callable[..., object]) -> None:
    name = ceph.unique("readonly")
    ceph.make_image(name, b"content")
    with pytest.raises(OSError, match="Read-only") as caught:
        attempt(mount.image(name))
    assert caught.value.errno == errno.EROFS


def test_what_is_not_there_is_enoent(mount: Mount) -> None:
    for path in ("nope", "rbd/nope"):
        with pytest.raises(FileNotFoundError):
            (mount.path / path).stat()


def test_a_pool_without_the_application_rbd_is_not_there(ceph: Ceph, mount: Mount) -> None:
    pool = ceph.unique("plain")
    ceph.tell_mon("osd pool create", pool=pool, pg_num=8)
    try:
        assert pool not in os.listdir(mount.path)
        assert not (mount.path / pool).exists()
    finally:
        ceph.remove_pool(pool)


def test_statfs_shows_the_capacity_of_the_cluster(ceph: Ceph, mount: Mount) -> None:
    shown, stats = os.statvfs(mount.path), ceph.rados.get_cluster_stats()
    assert shown.f_blocks * shown.f_frsize == stats["kb"] * 1024
    assert abs(shown.f_bavail * shown.f_frsize - stats["kb_avail"] * 1024) < 256 * MIB


def test_images_made_renamed_resized_and_removed_elsewhere_show_within_a_second(ceph: Ceph, mount: Mount) -> None:
    name, renamed = ceph.unique("new"), ceph.unique("renamed")
    assert not mount.image(name).exists()
    ceph.make_image(name, b"content")
    wait_until(mount.image(name).exists, FRESH_SECONDS)
    ceph.resize_image(name, 9 * MIB)
    wait_until(lambda: mount.image(name).stat().st_size == 9 * MIB, FRESH_SECONDS)
    ceph.run("rbd", "rename", f"rbd/{name}", f"rbd/{renamed}")
    wait_until(lambda: not mount.image(name).exists(), FRESH_SECONDS)
    assert mount.image(renamed).stat().st_size == 9 * MIB
    ceph.remove_image(renamed)
    wait_until(lambda: not mount.image(renamed).exists(), FRESH_SECONDS)
    assert renamed not in os.listdir(mount.path / "rbd")


def test_pools_made_and_removed_elsewhere_show_within_a_second(ceph: Ceph, mount: Mount) -> None:
    pool = ceph.unique("pool")
    assert pool not in os.listdir(mount.path)
    ceph.make_pool(pool)
    try:
        ceph.make_image("image", b"content", pool=pool)
        wait_until((mount.path / pool / "image").exists, FRESH_SECONDS)
        assert pool in os.listdir(mount.path)
    finally:
        ceph.remove_pool(pool)
    wait_until(lambda: not (mount.path / pool).exists(), FRESH_SECONDS)


def test_only_the_pools_that_were_asked_for_are_shown(ceph: Ceph, mounts: Mounts) -> None:
    pool = ceph.unique("other")
    ceph.make_pool(pool)
    try:
        mount = mounts("--pool", pool)
        assert os.listdir(mount.path) == [pool]
        assert not (mount.path / "rbd").exists()
    finally:
        ceph.remove_pool(pool)


def test_a_pool_that_the_key_may_not_read_is_not_listed_and_is_eacces_by_name(ceph: Ceph, mounts: Mounts) -> None:
    pool = ceph.unique("secret")
    ceph.make_pool(pool)
    try:
        keyring = ceph.make_key("onepool", "mon", "profile rbd", "osd", "profile rbd-read-only pool=rbd")
        mount = mounts("--id", "onepool", "-k", str(keyring))
        assert os.listdir(mount.path) == ["rbd"]
        with pytest.raises(PermissionError):
            (mount.path / pool).stat()
    finally:
        ceph.remove_pool(pool)


def test_an_image_is_watched_only_while_it_is_open(ceph: Ceph, mount: Mount) -> None:
    name = ceph.unique("watched")
    ceph.make_image(name, b"content")
    mount.image(name).stat()
    assert ceph.watchers(name) == []
    with mount.image(name).open("rb") as first, mount.image(name).open("rb") as second:
        assert first.read() == second.read() == b"content"
        assert len(ceph.watchers(name)) == 1
    wait_until(lambda: ceph.watchers(name) == [])


def test_an_image_that_is_open_cannot_be_removed(ceph: Ceph, mount: Mount) -> None:
    name = ceph.unique("busy")
    ceph.make_image(name, b"content")
    with mount.image(name).open("rb") as file:
        with pytest.raises(rbd.ImageBusy):
            ceph.remove_image(name)
        assert file.read() == b"content"


@pytest.mark.parametrize("caps", [None, READ_ONLY_CAPS], ids=["watching", "read-only caps"])
def test_an_open_file_sees_the_image_grow_within_a_second(
    ceph: Ceph, mounts: Mounts, caps: tuple[str, ...] | None
) -> None:
    mount, name = mounts(*ceph.credentials(caps)), ceph.unique("grows")
    ceph.make_image(name, random_bytes(MIB))
    with mount.image(name).open("rb", buffering=0) as file:
        assert len(file.read(2 * MIB)) == MIB
        ceph.resize_image(name, MIB + 5)
        ceph.write_image(name, b"grown", MIB)
        wait_until(lambda: os.fstat(file.fileno()).st_size == MIB + 5, FRESH_SECONDS)
        assert os.pread(file.fileno(), 100, MIB) == b"grown"


def test_an_open_after_a_write_sees_it(ceph: Ceph, mount: Mount) -> None:
    name = ceph.unique("written")
    ceph.make_image(name, b"a" * MIB)
    for letter in b"bcd":
        ceph.write_image(name, bytes([letter]) * MIB)
        assert mount.image(name).read_bytes() == bytes([letter]) * MIB


def test_an_open_after_a_write_sees_it_while_the_writer_and_an_older_reader_stay(ceph: Ceph, mount: Mount) -> None:
    name = ceph.unique("live")
    ceph.make_image(name, b"a" * MIB)
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as writer, mount.image(name).open("rb") as older:
        assert older.read() == b"a" * MIB
        for letter in b"bcd":
            writer.write(bytes([letter]) * MIB, 0)
            writer.flush()
            older.seek(0)
            assert set(older.read()) <= {letter - 1, letter}
            assert mount.image(name).read_bytes() == bytes([letter]) * MIB
