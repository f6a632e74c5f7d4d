"""Ceph's own programs: whether they are there, what environment they get, running one to its end."""

import errno
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rbdfs.errors import RbdfsError, UsageError

PROGRAMS = ("ceph-mon", "ceph-mgr", "ceph-osd", "ceph", "rbd", "monmaptool")
PACKAGES = "ceph-mon ceph-mgr ceph-osd ceph-common"
START_SECONDS = 120.0  # for one daemon or one of Ceph's tools, on a machine that is busy


def require_programs() -> None:
    """UsageError, with the packages to install, if one is not on PATH."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)}: not found on PATH; apt install {PACKAGES}")


def environment(**changes: str | None) -> dict[str, str]:
    """Ours, without what would lead Ceph's programs away from the folder's configuration."""
    changed = dict.fromkeys(("CEPH_ARGS", "CEPH_CONF", "CEPH_KEYRING")) | changes
    return {name: value for name, value in (os.environ | changed).items() if value is not None}


def run_program(command: Sequence[str], folder: Path) -> str:
    """Its output. RbdfsError with the last line that it said if it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment(),
            cwd=folder,
            timeout=START_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RbdfsError(f"{shlex.join(command)}: no answer in {START_SECONDS:.0f} s", errno.ETIMEDOUT) from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RbdfsError(f"{shlex.join(command)}: {said}")
    return done.stdout
