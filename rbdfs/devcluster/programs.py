"""Ceph's own programs: whether they are there, what environment they get, running one to its end."""

import errno
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rbdfs.devcluster.signals import signals_blocked
from rbdfs.errors import RbdfsError, UsageError

PROGRAMS = ("ceph-mon", "ceph-mgr", "ceph-osd", "ceph", "rbd", "monmaptool")
PACKAGES = "ceph-mon ceph-mgr ceph-osd ceph-common"
START_SECONDS = 60.0  # for one daemon or one of Ceph's tools, on a machine that is busy
# What would lead Ceph's programs away from the folder's configuration.
FOREIGN_ENVIRONMENT = ("CEPH_ARGS", "CEPH_CONF", "CEPH_KEYRING")


def require_programs() -> None:
    """UsageError, with the packages to install, if one is not on PATH."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)}: not found on PATH; apt install {PACKAGES}")


def environment(**changes: str | None) -> dict[str, str]:
    """Ours, without what would lead Ceph's programs away from the folder's configuration."""
    changed = dict.fromkeys(FOREIGN_ENVIRONMENT) | changes
    return {name: value for name, value in (os.environ | changed).items() if value is not None}


def run_program(command: Sequence[str], folder: Path) -> str:
    """Its output. RbdfsError with the last line that it said if it fails."""
    process = None
    try:
        with signals_blocked():  # an interruption in the middle of the start would leave a process that nobody knows
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(),
                cwd=folder,
            )
        output, errors = process.communicate(timeout=START_SECONDS)
    except BaseException as error:
        if process is not None:
            process.kill()
            process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise RbdfsError(f"{shlex.join(command)}: no answer in {START_SECONDS:.0f} s", errno.ETIMEDOUT) from None
        raise
    if process.returncode != 0:
        said = (errors.strip() or output.strip() or f"exit code {process.returncode}").splitlines()[-1]
        raise RbdfsError(f"{shlex.join(command)}: {said}")
    return output
