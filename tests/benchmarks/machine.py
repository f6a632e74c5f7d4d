"""What the figures were taken on, and with."""

import datetime
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rbdfs import __version__

CHECKOUT = Path(__file__).resolve().parent.parent.parent
GIB = 1 << 30

VERSION_COMMANDS = {
    "ceph": "ceph --version",
    "rbd-fuse": "dpkg-query -W -f ${Version} rbd-fuse",  # its own --version asks for a cluster
    "libfuse": "fusermount3 --version",
    "qemu": "qemu-img --version",
    "fio": "fio --version",
    "rsync": "rsync --version",
    "coreutils": "cp --version",
}
"""The first number in what they say is the version."""


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine at one time; without it a figure says nothing."""

    date: str
    cpu: str
    cores: int
    memory_gib: int
    kernel: str
    load: float
    """Of the last minute, before the run: what others did. Near 0, or the figures are theirs as well."""
    commit: str
    """Of rbdfs; `-dirty` if files differ from it."""
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Baseline:
    """Another rbdfs, in the virtual environment of an earlier checkout."""

    python: str
    """Its interpreter."""
    checkout: Path
    description: str


def this_machine() -> Machine:
    """Ask this one."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory_bytes / GIB),
        kernel=platform.release(),
        load=round(os.getloadavg()[0], 1),
        commit=_commit(CHECKOUT),
        versions={
            "rbdfs": __version__,
            "python": platform.python_version(),
            "pyfuse3": metadata.version("pyfuse3"),
            "trio": metadata.version("trio"),
        }
        | {name: _version(command) for name, command in VERSION_COMMANDS.items()},
    )


def baseline_at(python: str) -> Baseline:
    """Ask the interpreter of another rbdfs. Raises ValueError if it has none, or has this one."""
    program = os.path.abspath(python)  # noqa: PTH100  (not what a virtual environment's symlink leads to)
    ask = (program, "-I", "-c", "import rbdfs; print(rbdfs.__version__, rbdfs.__file__)")
    try:
        done = subprocess.run(ask, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"{python} does not run an rbdfs") from error
    version, _, package = done.stdout.strip().partition(" ")
    checkout = Path(package).resolve().parent.parent
    if checkout == CHECKOUT:
        raise ValueError(f"{python} runs this very checkout")
    return Baseline(program, checkout, f"rbdfs {version} of {checkout}, commit {_commit(checkout)}")


def write_bytecode(python: str, checkout: Path) -> None:
    """As an installation does. Where PYTHONDONTWRITEBYTECODE is set, a checkout would be compiled at each start."""
    subprocess.run((python, "-I", "-m", "compileall", "-q", checkout / "rbdfs"), check=False)


def _commit(checkout: Path) -> str:
    return _said(f"git -C {checkout} describe --always --dirty") or "not committed"


def _cpu() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else platform.machine()


def _version(command: str) -> str:
    found = re.search(r"\d+(?:[.]\d+)+", _said(command))
    return found.group() if found else "not installed"


def _said(command: str) -> str:
    """What a command prints; nothing if it cannot."""
    if shutil.which(command.split(maxsplit=1)[0]) is None:
        return ""
    return subprocess.run(command.split(), capture_output=True, text=True, check=False).stdout.strip()
