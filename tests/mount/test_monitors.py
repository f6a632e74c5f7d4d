"""A ceph.conf that names several monitors, of which some are dead: they refuse, or they never say a word."""

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster import Ceph, Mount, rbdfs

Mounts = Callable[..., Mount]

REFUSES = "127.0.0.1:1"
CONNECT_SECONDS = 30
"""As --connect-timeout is by default."""


@pytest.fixture
def silent() -> Iterator[list[str]]:
    """Addresses where connections are made, and nobody says anything."""
    with ExitStack() as sockets:
        listening = [sockets.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        yield [f"127.0.0.1:{each.getsockname()[1]}" for each in listening]


def test_a_mount_finds_the_monitor_that_lives(ceph: Ceph, mounts: Mounts, silent: list[str], tmp_path: Path) -> None:
    alive = re.findall(r"^mon host = (\S+)$", ceph.conf.read_text(), re.M)
    name = ceph.unique("monitors")
    ceph.make_image(name, b"content")
    dead_first = tmp_path / "ceph.conf"
    monitors = ",".join([REFUSES, *silent, *alive])
    dead_first.write_text(re.sub(r"(?m)^mon host = .*$", f"mon host = {monitors}", ceph.conf.read_text()))
    began = time.monotonic()
    mount = mounts("--conf", str(dead_first))
    assert time.monotonic() - began < CONNECT_SECONDS
    assert mount.image(name).read_bytes() == b"content"
    assert rbdfs("export", "--conf", str(dead_first), name, str(tmp_path / "copy")).returncode == 0
    assert (tmp_path / "copy").read_bytes() == b"content"


def test_the_timeout_holds_if_all_are_dead(ceph: Ceph, silent: list[str]) -> None:
    began = time.monotonic()
    monitors = ",".join([REFUSES, *silent])
    done = rbdfs("map", "-m", monitors, "--connect-timeout", "3", "vm1", conf=ceph.conf)
    assert time.monotonic() - began < 10
    assert done.returncode == 1
    assert f"no monitor answered within 3 s (mon_host: {monitors})" in done.stderr
