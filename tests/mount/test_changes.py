"""The truth while things change: what a reader gets while others remove, shrink, roll back or move what it reads."""

import contextlib
import errno
import itertools
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import rbd

from tests.cluster import MIB, READ_ONLY_CAPS, Ceph, Mount, random_bytes, wait_until

Mounts = Callable[..., Mount]

SECONDS = 8.0
"""Within seconds, on a busy machine."""
NO_CACHE = ("--direct-io", "--cache-size", "0")
"""So that every read() is one of librbd."""
HUNG_SECONDS = 240.0
"""No run of all tests of a mount takes longer."""
WATCHING_CAPS = ("mon", "profile rbd", "osd", "profile rbd")
LAYERING = rbd.RBD_FEATURE_LAYERING
ALL_FEATURES = 61


CAPS = pytest.mark.parametrize("caps", [WATCHING_CAPS, READ_ONLY_CAPS], ids=["watching", "read-only caps"])


@pytest.fixture(scope="module", params=[WATCHING_CAPS, READ_ONLY_CAPS], ids=["watching", "read-only caps"])
def bare(request: pytest.FixtureRequest, ceph: Ceph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount that caches nothing, with each kind of caps, whose log may hold errors."""
    arguments = (*NO_CACHE, *ceph.credentials(request.param))
    mount = Mount(ceph, tmp_path_factory.mktemp("bare"), arguments, "rbdfs")
    mount.expect("ERROR", "WARNING")
    # A process that waits for a mount cannot be killed: the mount can.
    watchdog = threading.Timer(HUNG_SECONDS, os.kill, (mount.pid, signal.SIGKILL))
    watchdog.start()
    try:
        yield mount
    finally:
        mount.end()
        watchdog.cancel()


@dataclass
class Reading:
    """What came of reading a file again and again, at random places."""

    file: int
    contents: tuple[bytes, ...]
    """Each block is of one of them."""
    reads: int = 0
    """That gave bytes."""
    wrong: list[tuple[int, int]] = field(default_factory=list)
    """Offset and length of what was no piece of the content."""
    ends: list[int] = field(default_factory=list)
    """Where the file ended."""
    errors: list[int] = field(default_factory=list)

    def is_right(self, offset: int, data: bytes) -> bool:
        """Whether this may stand there."""
        if data == self.contents[0][offset : offset + len(data)]:
            return True
        edges = [0, *range(4096 - offset % 4096, len(data), 4096), len(data)]
        return all(
            any(data[start:end] == content[offset + start : offset + end] for content in self.contents)
            for start, end in itertools.pairwise(edges)
        )


def assert_reads_and_close_fail(result: Reading) -> None:
    """Soon no read works any more, and the close is an error."""
    wait_until(lambda: errno.EIO in result.errors, SECONDS)
    reads = result.reads
    wait_until(lambda: len(result.errors) > 50)
    assert result.reads == reads
    with pytest.raises(OSError, match="Input/output"):
        os.close(result.file)


def assert_only_errors_of_a_removed_image(result: Reading) -> None:
    """After the readers have ended: EBADF is of those that read a file that was closed."""
    assert not result.wrong
    assert set(result.errors) <= {errno.EIO, errno.EBADF}


@contextlib.contextmanager
def reading(path: Path, *contents: bytes, readers: int = 3) -> Iterator[Reading]:
    """Read a file in the background."""
    stop = threading.Event()
    result = Reading(os.open(path, os.O_RDONLY), contents)

    def read(seed: int) -> None:
        chance = random.Random(seed)
        while not stop.is_set():
            length = chance.choice([4096, 65536, MIB // 2])
            offset = chance.randrange(len(contents[0]) - length)
            try:
                data = os.pread(result.file, length, offset)
            except OSError as error:
                result.errors.append(error.errno or 0)
                stop.wait(0.01)
                continue
            result.reads += 1
            if not result.is_right(offset, data):
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


def clone(ceph: Ceph, parent: str, child: str, clone_format: int = 2) -> None:
    """As `rbd clone`; format 2 needs no protected snapshot."""
    ceph.run("rbd", "clone", "--rbd-default-clone-format", str(clone_format), parent, child)


@pytest.mark.parametrize("features", [ALL_FEATURES, LAYERING], ids=["all features", "layering"])
@pytest.mark.parametrize("how", ["rm", "trash"])
@pytest.mark.parametrize("bare", [READ_ONLY_CAPS], indirect=True, ids=["read-only caps"])
def test_a_removed_image_is_eio_within_seconds_and_never_zeros(
    ceph: Ceph, bare: Mount, features: int, how: str
) -> None:
    name, content = ceph.unique("removed"), random_bytes(24 * MIB)
    ceph.make_image(name, content, MIB // 16, features=features)
    with reading(bare.image(name), content) as result:
        if how == "rm":
            ceph.run("rbd", "rm", "--no-progress", f"rbd/{name}")
        else:
            with ceph.ioctx() as ioctx:
                with rbd.Image(ioctx, name, read_only=True) as image:
                    image_id = image.id()
                rbd.RBD().trash_move(ioctx, name)
                rbd.RBD().trash_remove(ioctx, image_id)
        assert_reads_and_close_fail(result)
    assert_only_errors_of_a_removed_image(result)
    assert f"rbd/{name} was removed while it was open" in bare.log


@pytest.mark.parametrize("bare", [READ_ONLY_CAPS], indirect=True, ids=["read-only caps"])
def test_a_removed_clone_is_eio_and_never_what_its_parent_holds(ceph: Ceph, bare: Mount) -> None:
    parent, child = ceph.unique("parent"), ceph.unique("child")
    content = random_bytes(24 * MIB, seed=2)
    ceph.make_image(parent, random_bytes(24 * MIB), MIB // 16, features=ALL_FEATURES)
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, parent) as image:
        image.create_snap("base")
    clone(ceph, f"rbd/{parent}@base", f"rbd/{child}")
    ceph.write_image(child, content)
    with reading(bare.image(child), content) as result:
        ceph.run("rbd", "rm", "--no-progress", f"rbd/{child}")
        wait_until(lambda: errno.EIO in result.errors, SECONDS)
    assert not result.wrong
    assert set(result.errors) <= {errno.EIO, errno.EBADF}


@pytest.mark.parametrize("features", [ALL_FEATURES, LAYERING], ids=["all features", "layering"])
def test_a_shrunk_image_ends_at_its_new_end_or_is_an_error_and_is_never_zeros(
    ceph: Ceph, bare: Mount, features: int
) -> None:
    name, content = ceph.unique("shrunk"), random_bytes(24 * MIB)
    size = 5 * MIB + 12_345
    ceph.make_image(name, content, MIB // 16, features=features)
    with reading(bare.image(name), content) as result:
        ceph.run("rbd", "resize", "--no-progress", "--allow-shrink", "--size", f"{size}B", f"rbd/{name}")
        wait_until(lambda: len(result.ends) > 20, SECONDS)
        wait_until(lambda: os.fstat(result.file).st_size == size, SECONDS)
        assert os.pread(result.file, MIB, size - 10) == content[size - 10 : size]
    assert not result.wrong
    assert not result.errors
    assert all(end >= size or end % 4096 == 0 for end in result.ends)


def test_what_is_grown_shows_within_a_second_to_tail_and_to_dd(ceph: Ceph, bare: Mount) -> None:
    name, content = ceph.unique("grown"), random_bytes(MIB)
    ceph.make_image(name, content)
    path = bare.image(name)
    with path.open("rb", buffering=0) as file:
        assert file.read() == content
        ceph.resize_image(name, 3 * MIB)
        ceph.write_image(name, b"grown", 3 * MIB - 5)
        wait_until(lambda: os.fstat(file.fileno()).st_size == 3 * MIB, 3)
        assert file.read() == bytes(2 * MIB - 5) + b"grown"
        tail = subprocess.run(["tail", "-c", "5", path], check=True, capture_output=True, timeout=30)
        dd = ["dd", f"if={path}", "bs=1M", "skip=2", "status=none"]
        assert tail.stdout == b"grown"
        assert subprocess.run(dd, check=True, capture_output=True, timeout=30).stdout == bytes(MIB - 5) + b"grown"


@pytest.mark.parametrize("features", [ALL_FEATURES, LAYERING], ids=["all features", "layering"])
def test_a_removed_snapshot_is_eio_within_seconds_and_never_what_came_after_it(
    ceph: Ceph, bare: Mount, features: int
) -> None:
    name, content = ceph.unique("snapped"), random_bytes(24 * MIB)
    ceph.make_image(name, content, MIB // 4, features=features)
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
        image.create_snap("one")
        image.write(random_bytes(6 * MIB, seed=2), 0)
        with reading(bare.image(f"{name}@one"), content) as result:
            image.remove_snap("one")
            for start in range(0, 24 * MIB, MIB):
                image.write(random_bytes(MIB, seed=3 + start), start)
            assert_reads_and_close_fail(result)
    assert_only_errors_of_a_removed_image(result)
    assert f"rbd/{name}@one was removed while it was open" in bare.log


def test_a_snapshot_that_a_clone_keeps_alive_is_gone_all_the_same(ceph: Ceph, bare: Mount) -> None:
    name, content = ceph.unique("cloned"), random_bytes(4 * MIB)
    ceph.make_image(name, content, features=ALL_FEATURES)
    with ceph.ioctx() as ioctx:
        with rbd.Image(ioctx, name) as image:
            image.create_snap("one")
        clone(ceph, f"rbd/{name}@one", f"rbd/{name}-child")
        child = os.open(bare.image(f"{name}-child"), os.O_RDONLY)
        with bare.image(f"{name}@one").open("rb", buffering=0) as file:
            assert file.read(MIB) == content[:MIB]
            with rbd.Image(ioctx, name) as image:
                image.remove_snap("one")

            def is_gone() -> bool:
                try:
                    assert os.pread(file.fileno(), MIB, 2 * MIB) == content[2 * MIB : 3 * MIB]
                except OSError as error:
                    return error.errno == errno.EIO
                return False  # it was seen in its place 20 ms before at most

            wait_until(is_gone)
            with pytest.raises(OSError, match="Input/output"):
                file.close()
        assert os.pread(child, 4 * MIB, 0) == content
        os.close(child)


def test_an_image_that_is_rolled_back_is_old_or_new_in_each_block(ceph: Ceph, bare: Mount) -> None:
    name = ceph.unique("rolled")
    old, new = random_bytes(8 * MIB, seed=1), random_bytes(8 * MIB, seed=2)
    ceph.make_image(name, old, MIB // 4, features=ALL_FEATURES)
    with ceph.ioctx() as ioctx:
        with rbd.Image(ioctx, name) as image:
            image.create_snap("before")
            image.write(new, 0)
        with reading(bare.image(name), new, old) as result, rbd.Image(ioctx, name) as image:
            image.rollback_to_snap("before")
        assert not result.wrong
        assert not result.errors
        with bare.image(name).open("rb") as file:
            assert file.read() == old


def test_a_clone_that_is_flattened_and_loses_its_parent_keeps_its_bytes(ceph: Ceph, bare: Mount) -> None:
    parent, child = ceph.unique("parent"), ceph.unique("child")
    content = random_bytes(12 * MIB)
    ceph.make_image(parent, content, MIB // 4, features=ALL_FEATURES)
    with ceph.ioctx() as ioctx:
        with rbd.Image(ioctx, parent) as image:
            image.create_snap("base")
        clone(ceph, f"rbd/{parent}@base", f"rbd/{child}")
        with reading(bare.image(child), content) as result:
            with rbd.Image(ioctx, child) as image:
                image.flatten()
            with rbd.Image(ioctx, parent) as image:
                image.remove_snap("base")
            rbd.RBD().remove(ioctx, parent)
            reads = result.reads
            wait_until(lambda: result.reads > reads + 50)
    assert not result.wrong
    assert not result.errors


def test_a_renamed_image_is_read_on(ceph: Ceph, bare: Mount) -> None:
    name, content = ceph.unique("renamed"), bytes(MIB) + random_bytes(4 * MIB)
    ceph.make_image(name, content)
    with reading(bare.image(name), content) as result:
        with ceph.ioctx() as ioctx:
            rbd.RBD().rename(ioctx, name, f"{name}-new")
        reads = result.reads
        wait_until(lambda: result.reads > reads + 50)
    assert not result.wrong
    assert not result.errors
    assert bare.image(f"{name}-new").read_bytes() == content


def test_a_migrated_image_has_the_right_bytes_or_is_an_error(ceph: Ceph, bare: Mount) -> None:
    name, content = ceph.unique("migrated"), random_bytes(8 * MIB)
    target = f"{name}-new"
    ceph.make_image(name, content, MIB // 4, features=ALL_FEATURES)
    migration = ("rbd", "migration")
    # The first is refused while a client watches the source.
    with reading(bare.image(name), content) as result, contextlib.suppress(subprocess.CalledProcessError):
        ceph.run(*migration, "prepare", f"rbd/{name}", f"rbd/{target}")
        wait_until(lambda: errno.EIO in result.errors, SECONDS)
    assert not result.wrong
    if not result.errors:
        wait_until(lambda: ceph.watchers(name) == [])
        ceph.run(*migration, "prepare", f"rbd/{name}", f"rbd/{target}")
    wait_until(bare.image(target).exists)
    with reading(bare.image(target), content) as result:
        ceph.run(*migration, "execute", "--no-progress", f"rbd/{target}")
        with contextlib.suppress(subprocess.CalledProcessError):
            ceph.run(*migration, "commit", "--no-progress", f"rbd/{target}")
        reads = result.reads + len(result.errors)
        wait_until(lambda: result.reads + len(result.errors) > reads + 50)
    assert not result.wrong
    with bare.image(target).open("rb") as file:
        assert file.read() == content


def test_readers_never_block_other_clients(ceph: Ceph, bare: Mount) -> None:
    # A watcher that does not acknowledge holds each of these up for 30 s (rados_notify_timeout is 10 s, rbd's longer).
    for features in (ALL_FEATURES, ALL_FEATURES | rbd.RBD_FEATURE_JOURNALING, LAYERING):
        name, content = ceph.unique("prompt"), random_bytes(4 * MIB)
        ceph.make_image(name, content, features=features)
        with bare.image(name).open("rb", buffering=0) as file:
            assert file.read(MIB) == content[:MIB]
            began = time.monotonic()
            with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
                image.create_snap("meanwhile")
                image.resize(5 * MIB)
                image.remove_snap("meanwhile")
                image.write(b"x", 0)
            assert time.monotonic() - began < 5
            assert os.pread(file.fileno(), MIB, 3 * MIB) == content[3 * MIB :]


def clients(ceph: Ceph, key: tuple[str, ...]) -> list[str]:
    """The addresses of the clients that are connected with a key."""
    sessions = json.loads(ceph.run("ceph", "tell", "mon.a", "sessions", "--format", "json"))
    mine = [session["addrs"]["addrvec"][0] for session in sessions if session["entity_name"] == f"client.{key[1]}"]
    return [f"{address['addr']}/{address['nonce']}" for address in mine]


def blocklist(ceph: Ceph, action: str, addresses: list[str]) -> None:
    """Add to the blocklist, or take away."""
    for address in addresses:
        ceph.run("ceph", "osd", "blocklist", action, address)


@contextlib.contextmanager
def locked_out(ceph: Ceph, key: tuple[str, ...]) -> Iterator[None]:
    """The client of a mount is blocklisted, and a new one would have no key."""
    keyring, addresses = Path(key[3]), clients(ceph, key)
    assert len(addresses) == 2
    away = keyring.rename(keyring.with_suffix(".away"))
    blocklist(ceph, "add", addresses)
    try:
        yield
    finally:
        blocklist(ceph, "rm", addresses)
        away.rename(keyring)


@CAPS
def test_a_blocklisted_client_gets_errors_until_it_is_let_in_again(
    ceph: Ceph, mounts: Mounts, caps: tuple[str, ...]
) -> None:
    key = ceph.credentials(caps)
    mount = mounts(*NO_CACHE, *key)
    mount.expect("ERROR", "WARNING")
    name, content = ceph.unique("blocked"), random_bytes(8 * MIB)
    ceph.make_image(name, content, MIB, features=ALL_FEATURES)
    with reading(mount.image(name), content) as result:
        with locked_out(ceph, key):
            wait_until(lambda: errno.ESHUTDOWN in result.errors, SECONDS)
            reads = result.reads
            wait_until(lambda: len(result.errors) > 50)
            assert result.reads == reads
            assert "the cluster has blocklisted this client" in mount.log
            assert f"no key for client.{key[1]}" in mount.log
        wait_until(lambda: result.reads > reads + 50, 60)
    assert not result.wrong
    with mount.image(name).open("rb") as file:
        assert file.read() == content


@CAPS
def test_a_blocklisted_mount_ends_within_5_s(ceph: Ceph, mounts: Mounts, caps: tuple[str, ...]) -> None:
    key = ceph.credentials(caps)
    mount = mounts(*NO_CACHE, *key)
    mount.expect("ERROR", "WARNING")
    name, content = ceph.unique("blocked"), random_bytes(8 * MIB)
    ceph.make_image(name, content, MIB, features=ALL_FEATURES)
    with reading(mount.image(name), content) as result, locked_out(ceph, key):
        wait_until(lambda: errno.ESHUTDOWN in result.errors, SECONDS)
        os.kill(mount.pid, signal.SIGTERM)
        wait_until(lambda: not mount.is_running, 5)
    assert not result.wrong
