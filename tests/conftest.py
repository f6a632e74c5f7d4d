"""What tests with a real cluster share: one Ceph for the whole run, and mounts that end with their test."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from tests.limits import HUNG_SECONDS

if TYPE_CHECKING:
    from tests.cluster import Ceph, Mount

# What is needed of Ceph is imported where it is used: tests/unit runs where there is none.

# Two runs at a time, beside two Cephs: how long an example takes says nothing.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which cluster to test against."""
    parser.addoption(
        "--devcluster", type=Path, metavar="FOLDER", help="a devcluster that runs already, instead of one for this run"
    )


def pytest_configure() -> None:
    """A SIGTERM, as of `timeout`, ends the run as Ctrl-C does: with Ceph and the mounts taken down."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_report_header() -> str:
    """With what the tests are run: what README.md tells of the platforms comes from here."""
    system = platform.freedesktop_os_release().get("PRETTY_NAME", "?")
    programs = [
        subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
        for program in ("ceph-osd", "fusermount3")
    ]
    ceph, libfuse = (found[0] if (found := re.findall(r"\d+\.\d[\d.]*", said)) else "?" for said in programs)
    modules = ", ".join(f"{name} {metadata.version(name)}" for name in ("pyfuse3", "trio"))
    return f"with {system}, Linux {platform.release()}, Ceph {ceph}, libfuse {libfuse}, {modules}"


@pytest.fixture(scope="session")
def ceph(request: pytest.FixtureRequest) -> "Iterator[Ceph]":
    """A real single-node Ceph, brought up once; with `--devcluster` one that was brought up already, and stays up."""
    from rbdfs.devcluster.cluster import Devcluster, DevclusterOptions
    from tests.cluster import Ceph, running_ceph

    if there := request.config.getoption("--devcluster"):
        ceph = Ceph(Devcluster(DevclusterOptions(there)))
        try:
            yield ceph
        finally:
            ceph.close()
    else:
        with running_ceph() as ceph:
            yield ceph


@pytest.fixture
def mounts(ceph: "Ceph") -> "Iterator[Callable[..., Mount]]":
    """Mounts with any arguments; they end with the test."""
    from tests.cluster import Mount

    with ExitStack() as stack:

        def mount(*arguments: str, module: str = "rbdfs") -> "Mount":
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
def mount(mounts: "Callable[..., Mount]") -> "Mount":
    """A mount with the default options."""
    return mounts()


@pytest.fixture
def environment(ceph: "Ceph", tmp_path: Path) -> dict[str, str]:
    """As of a user who has rbdfs on PATH, and a key for the rbd command."""
    from tests.cluster import CHECKOUT

    program = tmp_path / "bin" / "rbdfs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nPYTHONPATH={CHECKOUT} exec {sys.executable} -m rbdfs "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "CEPH_CONF": str(ceph.conf), "HOME": str(tmp_path)}
