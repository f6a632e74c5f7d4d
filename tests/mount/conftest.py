"""Mounts in every mode, which the tests of a module share."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tests.cluster import Ceph, Mount
from tests.limits import HUNG_SECONDS
from tests.truth import MODES, ModeMounts


@pytest.fixture(scope="module")
def mode_mounts(ceph: Ceph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModeMounts]:
    """Mounts in every mode, each made when it is first needed, and their logs may hold errors."""
    mounts = ModeMounts(ceph, lambda: tmp_path_factory.mktemp("mode"))
    try:
        yield mounts
    finally:
        mounts.end()


@pytest.fixture(params=MODES, ids=", ".join)
def mode_mount(request: pytest.FixtureRequest, mode_mounts: ModeMounts) -> Iterator[Mount]:
    """A mount in each mode, which outlives the test."""
    mount = mode_mounts.get(request.param)
    watchdog = threading.Timer(HUNG_SECONDS, os.kill, (mount.pid, signal.SIGKILL))
    watchdog.start()
    yield mount
    watchdog.cancel()
    assert mount.is_running, f"the mount has died; {mount.log}"
