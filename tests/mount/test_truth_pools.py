"""A pool is removed from under an image: its bytes are an error then, and never zeros."""

import contextlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.cluster import MIB, Ceph, Mount, random_bytes, wait_until
from tests.truth import (
    FEATURES,
    OBJECT,
    assert_same,
    cat,
    copied,
    idle,
    in_modes,
    opened,
    read_all,
)

CONTENT = random_bytes(24 * MIB, seed=4)
"""More than what is read ahead."""
FOUR_MODES = in_modes(("default", "watching"), ("default", "read-only"), ("bare", "watching"), ("bare", "read-only"))


@pytest.fixture
def pool(ceph: Ceph) -> Iterator[str]:
    """A pool that the test removes."""
    name = ceph.unique("removed")
    ceph.make_pool(name)
    yield name
    with contextlib.suppress(AssertionError):
        ceph.remove_pool(name)


def assert_right_or_error(file: int) -> None:
    """Read all of an open file, by pieces."""
    for offset in range(0, len(CONTENT), OBJECT):
        with contextlib.suppress(OSError):
            assert_same(read_all(file, OBJECT, offset), CONTENT[offset : offset + OBJECT])


def assert_copies_fail(path: Path, folder: Path) -> None:
    """As soon as the mount has heard of the removal; before it, a copy is right."""

    def fails(read: Callable[[], bytes]) -> bool:
        try:
            assert_same(read(), CONTENT)
        except subprocess.CalledProcessError:
            return True
        return False

    wait_until(partial(fails, partial(cat, path)))
    wait_until(partial(fails, partial(copied, path, folder)))


def assert_no_piece_is_zeros(path: Path) -> None:
    """Of a new open(), what a pool held that is gone is an error."""
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_RDONLY)
        try:
            assert_right_or_error(file)
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):  # all of it held data
                with contextlib.suppress(OSError):
                    assert os.lseek(file, 0, whence) == (0 if whence == os.SEEK_DATA else len(CONTENT))
        finally:
            with contextlib.suppress(OSError):
                os.close(file)


def newest_map_of_osd(ceph: Ceph) -> int:
    """The epoch."""
    status, answer, error = ceph.rados.osd_command(0, json.dumps({"prefix": "status"}), b"")
    assert status == 0, error
    return int(json.loads(answer)["newest_map"])


def assert_it_fails_when_the_pool_is_removed(ceph: Ceph, mount: Mount, path: Path, pool: str, tmp_path: Path) -> None:
    """What is read of a file is right before, and right or an error afterwards."""
    with idle(path) as older:
        assert_same(read_all(older, MIB, MIB), CONTENT[MIB : 2 * MIB])
        ceph.remove_pool(pool)
        # An OSD that has not heard of it serves the pool on, and what is read then stays cached.
        removed_at = json.loads(ceph.tell_mon("osd stat", format="json"))["epoch"]
        wait_until(lambda: newest_map_of_osd(ceph) >= removed_at)
        assert_right_or_error(older)
        assert_copies_fail(path, tmp_path)
        assert_no_piece_is_zeros(path)
    assert_no_piece_is_zeros(path)
    assert mount.is_running


@FOUR_MODES
@pytest.mark.parametrize("snapshot", [False, True], ids=["HEAD", "snapshot"])
def test_what_a_data_pool_held_is_an_error_when_it_is_removed(
    ceph: Ceph, mode_mount: Mount, pool: str, tmp_path: Path, *, snapshot: bool
) -> None:
    name = ceph.unique("data")
    ceph.make_image(name, CONTENT, OBJECT, features=FEATURES, data_pool=pool)
    with opened(ceph, name) as image:
        image.create_snap("s")
    path = mode_mount.image(f"{name}@s" if snapshot else name)
    assert_it_fails_when_the_pool_is_removed(ceph, mode_mount, path, pool, tmp_path)


@FOUR_MODES
@pytest.mark.parametrize("snapshot", [False, True], ids=["HEAD", "snapshot"])
def test_what_a_parents_pool_held_is_an_error_when_it_is_removed(
    ceph: Ceph, mode_mount: Mount, pool: str, tmp_path: Path, *, snapshot: bool
) -> None:
    parent, child = ceph.unique("parent"), ceph.unique("child")
    ceph.make_image(parent, CONTENT, OBJECT, features=FEATURES, pool=pool)
    with opened(ceph, parent, pool) as image:
        image.create_snap("base")
    ceph.run("rbd", "clone", "--rbd-default-clone-format", "2", f"{pool}/{parent}@base", f"rbd/{child}")
    with opened(ceph, child) as image:
        image.create_snap("s")
    path = mode_mount.image(f"{child}@s" if snapshot else child)
    assert_it_fails_when_the_pool_is_removed(ceph, mode_mount, path, pool, tmp_path)
