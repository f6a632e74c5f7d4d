"""`rbdfs devcluster`: a real single-node Ceph in one folder, to try things on and to test against."""

import contextlib
import dataclasses
import errno
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rbdfs.devcluster.cluster import Devcluster, DevclusterOptions
from rbdfs.devcluster.programs import environment
from rbdfs.devcluster.signals import SIGNALS, Interrupted, interruptible, signals_blocked
from rbdfs.errors import UsageError

NOT_RUNNING = 3  # `status`: the exit code that the LSB gives to "program is not running"


def up(options: DevclusterOptions) -> int:
    """`rbdfs devcluster up`: the line for `eval` on stdout, all else on stderr."""
    cluster = Devcluster(options)
    began = time.monotonic()
    try:
        with interruptible():
            started = cluster.up()
    except Interrupted as interrupted:
        return interrupted.exit_code
    how = f"is ready after {time.monotonic() - began:.1f} s" if started else "runs already"
    _tell(
        f"Ceph in {cluster.folder} {how}; stop and remove it: rbdfs devcluster down {shlex.quote(str(cluster.folder))}"
    )
    print(f"export CEPH_CONF={shlex.quote(str(cluster.conf))}", flush=True)
    return 0


def down(folder: Path | None, keep: bool) -> int:
    """`rbdfs devcluster down`: also 0 when there was nothing to stop."""
    cluster = Devcluster(DevclusterOptions(folder))
    if not cluster.down(keep=keep):
        _tell(f"{cluster.folder}: no cluster here")
    elif keep:
        _tell(f"stopped; start it again: rbdfs devcluster up {shlex.quote(str(cluster.folder))}")
    else:
        _tell(f"stopped and removed {cluster.folder}")
    return 0


def status(folder: Path | None) -> int:
    """`rbdfs devcluster status`: 0 if all daemons run, else 3, as the LSB has it."""
    cluster = Devcluster(DevclusterOptions(folder))
    found = cluster.status()
    alive = [name for name, pid in found.pids.items() if pid is not None]
    print(f"{cluster.folder}: {'running' if found.running else 'partly running' if alive else 'not running'}")
    print(f"health  {found.health}")
    for name, pid in found.pids.items():
        print(f"{name:7} {'not running' if pid is None else f'pid {pid}'}")
    return 0 if found.running else NOT_RUNNING


def run(options: DevclusterOptions, command: Sequence[str]) -> int:
    """`rbdfs devcluster run`: the command's exit code; 128 + N where signal N ended it or us.

    Leaves the folder as it was: a cluster that ran stays up, one that was stopped and kept is stopped and kept again,
    a new one is removed. A cluster that could not be started leaves its logs.
    """
    if not command:
        raise UsageError("devcluster run needs a command, after --")
    if shutil.which(command[0]) is None:
        raise UsageError(f"{command[0]}: command not found", errno.ENOENT)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="rbdfs-devcluster-"))
    cluster = Devcluster(dataclasses.replace(options, folder=folder))
    before = cluster.status()
    try:
        with interruptible():
            try:
                cluster.up()
                return _supervise(
                    command, environment(CEPH_CONF=str(cluster.conf), CEPH_ARGS=os.environ.get("CEPH_ARGS"))
                )
            finally:
                with signals_blocked():
                    if not any(before.pids.values()) and cluster.status().kept:
                        cluster.down(keep=before.kept)
                    if options.folder is None:  # there was nothing yet that `down` could remove
                        with contextlib.suppress(OSError):
                            folder.rmdir()
    except Interrupted as interrupted:
        return interrupted.exit_code


def _supervise(command: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run the command as our foreground child, in the main thread, and outlive it.

    A Ctrl-C comes from the terminal, to the command as well as to us; what another process sends us (`kill`, a
    service manager) came to us alone and is handed on. Waiting for signals, rather than handling them, leaves no gap.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, signal.SIGCHLD))
    try:
        child = os.posix_spawnp(
            command[0], list(command), variables, setsigmask=previous, setsigdef=(signal.SIGPIPE, signal.SIGXFSZ)
        )
        while True:
            info = signal.sigwaitinfo((*SIGNALS, signal.SIGCHLD))
            if info.si_signo != signal.SIGCHLD:
                if info.si_code <= 0:  # SI_USER and its kin; the terminal's are SI_KERNEL
                    os.kill(child, info.si_signo)
                continue
            ended, wait_status = os.waitpid(child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(wait_status)
                return code if code >= 0 else 128 - code
    except OSError as error:
        raise UsageError(f"{command[0]}: {error.strerror}", error.errno) from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _tell(message: str) -> None:
    print(f"rbdfs: {message}", file=sys.stderr)
