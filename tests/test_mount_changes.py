"""The truth while things change: what a reader gets while others remove, shrink, roll back or move what it reads."""

import contextlib
import errno
import json
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import rbd

from tests.ceph import MIB, READ_ONLY_CAPS, Ceph, Mount, random_bytes, wait_until

Mounts = Callable[..., Mount]

SECONDS = 8.0
"""Within seconds, on a busy machine."""
NO_CACHE = ("--direct-io", "--cache-size", "0")
"""So that every read() is one of librbd."""
LAYERING = rbd.RBD_FEATURE_LAYERING
ALL_FEATURES = 61


@pytest.fixture(params=[None, READ_ONLY_CAPS], ids=["watching", "read-only caps"])
def caps(request: pytest.FixtureRequest) -> tuple[str, ...] | None:
    """What the key may."""
    caps: tuple[str, ...] | None = request.param
    return caps


@pytest.fixture
def bare(ceph: Ceph, mounts: Mounts, caps: tuple[str, ...] | None) -> Mount:
    """A mount that caches nothing, whose log may hold errors."""
    mount = mounts(*NO_CACHE, *ceph.credentials(caps))
    mount.expect("ERROR", "WARNING")
    return mount


@dataclass
class Reading:
    """What came of reading a file again and again, at random places."""

    file: int
    content: bytes
    reads: int = 0
    """That gave bytes."""
    wrong: list[tuple[int, int]] = field(default_factory=list)
    """Offset and length of what was no piece of the content."""
    ends: list[int] = field(default_factory=list)
    """Where the file ended."""
    errors: list[int] = field(default_factory=list)


@contextlib.contextmanager
def reading(path: Path, content: bytes, readers: int = 3) -> Iterator[Reading]:
    """Read a file in the background."""
    stop = threading.Event()
    result = Reading(os.open(path, os.O_RDONLY), content)

    def read(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            length = chance.choice([4096, 65536, MIB])
            offset = chance.randrange(len(content) - length)
            try:
                data = os.pread(result.file, length, offset)
            except OSError as error:
                result.errors.append(error.errno or 0)
                stop.wait(0.01)
                continue
            result.reads += 1
            if data != content[offset : offset + len(data)]:
                result.wrong.append((offset, length))
            if len(data) < length:
                result.ends.append(offset + len(data))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(readers)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: result.reads > 20)
        yield result
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
        with contextlib.suppress(OSError):
            os.close(result.file)


def features_of(ceph: Ceph, features: int) -> dict[str, object]:
    """Options of `Ceph.make_image`."""
    return {"features": features}


@pytest.mark.parametrize("features", [ALL_FEATURES, LAYERING], ids=["all features", "layering"])
@pytest.mark.parametrize("how", ["rm", "trash"])
def test_a_removed_image_is_eio_within_seconds_and_never_zeros(
    ceph: Ceph, mounts: Mounts, features: int, how: str
) -> None:
    mount = mounts(*NO_CACHE, *ceph.credentials(READ_ONLY_CAPS))
    mount.expect("ERROR", "WARNING")
    name, content = ceph.unique("removed"), random_bytes(96 * MIB)
    ceph.make_image(name, content, MIB, features=features)
    with reading(mount.image(name), content) as result:
        if how == "rm":
            ceph.run("rbd", "rm", "--no-progress", f"rbd/{name}")
        else:
            with ceph.ioctx() as ioctx:
                with rbd.Image(ioctx, name, read_only=True) as image:
                    image_id = image.id()
                rbd.RBD().trash_move(ioctx, name)
                rbd.RBD().trash_remove(ioctx, image_id)
        wait_until(lambda: errno.EIO in result.errors, SECONDS)
        reads = result.reads
        wait_until(lambda: len(result.errors) > 50)
        assert result.reads == reads
        with pytest.raises(OSError, match="Input/output"):
            os.close(result.file)
    assert not result.wrong
    assert set(result.errors) <= {errno.EIO, errno.EBADF}
    assert f"rbd/{name} was removed while it was open" in mount.log
