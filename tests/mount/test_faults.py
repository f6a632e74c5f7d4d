"""What a reader gets when something breaks: an error, never a short read, never zeros; and the mount lives on."""

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import rbd

from tests.cluster import MIB, READ_ONLY_CAPS, Ceph, Mount, random_bytes, wait_until

Mounts = Callable[..., Mount]


def test_a_read_that_no_osd_answers_fails_and_the_mount_lives_on(ceph: Ceph, mounts: Mounts) -> None:
    name = ceph.unique("timeout")
    content = random_bytes(16 * MIB)
    ceph.make_image(name, content)
    mount = mounts("--osd-timeout", "5", module="tests.patient_mount")
    mount.expect("ERROR", "WARNING")
    with mount.image(name).open("rb", buffering=0) as file:
        assert file.read(4096) == content[:4096]
        ceph.devcluster.kill_daemon("osd.0")
        try:
            with pytest.raises(OSError, match=r"timed out|Input/output") as caught:
                os.pread(file.fileno(), 4096, 12 * MIB)
            assert caught.value.errno in {errno.ETIMEDOUT, errno.EIO}
            assert f"cannot read rbd/{name} at {12 * MIB}" in mount.log
        finally:
            ceph.devcluster.start_daemon("osd.0")

        def reads_again() -> bool:
            try:
                return os.pread(file.fileno(), 4096, 12 * MIB) == content[12 * MIB : 12 * MIB + 4096]
            except TimeoutError:  # the placement group of this object is not active yet
                return False

        wait_until(reads_again, 180)


def test_names_that_no_osd_answers_for_are_looked_up_side_by_side(ceph: Ceph, mounts: Mounts) -> None:
    names = [ceph.unique("silent") for _ in range(6)]
    for name in names:
        ceph.make_image(name, b"content")
    mount = mounts("--osd-timeout", "5")
    mount.expect("ERROR", "WARNING")
    assert mount.image(names[0]).stat().st_size == 7
    ceph.devcluster.kill_daemon("osd.0")
    try:
        ended: list[float] = []

        def look(name: str) -> None:
            with pytest.raises(OSError, match="timed out"):
                mount.image(name).stat()
            ended.append(time.monotonic())

        threads = [threading.Thread(target=look, args=(name,)) for name in names[1:]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        # One after the other, the kernel would wait 5 s for each.
        assert len(ended) == 5
        assert max(ended) - min(ended) < 5
    finally:
        ceph.devcluster.start_daemon("osd.0")


def test_a_pool_that_no_osd_answers_for_stays_in_the_listing_and_fails_alone(ceph: Ceph, mounts: Mounts) -> None:
    # Of one pool: those of other tests would take their time, too.
    mount = mounts("--osd-timeout", "5", "--pool", "rbd", module="tests.patient_mount")
    mount.expect("ERROR", "WARNING")
    pools = os.listdir(mount.path)
    assert pools == ["rbd"]
    ceph.devcluster.kill_daemon("osd.0")
    try:
        assert os.listdir(mount.path) == pools
        done = subprocess.run(["ls", "-lR", mount.path], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "timed out" in done.stderr
    finally:
        ceph.devcluster.start_daemon("osd.0")
    wait_until(lambda: is_listed(mount.path / "rbd"), 180)


def is_listed(folder: Path) -> bool:
    """Whether a listing is no error."""
    try:
        os.listdir(folder)
    except TimeoutError:
        return False
    return True


def test_a_read_waits_for_an_osd_that_comes_back(ceph: Ceph, mount: Mount) -> None:
    name = ceph.unique("restart")
    content = random_bytes(16 * MIB)
    ceph.make_image(name, content)
    with mount.image(name).open("rb", buffering=0) as file:
        ceph.devcluster.kill_daemon("osd.0")
        read: list[bytes] = []
        descriptor = file.fileno()
        reader = threading.Thread(target=lambda: read.append(os.pread(descriptor, MIB, 8 * MIB)))
        reader.start()
        ceph.devcluster.start_daemon("osd.0")
        reader.join(180)
        assert read == [content[8 * MIB : 9 * MIB]]


def test_an_object_that_cannot_be_read_is_an_error_with_the_image_and_the_offset(ceph: Ceph, mounts: Mounts) -> None:
    # A key that may read what the header and the directory say, but no data object of this image.
    name = ceph.unique("nodata")
    content = random_bytes(8 * MIB)
    ceph.make_image(name, content)
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name, read_only=True) as image:
        first_object = f"{image.block_name_prefix()}.0000000000000000"
    allowed = [
        "rbd_directory",
        "rbd_namespace",
        "rbd_header",
        "rbd_id",
        "rbd_info",
        "rbd_object_map",
        "rbd_children",
        first_object,
    ]
    caps = ", ".join(["allow class-read", *(f"allow rx pool=rbd object_prefix {prefix}" for prefix in allowed)])
    keyring = ceph.make_key(ceph.unique("nodata"), "mon", "profile rbd", "osd", caps)
    mount = mounts("--id", keyring.name.split(".")[1], "-k", str(keyring))
    mount.expect("ERROR")
    with mount.image(name).open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), MIB, 0) == content[:MIB]
        with pytest.raises(PermissionError):
            os.pread(file.fileno(), MIB, 6 * MIB)
        assert os.pread(file.fileno(), MIB, MIB) == content[MIB : 2 * MIB]
    assert f"cannot read rbd/{name} at " in mount.log


@pytest.mark.parametrize("caps", [None, READ_ONLY_CAPS], ids=["watching", "read-only caps"])
def test_a_shrunk_image_ends_at_its_new_end(ceph: Ceph, mounts: Mounts, caps: tuple[str, ...] | None) -> None:
    mount, name = mounts(*ceph.credentials(caps)), ceph.unique("shrinks")
    content = random_bytes(8 * MIB)
    ceph.make_image(name, content)
    with mount.image(name).open("rb", buffering=0) as file:
        ceph.resize_image(name, 3 * MIB)
        wait_until(lambda: os.fstat(file.fileno()).st_size == 3 * MIB)
        assert os.pread(file.fileno(), MIB, 2 * MIB + 5) == content[2 * MIB + 5 : 3 * MIB]
        assert os.pread(file.fileno(), MIB, 5 * MIB) == b""


def test_an_unexpected_exception_is_eio_with_a_traceback_and_the_mount_lives_on(ceph: Ceph, mounts: Mounts) -> None:
    name = ceph.unique("fine")
    ceph.make_image(name, b"content")
    mount = mounts(module="tests.exploding_mount")
    mount.expect("ERROR", "Traceback")
    with pytest.raises(OSError, match="Input/output"):
        mount.image("explodes").stat()
    assert "ZeroDivisionError: nobody expects this" in mount.log
    assert mount.image(name).read_bytes() == b"content"


def test_an_image_without_its_header_fails_alone(ceph: Ceph, mount: Mount) -> None:
    name, broken = ceph.unique("fine"), ceph.unique("broken")
    ceph.make_image(name, b"content")
    ceph.make_image(broken, b"content")
    with ceph.ioctx() as ioctx:
        with rbd.Image(ioctx, broken, read_only=True) as image:
            header = f"rbd_header.{image.id()}"
        ioctx.remove_object(header)
        try:
            mount.expect("ERROR")
            with pytest.raises(OSError, match="Input/output"):
                mount.image(broken).open("rb")
            assert name in os.listdir(mount.path / "rbd")
            assert mount.image(name).read_bytes() == b"content"
        finally:
            ioctx.remove_object(f"rbd_id.{broken}")
            ceph.run("rados", "-p", "rbd", "rmomapkey", "rbd_directory", f"name_{broken}")
            ceph.run("rados", "-p", "rbd", "rmomapkey", "rbd_directory", f"id_{header.removeprefix('rbd_header.')}")
