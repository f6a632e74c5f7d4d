"""What tests with a real cluster share: one Ceph for the whole run, and mounts that end with their test."""

import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest

from rbdfs.devcluster.cluster import Devcluster, DevclusterOptions
from tests.ceph import Ceph, Mount

HUNG_SECONDS = 120.0
"""No test uses its mount for longer."""


# Two runs at a time, beside two Cephs: how long an example takes says nothing.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")


def pytest_configure() -> None:
    """A SIGTERM, as of `timeout`, ends the run as Ctrl-C does: with Ceph and the mounts taken down."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """A real single-node Ceph, brought up once."""
    folder = Path(tempfile.mkdtemp(prefix="rbdfs-test-"))
    devcluster = Devcluster(DevclusterOptions(folder))
    try:
        devcluster.up()
        ceph = Ceph(devcluster)
        try:
            yield ceph
        finally:
            ceph.close()
    finally:
        devcluster.down()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def mounts(ceph: Ceph) -> Iterator[Callable[..., Mount]]:
    """Mounts with any arguments; they end with the test."""
    with ExitStack() as stack:

        def mount(*arguments: str, module: str = "rbdfs") -> Mount:
            folder = Path(tempfile.mkdtemp(prefix="rbdfs-mount-"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            # For a mount of which something was not as expected; else it is unmounted by then.
            stack.callback(
                subprocess.run, ["umount", "-l", "-q", str(folder / "mnt")], capture_output=True, check=False
            )
            mounted = Mount(ceph, folder, arguments, module)
            stack.callback(mounted.end)
            # A process that waits for a mount cannot be killed, not even by a test's timeout: the mount can.
            watchdog = threading.Timer(HUNG_SECONDS, os.kill, (mounted.pid, signal.SIGKILL))
            watchdog.start()
            stack.callback(watchdog.cancel)
            return mounted

        yield mount


@pytest.fixture
def mount(mounts: Callable[..., Mount]) -> Mount:
    """A mount with the default options."""
    return mounts()
