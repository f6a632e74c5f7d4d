"""`rbdfs devcluster`: a real single-node Ceph in one folder, to try things on and to test against.

A mon, a mgr and some OSDs from Debian's packages, on loopback, with cephx, owned by whoever starts them. All that they
write is in the folder (only the admin sockets move to a short folder under /tmp where the folder's own name is too
long for a socket), so taking it down leaves nothing behind.

The daemons run in the foreground (`-f`) in sessions of their own: their pids are known from the moment that they start,
and a terminal's Ctrl-C does not reach them. The folder records each pid with the process's start time.
"""

import base64
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from rbdfs.errors import RbdfsError, UsageError

PROGRAMS = ("ceph-mon", "ceph-mgr", "ceph-osd", "ceph", "rbd", "monmaptool")
PACKAGES = "ceph-mon ceph-mgr ceph-osd ceph-common"
POOL = "rbd"
PG_COUNT = 32
NOT_RUNNING = 3  # `status`: the exit code that the LSB gives to "program is not running"

START_SECONDS = 60.0  # for one daemon or one of Ceph's tools, on a machine that is busy
STOP_SECONDS = 5.0  # after SIGTERM; then SIGKILL
POLL_SECONDS = 0.02
SOCKET_PATH_BYTES = 107  # sun_path without its final NUL
MON_PORTS = range(20000, 32000)  # below Linux's ephemeral ports, away from Ceph's own 6800-7568
PORT_ATTEMPTS = 8

STATE_FILE = "devcluster.json"
OURS = ("ceph.conf", "keyring", "monmap", "mon", "mgr", "log", "run", "crash")  # and osd0, osd1, ...
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What would lead Ceph's programs away from the folder's configuration.
FOREIGN_ENVIRONMENT = ("CEPH_ARGS", "CEPH_CONF", "CEPH_KEYRING")
# Characters that a ceph.conf or its lists of files give a meaning of their own.
UNSAFE_IN_CONF = re.compile(r"[\s#;,=$\"'\\]")
# An error in a daemon's log. What a crash adds after its reason says less, and what we asked too early says nothing.
ERROR_LINE = re.compile(r"^\S+ +[0-9a-f]+ +-1 +((?!\*\*\* Caught|\S+ In function|asok\().*\S)")

CONF = """\
# Written by rbdfs devcluster at each start.
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{port}
keyring = {folder}/keyring
run dir = {run_dir}
crash dir = {folder}/crash
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
ms bind msgr1 = false
auth allow insecure global id reclaim = false
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg autoscale mode = off
osd scrub min interval = 31536000
osd scrub max interval = 31536000
osd deep scrub interval = 31536000
# An OSD that was killed and comes back waits until reads of its former self are out of date: 0.8 of 20 s by default.
osd pool default read lease ratio = 0.1
[mon]
mon data = {folder}/mon
log file = {folder}/log/$name.log
err to stderr = false
mon cluster log file = {folder}/log/cluster.log
mon allow pool delete = true
mon allow pool size one = true
mon warn on pool no redundancy = false
# A port that is taken is not waited for: we try another.
ms bind retry count = 1
mon data avail warn = 2
mon data avail crit = 1
# Changes are gathered for this long before they are committed; the default second is felt at each step of a start.
paxos propose interval = 0.05
# No modules but those that Ceph insists on.
mgr initial modules =
[mgr]
mgr data = {folder}/mgr
log file = {folder}/log/$name.log
err to stderr = false
# Each module that is merely loaded costs 0.2 s of CPU and 9 MiB.
mgr disabled modules = {idle_modules}
[osd]
osd data = {folder}/osd$id
log file = {folder}/log/$name.log
err to stderr = false
osd objectstore = {store}
bluestore block size = {block_bytes}
memstore device bytes = {block_bytes}
# Closing the device waits this long (default 250), twenty times in mkfs and start: `up` took 9 s so, 2.5 s now.
bdev aio poll ms = 10
"""
# Not needed here, and not "always on": without one of those the mgr reports HEALTH_ERR.
IDLE_MODULES = (
    "alerts cephadm cli_api dashboard diskprediction_local feedback hello influx insights iostat k8sevents localpool "
    "mds_autoscaler mirroring nfs osd_perf_query osd_support prometheus restful rgw rook selftest snap_schedule stats "
    "telegraf test_orchestrator zabbix"
)
CAPS = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "mgr": "allow *", "osd": "allow *", "mds": "allow *"},
    "mgr.x": {"mon": "allow profile mgr", "osd": "allow *", "mds": "allow *"},
}
OSD_CAPS = {"mon": "allow profile osd", "mgr": "allow profile osd", "osd": "allow *"}

Store = Literal["bluestore", "memstore"]


@dataclass(frozen=True, slots=True)
class DevclusterOptions:
    """What to make. A cluster that exists keeps the OSDs and the store that it was made with."""

    folder: Path | None = None
    """None: `default_folder()`; for `run`, a temporary folder."""
    osds: int = 1
    store: Store = "bluestore"
    block_bytes: int = 20 << 30
    """Of each OSD. Bluestore's file is sparse: it takes what is written to it."""


@dataclass(frozen=True, slots=True)
class DevclusterStatus:
    """Which daemons run, by name; None for a pid is a daemon that does not."""

    pids: Mapping[str, int | None]
    health: str
    """The first line of `ceph health`, or why there is none."""
    kept: bool
    """Whether there is data that `up` would start with."""

    @property
    def running(self) -> bool:
        """Whether there is a cluster and all of it runs."""
        return bool(self.pids) and None not in self.pids.values()


@dataclass(frozen=True, slots=True)
class _Process:
    """A recorded process. The start time (clock ticks since boot) tells it from a later one with the same pid."""

    pid: int
    started: int

    def alive(self, conf: Path) -> bool:
        """Whether this is still that daemon, of that configuration. Reaps it if it was our child and ended."""
        try:
            if _state_and_start(self.pid)[1] != self.started:
                return False
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)
            return os.fsencode(conf) in _command_line(self.pid)
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class _State:
    """What the folder records of its cluster. The configuration is written from it."""

    fsid: str
    port: int
    osds: int
    store: Store
    block_bytes: int
    run_dir: str
    ready: bool = False
    """False until the first start succeeded: what is there is then of no use to anyone."""
    processes: Mapping[str, _Process] = dataclasses.field(default_factory=dict)

    @property
    def daemons(self) -> list[str]:
        """By name, as `status` lists them."""
        return ["mon.a", "mgr.x", *(f"osd.{i}" for i in range(self.osds))]


class _DaemonError(RbdfsError):
    """A daemon ended, or did not become ready."""


class Devcluster:
    """The cluster of one folder, whether it runs, is stopped, or is not there yet.

    Every method looks at the folder anew, so several processes may use one folder.
    """

    def __init__(self, options: DevclusterOptions) -> None:
        self._options = options
        self.folder = (options.folder or default_folder()).absolute()
        if UNSAFE_IN_CONF.search(str(self.folder)):
            raise UsageError(f"{self.folder}: ceph.conf cannot name a folder with spaces or any of #;,=$\"'\\")
        if options.osds < 1:
            raise UsageError("a devcluster needs at least one OSD")

    @property
    def conf(self) -> Path:
        """What CEPH_CONF must name to use the cluster."""
        return self.folder / "ceph.conf"

    def up(self) -> bool:
        """Make what is not there, start what does not run, wait until pool `rbd` can be used. False: it ran already.

        What was started is stopped again on any error. An error leaves the logs, for the person who reads its message;
        an interruption leaves nothing, or a kept cluster as it was.
        """
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            raise UsageError(f"{', '.join(missing)}: not found on PATH; apt install {PACKAGES}")
        with self._locked():
            state = self._load()
            running = self._running(state) if state else []
            if state and state.ready and len(running) == len(state.daemons):
                return False
            try:
                if state is None or not self._kept(state):
                    self._clear(state)
                    state, running = self._create(), []
                self._start(state)
            except BaseException as error:
                with _signals_blocked():
                    if state := self._load():
                        self._stop(state, [name for name in state.daemons if name not in running], signal.SIGKILL)
                        if not state.ready and not isinstance(error, RbdfsError):
                            self._clear(state)
                            self._remove_folder()
                raise
        return True

    def down(self, *, keep: bool = False) -> bool:
        """Stop the daemons; unless `keep`, remove what `up` made, and the folder if nothing else is in it.

        False if there is no cluster. Files that others put into the folder stay.
        """
        if not self.folder.exists():
            return False
        with self._locked():
            state = self._load()
            if state is None:
                self._remove_folder()
                return False
            if keep and state.store == "memstore":
                raise UsageError(f"{self.folder}: a memstore holds its data in memory; it cannot be stopped and kept")
            if keep:
                # One after the other: an OSD that ends tells the mon, and waits 5 s for one that is gone.
                for name in sorted(state.daemons, reverse=True):
                    self._stop(state, [name], signal.SIGTERM)
            else:
                self._clear(state)
                self._remove_folder()
        return True

    def status(self) -> DevclusterStatus:
        """Asks the mon for the health if it runs; changes nothing."""
        state = self._load()
        if state is None:
            return DevclusterStatus({}, "no cluster", kept=False)
        running = self._running(state)
        pids = {name: state.processes[name].pid if name in running else None for name in state.daemons}
        if "mon.a" not in running:
            return DevclusterStatus(pids, "stopped" if state.ready else "did not start", self._kept(state))
        try:
            health = self._tool("ceph", "--connect-timeout", "5", "health").splitlines()[0]
        except RbdfsError as error:
            health = str(error)
        return DevclusterStatus(pids, health, self._kept(state))

    def kill_daemon(self, name: str) -> None:
        """SIGKILL to one daemon (`osd.0`), and wait until it is gone: what a power failure is like."""
        with self._locked():
            state = self._known(name)
            self._stop(state, [name], signal.SIGKILL)

    def start_daemon(self, name: str) -> None:
        """Start one daemon that does not run, and wait until it is ready."""
        with self._locked():
            state = self._known(name)
            if name not in self._running(state):
                self._start_and_wait(state, name)

    # ---- the folder

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One change of the folder at a time. The lock is the folder itself: no file is left behind."""
        while True:
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            except OSError as error:
                raise UsageError(f"{self.folder}: cannot be used as a folder: {error.strerror}") from None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                locked = os.fstat(descriptor)
                if locked.st_uid != os.geteuid():
                    raise UsageError(f"{self.folder}: belongs to another user")
                # Another's `down` may have removed the folder while we waited: then we locked a folder without a name.
                if self.folder.is_dir() and os.path.samestat(locked, self.folder.stat()):
                    yield
                    return
            finally:
                os.close(descriptor)

    def _load(self) -> _State | None:
        try:
            raw = json.loads((self.folder / STATE_FILE).read_text())
            processes = {name: _Process(*pair) for name, pair in raw.pop("processes").items()}
            return _State(**raw, processes=processes)
        except FileNotFoundError:
            if any(self.folder.glob("*")):  # none either if another's `down` was faster
                raise UsageError(f"{self.folder}: not empty, and not a devcluster; choose another folder") from None
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{self.folder / STATE_FILE}: cannot be read: {error}") from None

    def _save(self, state: _State) -> _State:
        raw = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        raw["processes"] = {name: (it.pid, it.started) for name, it in state.processes.items()}
        new = self.folder / f"{STATE_FILE}.new"
        new.write_text(json.dumps(raw, indent=1))
        new.replace(self.folder / STATE_FILE)
        return state

    def _known(self, name: str) -> _State:
        state = self._load()
        if state is None or name not in state.daemons:
            raise UsageError(f"{self.folder}: there is no daemon {name}")
        return state

    def _clear(self, state: _State | None) -> None:
        """Remove all that we made, the state last: until then the folder is still known as ours."""
        if state is None:
            return
        self._stop(state, state.daemons, signal.SIGKILL)
        for name in (*OURS, *(f"osd{i}" for i in range(state.osds)), f"{STATE_FILE}.new", STATE_FILE):
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(state.run_dir, ignore_errors=True)

    def _remove_folder(self) -> None:
        with contextlib.suppress(OSError):  # another's files are in it, or it is a mount point
            self.folder.rmdir()

    # ---- making it

    def _create(self) -> _State:
        """The files of a new cluster, up to where its mon can be started."""
        options = self._options
        run_dir = str(self.folder / "run")
        with _signals_blocked():
            if len(os.fsencode(f"{run_dir}/ceph-osd.{options.osds}.asok")) > SOCKET_PATH_BYTES:
                run_dir = tempfile.mkdtemp(prefix="rbdfs-devcluster-", dir="/tmp")  # TMPDIR may be long
            state = _State(str(uuid.uuid4()), _free_port(), options.osds, options.store, options.block_bytes, run_dir)
            self._save(state)
        for name in ("mon", "mgr", "log", "run", "crash", *(f"osd{i}" for i in range(state.osds))):
            (self.folder / name).mkdir()
        keyring = self.folder / "keyring"
        keyring.touch(mode=0o600)
        keyring.write_text(_keyring(CAPS | {f"osd.{i}": OSD_CAPS for i in range(state.osds)}))
        self._write_conf(state)
        self._write_monmap(state)
        monmap = str(self.folder / "monmap")
        self._tool("ceph-mon", "--mkfs", "--id", "a", "--monmap", monmap, "--keyring", str(keyring))
        return state

    def _write_conf(self, state: _State) -> None:
        fields = {"fsid": state.fsid, "port": state.port, "run_dir": state.run_dir, "store": state.store}
        self.conf.write_text(
            CONF.format(folder=self.folder, block_bytes=state.block_bytes, idle_modules=IDLE_MODULES, **fields)
        )

    def _write_monmap(self, state: _State) -> None:
        address = f"[v2:127.0.0.1:{state.port}]"
        monmap = str(self.folder / "monmap")
        self._tool("monmaptool", "--create", "--clobber", "--fsid", state.fsid, "--addv", "a", address, monmap)

    # ---- starting it

    def _start(self, state: _State) -> None:
        fresh = not state.ready
        running = self._running(state)
        osds = [name for name in state.daemons if name.startswith("osd.") and name not in running]
        if "mon.a" not in running:
            state = self._start_mon(state)
        if fresh:
            # Device health would add a pool of its own. The mgr, not yet there, is who knows the option: --force.
            self._tool("ceph", "config", "set", "mgr", "mgr/devicehealth/enable_monitoring", "false", "--force")
        for name in osds:
            if fresh:
                self._make_osd(name)
            state = self._spawn(state, name)
        if "mgr.x" not in running:  # last, because it keeps a processor busy for its first 2.5 s
            state = self._spawn(state, "mgr.x")
        if fresh:
            self._tool("ceph", "osd", "pool", "create", POOL, str(PG_COUNT))
        for name in osds:
            self._wait_until_ready(state, name)
        if fresh:
            self._tool("rbd", "pool", "init", POOL)
        for name in state.daemons:
            if name not in self._running(state):
                raise self._daemon_error(name, "ended")
        self._save(dataclasses.replace(state, ready=True))

    def _make_osd(self, name: str) -> None:
        osd_id, osd_uuid = name.removeprefix("osd."), str(uuid.uuid4())
        self._tool("ceph", "osd", "new", osd_uuid, osd_id)
        try:
            self._tool("ceph-osd", "--id", osd_id, "--mkfs", "--osd-uuid", osd_uuid, "--no-mon-config")
        except RbdfsError:
            raise self._daemon_error(name, "mkfs failed") from None

    def _start_mon(self, state: _State) -> _State:
        """The mon's own bind decides whose a port is: if another was faster, try the next."""
        for _ in range(PORT_ATTEMPTS):
            self._write_conf(state)
            try:
                return self._start_and_wait(state, "mon.a")
            except _DaemonError:
                if _port_is_free(state.port):  # the mon may end before its log says why
                    raise
            state = self._save(dataclasses.replace(state, port=_free_port()))
            self._write_monmap(state)
            self._tool("ceph-mon", "--id", "a", "--inject-monmap", str(self.folder / "monmap"))
        raise _DaemonError(
            f"mon.a found no free port on 127.0.0.1 in {PORT_ATTEMPTS} attempts; see {self._log('mon.a')}"
        )

    def _start_and_wait(self, state: _State, name: str) -> _State:
        state = self._spawn(state, name)
        self._wait_until_ready(state, name)
        return state

    def _spawn(self, state: _State, name: str) -> _State:
        """Start a daemon and record it, with no signal in between.

        Not a Popen: that wants to be waited for by the one who made it. `env` only changes the folder and becomes the
        daemon, whose pid and start time it has.
        """
        kind, _, ident = name.partition(".")
        command = ["env", "--chdir=/", f"ceph-{kind}", "-f", "--conf", str(self.conf), "--id", ident]
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with _signals_blocked():
            pid = os.posix_spawnp(
                command[0],
                command,
                _environment(),
                setsid=True,
                setsigmask=(),
                setsigdef=(*SIGNALS, signal.SIGPIPE),
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, str(self._log(name)), flags, 0o600),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
            )
            process = _Process(pid, _state_and_start(pid)[1])
            return self._save(dataclasses.replace(state, processes={**state.processes, name: process}))

    def _wait_until_ready(self, state: _State, name: str) -> None:
        """Asked at its admin socket: no other cluster's mon can be mistaken for ours there."""
        question, answer = ("mon_status", "leader") if name == "mon.a" else ("status", "active")
        path = f"{state.run_dir}/ceph-{name}.asok"
        process, deadline = state.processes[name], time.monotonic() + START_SECONDS
        while _ask(path, question) != answer:
            if not process.alive(self.conf):
                raise self._daemon_error(name, "ended")
            if time.monotonic() > deadline:
                raise self._daemon_error(name, f"was not ready in {START_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)

    def _tool(self, program: str, *arguments: str) -> str:
        command = [program, "--conf", str(self.conf), *arguments]
        if program == "monmaptool":
            command = [program, *arguments]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env=_environment(),
                cwd=self.folder,
                timeout=START_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RbdfsError(f"{shlex.join(command)}: no answer in {START_SECONDS:.0f} s", errno.ETIMEDOUT) from None
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise RbdfsError(f"{shlex.join(command)}: {said}")
        return done.stdout

    # ---- watching and stopping it

    def _log(self, name: str) -> Path:
        return self.folder / "log" / f"{name}.log"

    def _daemon_error(self, name: str, what: str) -> _DaemonError:
        lines = self._log(name).read_text(errors="replace").splitlines() if self._log(name).exists() else []
        errors = [match[1] for line in lines if (match := ERROR_LINE.match(line))]
        said = (errors or [line.strip() for line in lines if line.strip()] or ["it wrote nothing"])[-1]
        return _DaemonError(f"{name} {what}: {said}; see {self._log(name)}")

    def _running(self, state: _State) -> list[str]:
        return [name for name, process in state.processes.items() if process.alive(self.conf)]

    def _kept(self, state: _State) -> bool:
        """Whether the cluster can be started again; of a memstore nothing is left when it has stopped."""
        return state.ready and (state.store == "bluestore" or bool(self._running(state)))

    def _stop(self, state: _State, names: Sequence[str], first: signal.Signals) -> None:
        """Signal these daemons and wait until they are gone. By pidfd: a pid might change hands meanwhile."""
        poll = select.poll()
        left: set[int] = set()
        with contextlib.ExitStack() as descriptors:
            for name in names:
                process = state.processes.get(name)
                with contextlib.suppress(ProcessLookupError):
                    if process and process.alive(self.conf):
                        descriptor = os.pidfd_open(process.pid)
                        descriptors.callback(os.close, descriptor)
                        if process.alive(self.conf):
                            poll.register(descriptor, select.POLLIN)
                            left.add(descriptor)
            for signum in (first, signal.SIGKILL):
                for descriptor in left:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(descriptor, signum)
                deadline = time.monotonic() + STOP_SECONDS
                while left and (ended := poll.poll(max(0.0, deadline - time.monotonic()) * 1000)):
                    for descriptor, _ in ended:
                        poll.unregister(descriptor)
                        left.remove(descriptor)
        self._running(state)  # reaps those that were our children
        if left:
            raise RbdfsError(f"{self.folder}: {len(left)} daemons did not end in {2 * STOP_SECONDS:.0f} s", errno.EBUSY)


# ---- commands


def up(options: DevclusterOptions) -> int:
    """`rbdfs devcluster up`: the line for `eval` on stdout, all else on stderr."""
    cluster = Devcluster(options)
    began = time.monotonic()
    try:
        with _interruptible():
            started = cluster.up()
    except _Interrupted as interrupted:
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
        with _interruptible():
            try:
                cluster.up()
                return _supervise(
                    command, _environment(CEPH_CONF=str(cluster.conf), CEPH_ARGS=os.environ.get("CEPH_ARGS"))
                )
            finally:
                with _signals_blocked():
                    if not any(before.pids.values()) and cluster.status().kept:
                        cluster.down(keep=before.kept)
                    if options.folder is None:  # there was nothing yet that `down` could remove
                        with contextlib.suppress(OSError):
                            folder.rmdir()
    except _Interrupted as interrupted:
        return interrupted.exit_code


def default_folder() -> Path:
    """One per user. On disk: a tmpfs (XDG_RUNTIME_DIR) is small, and takes bluestore's O_DIRECT from Linux 6.6 on."""
    return Path(f"/var/tmp/rbdfs-devcluster-{os.getuid()}")  # noqa: S108  another user's folder there is refused


def _supervise(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run the command as our foreground child, in the main thread, and outlive it.

    A Ctrl-C comes from the terminal, to the command as well as to us; what another process sends us (`kill`, a
    service manager) came to us alone and is handed on. Waiting for signals, rather than handling them, leaves no gap.
    """
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, signal.SIGCHLD))
    try:
        child = os.posix_spawnp(
            command[0], list(command), environment, setsigmask=previous, setsigdef=(signal.SIGPIPE, signal.SIGXFSZ)
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


class _Interrupted(BaseException):
    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """In the main thread: the first signal raises `_Interrupted`; a second does not cut the clean-up short."""

    def interrupt(signum: int, _frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise _Interrupted(signum)

    previous = {each: signal.getsignal(each) for each in SIGNALS}
    try:
        for each, handler in previous.items():
            if handler is not signal.SIG_IGN:  # nohup, or a shell's background job
                signal.signal(each, interrupt)
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _environment(**changes: str | None) -> dict[str, str]:
    """Ours, without what would lead Ceph's programs away from the folder's configuration."""
    changed = dict.fromkeys(FOREIGN_ENVIRONMENT) | changes
    return {name: value for name, value in (os.environ | changed).items() if value is not None}


def _free_port() -> int:
    """A port that nothing listens on now; whether it stays so, the mon finds out."""
    while not _port_is_free(port := random.choice(MON_PORTS)):  # noqa: S311
        pass
    return port


def _port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Ceph does: connections that linger do no harm
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _state_and_start(pid: int) -> tuple[str, int]:
    """Fields 3 and 22 (clock ticks since boot) of proc(5)'s stat; field 2, the name, may hold anything."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _command_line(pid: int) -> list[bytes]:
    """Empty for a zombie, and for some microseconds of an exec: that is waited for."""
    line = b""
    while not line and _state_and_start(pid)[0] not in "ZXI":
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    return line.split(b"\0")


def _ask(socket_path: str, question: str) -> str:
    """The `state` that a daemon reports at its admin socket; empty as long as it does not answer."""
    with socket.socket(socket.AF_UNIX) as admin, contextlib.suppress(OSError, ValueError, struct.error):
        admin.settimeout(START_SECONDS)
        admin.connect(socket_path)
        admin.sendall(json.dumps({"prefix": question}).encode() + b"\0")
        with admin.makefile("rb") as answer:
            (length,) = struct.unpack(">I", answer.read(4))
            return str(json.loads(answer.read(length)).get("state", ""))
    return ""


def _keyring(entities: Mapping[str, Mapping[str, str]]) -> str:
    """A keyring with new keys, as ceph-authtool writes it: type 1 (AES), time of creation, length, 16 random bytes."""
    sections = []
    for entity, caps in entities.items():
        key = struct.pack("<HIIH", 1, int(time.time()), 0, 16) + os.urandom(16)
        lines = [f'\tcaps {service} = "{cap}"' for service, cap in caps.items()]
        sections.append("\n".join([f"[{entity}]", f"\tkey = {base64.b64encode(key).decode()}", *lines]))
    return "\n".join(sections) + "\n"


def _tell(message: str) -> None:
    print(f"rbdfs: {message}", file=sys.stderr)
