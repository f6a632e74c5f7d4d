"""After each trouble with the cluster a mount works again by itself, for new files and for those that are open."""

import contextlib
import errno
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rbdfs.devcluster.conf import CONF
from tests.cluster import MIB, Ceph, Mount, random_bytes, running_ceph, wait_until
from tests.mount.test_changes import ALL_FEATURES, CAPS, NO_CACHE, WATCHING_CAPS, blocklist, clients, reading

Mounts = Callable[..., Mount]

OSD_TIMEOUT = 10
TIMEOUT = ("--osd-timeout", str(OSD_TIMEOUT))
BACK_SECONDS = 150
TICKET_SECONDS = 8
"""How long a client may go on with a ticket of the key that it had: an hour, or days, by default."""
SHORT_TICKETS = f"""\
[mon]
auth mon ticket ttl = {TICKET_SECONDS}
auth service ticket ttl = {TICKET_SECONDS}
"""


@pytest.fixture(scope="module")
def ceph() -> Iterator[Ceph]:
    """A cluster of its own: its monitor moves."""
    with running_ceph() as ceph:
        yield ceph


def made(ceph: Ceph, content: bytes) -> str:
    """The name of a new image."""
    name = ceph.unique("image")
    ceph.make_image(name, content, MIB, features=ALL_FEATURES)
    return name


def assert_a_new_open_works(ceph: Ceph, mount: Mount) -> None:
    """Of an image that nobody has looked up."""
    content = random_bytes(3 * MIB, 7)
    name = made(ceph, content)
    path = mount.image(name)
    assert path.read_bytes() == content
    assert name in os.listdir(path.parent)
    assert os.getxattr(path, "user.rbd.watchers") == b""
    assert os.statvfs(mount.path).f_blocks > 0


def is_open(path: Path) -> bool:
    """Whether an open() works by now."""
    with contextlib.suppress(OSError), path.open("rb"):
        return True
    return False


def has_reconnected(ceph: Ceph, key: tuple[str, ...], before: list[str]) -> bool:
    """Whether a mount has two connections that it did not have before."""
    return len(set(clients(ceph, key)) - set(before)) == 2


# Blocklisted.


@CAPS
def test_a_blocklisted_mount_goes_on_by_itself_and_so_do_its_open_files(
    ceph: Ceph, mounts: Mounts, caps: tuple[str, ...]
) -> None:
    key = ceph.credentials(caps)
    mount, other = mounts(*NO_CACHE, *TIMEOUT, *key), mounts(*NO_CACHE, *TIMEOUT, *ceph.credentials(caps))
    mount.expect("WARNING")
    content = random_bytes(8 * MIB)
    name = made(ceph, content)
    with reading(mount.image(name), content) as result, reading(other.image(name), content) as others:
        for _ in range(2):
            addresses = clients(ceph, key)
            assert len(addresses) == 2, "those that were replaced are gone"
            blocklist(ceph, "add", addresses)
            wait_until(lambda addresses=addresses: has_reconnected(ceph, key, addresses), BACK_SECONDS)  # type: ignore[misc]
            reads = result.reads
            wait_until(lambda reads=reads: result.reads > reads + 50, BACK_SECONDS)  # type: ignore[misc]
            wait_until(lambda: len(clients(ceph, key)) == 2)
        assert_a_new_open_works(ceph, mount)
        wait_until(lambda: len(ceph.watchers(name)) == (2 if caps is WATCHING_CAPS else 0))
    assert not result.wrong
    assert not result.errors, "they were asked again"
    assert not others.errors
    assert not others.wrong
    assert mount.log.count("the cluster has blocklisted this client") == 2
    assert mount.log.count("reconnected to the cluster") == 2
    assert "reconnected to the cluster" not in other.log


def test_a_mount_that_is_idle_when_it_is_blocklisted_works_at_the_next_access(ceph: Ceph, mounts: Mounts) -> None:
    key = ceph.credentials(WATCHING_CAPS)
    mount = mounts(*TIMEOUT, *key)
    mount.expect("WARNING")
    for which in (slice(0, 1), slice(1, 2), slice(0, 2)):  # it has two connections, and either can be hit alone
        os.listdir(mount.path / "rbd")
        blocklist(ceph, "add", clients(ceph, key)[which])
        assert_a_new_open_works(ceph, mount)
        wait_until(lambda: len(clients(ceph, key)) == 2)
    assert mount.log.count("reconnected to the cluster") == 3


def test_changes_by_others_while_a_mount_was_blocklisted_show_and_nothing_old_or_zero_does(
    ceph: Ceph, mounts: Mounts
) -> None:
    key = ceph.credentials(WATCHING_CAPS)
    mount = mounts(*TIMEOUT, *key)
    mount.expect("ERROR", "WARNING")
    content, written = random_bytes(4 * MIB), random_bytes(4 * MIB, 2)
    changed, removed, replaced, shrunk = (made(ceph, content) for _ in range(4))
    with contextlib.ExitStack() as stack:
        files = {}
        for name in (changed, removed, replaced, shrunk):
            files[name] = os.open(mount.image(name), os.O_RDONLY)
            stack.callback(close, files[name])
            assert os.pread(files[name], MIB, 0) == content[:MIB]
        keyring = Path(key[3])
        away = keyring.rename(keyring.with_suffix(".away"))  # so that it is out for as long as the others take
        addresses = clients(ceph, key)
        blocklist(ceph, "add", addresses)
        wait_until(lambda: not mount.status["connected"])
        ceph.write_image(changed, written)
        for name in (removed, replaced):
            wait_until(lambda name=name: ceph.watchers(name) == [])  # type: ignore[misc]
            ceph.remove_image(name)
        ceph.make_image(replaced, written, MIB, features=ALL_FEATURES)
        ceph.resize_image(shrunk, 2 * MIB)
        away.rename(keyring)
        wait_until(lambda: has_reconnected(ceph, key, addresses), BACK_SECONDS)
        assert mount.image(changed).read_bytes() == written
        assert os.pread(files[changed], 4 * MIB, 0) == written, "the page cache is shared by all who have it open"
        assert mount.image(replaced).read_bytes() == written
        assert mount.image(shrunk).read_bytes() == content[: 2 * MIB]
        assert not mount.image(removed).exists()
        for name in (removed, replaced):
            assert fails(files[name], 2 * MIB) in (errno.EIO, errno.ESTALE)
        assert os.pread(files[shrunk], MIB, 2 * MIB) == b""


def close(file: int) -> None:
    """Also of an image that is gone."""
    with contextlib.suppress(OSError):
        os.close(file)


def fails(file: int, offset: int) -> int | None:
    """The errno of a read."""
    try:
        os.pread(file, MIB, offset)
    except OSError as error:
        return error.errno
    return None


# The key.


def replace_key(ceph: Ceph, name: str, keyring: Path) -> None:
    """As an operator does it who was told that the old one had leaked."""
    entity = f"client.{name}"
    caps = json.loads(ceph.run("ceph", "auth", "get", entity, "--format", "json"))[0]["caps"]
    ceph.run("ceph", "auth", "rm", entity)
    new = keyring.with_suffix(".new")
    new.write_text(ceph.run("ceph", "auth", "get-or-create", entity, *(part for cap in caps.items() for part in cap)))
    new.rename(keyring)


def test_a_mount_whose_key_was_replaced_takes_the_new_one_when_it_is_asked_for_it(ceph: Ceph, mounts: Mounts) -> None:
    key = ceph.credentials(WATCHING_CAPS)
    mount = mounts(*NO_CACHE, *TIMEOUT, *key)
    mount.expect("ERROR", "WARNING")
    content = random_bytes(4 * MIB)
    name = made(ceph, content)
    with reading(mount.image(name), content) as result:
        replace_key(ceph, key[1], Path(key[3]))
        ceph.devcluster.kill_daemon("mon.a")
        ceph.devcluster.start_daemon("mon.a")
        restart_osds(ceph)
        wait_until(lambda: is_open(mount.image(name)), BACK_SECONDS)
        reads = result.reads
        wait_until(lambda: result.reads > reads + 50, BACK_SECONDS)
        assert_a_new_open_works(ceph, mount)
    assert not result.wrong


def test_a_mount_whose_key_was_replaced_takes_the_new_one_when_its_tickets_end(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr("rbdfs.devcluster.conf.CONF", CONF + SHORT_TICKETS)
        ceph = stack.enter_context(running_ceph())
        key = ceph.credentials(WATCHING_CAPS)
        mount = Mount(ceph, tmp_path, (*NO_CACHE, *TIMEOUT, *key), "rbdfs")
        stack.callback(mount.end)
        mount.expect("ERROR", "WARNING")
        content = random_bytes(4 * MIB)
        name = made(ceph, content)
        with reading(mount.image(name), content) as result:
            addresses = clients(ceph, key)
            replace_key(ceph, key[1], Path(key[3]))
            began = time.monotonic()
            wait_until(lambda: time.monotonic() > began + 4 * TICKET_SECONDS, BACK_SECONDS)
            restart_osds(ceph)
            wait_until(lambda: has_reconnected(ceph, key, addresses), BACK_SECONDS)
            reads = result.reads
            wait_until(lambda: result.reads > reads + 50, BACK_SECONDS)
            assert_a_new_open_works(ceph, mount)
        assert not result.wrong


def restart_osds(ceph: Ceph) -> None:
    """All of them."""
    daemons = [name for name in ceph.devcluster.status().pids if name.startswith("osd.")]
    for name in daemons:
        ceph.devcluster.kill_daemon(name)
    for name in daemons:
        ceph.devcluster.start_daemon(name)


# All OSDs.


def test_when_all_osds_were_restarted_new_and_open_files_work(ceph: Ceph, mounts: Mounts) -> None:
    mount = mounts(*NO_CACHE, *TIMEOUT)
    mount.expect("ERROR", "WARNING")
    content = random_bytes(4 * MIB)
    name = made(ceph, content)
    with reading(mount.image(name), content) as result:
        restart_osds(ceph)
        reads = result.reads
        wait_until(lambda: result.reads > reads + 50, BACK_SECONDS)
        assert_a_new_open_works(ceph, mount)
    assert not result.wrong


# The monitors. The last test: the connection of the tests themselves has the old address.


def move_monitor(ceph: Ceph) -> None:
    """To another port: somebody else takes that which it had while it is stopped."""
    ceph.devcluster.kill_daemon("mon.a")
    (port,) = re.findall(r"mon host = v2:127.0.0.1:(\d+)\n", ceph.conf.read_text())
    with socket.socket() as somebody_else:
        somebody_else.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        somebody_else.bind(("127.0.0.1", int(port)))
        somebody_else.listen()
        ceph.devcluster.start_daemon("mon.a")


def test_when_the_monitors_have_moved_new_and_open_files_work(ceph: Ceph, mounts: Mounts) -> None:
    mount = mounts(*NO_CACHE, "--osd-timeout", str(BACK_SECONDS))
    mount.expect("ERROR", "WARNING")
    content = random_bytes(4 * MIB)
    name = made(ceph, content)
    with reading(mount.image(name), content) as result:
        move_monitor(ceph)
        restart_osds(ceph)
        wait_until(lambda: is_open(mount.image(name)), BACK_SECONDS)
        reads = result.reads
        wait_until(lambda: result.reads > reads + 50, BACK_SECONDS)
    assert not result.wrong
    assert not result.errors, "it was back before they were given up"
    assert re.search(r"reconnected to the cluster after \d+ s", mount.log)
    assert mount.image(name).read_bytes() == content
    assert name in os.listdir(mount.path / "rbd")
