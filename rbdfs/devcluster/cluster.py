"""The cluster of one folder: making it, starting it, asking how it is, stopping and removing it."""

import contextlib
import dataclasses
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rbdfs.devcluster import ports
from rbdfs.devcluster.conf import SHARDS, UNSAFE_IN_CONF, conf_text, keyring_text, mon_address
from rbdfs.devcluster.daemon import Daemon, DaemonError
from rbdfs.devcluster.process import stop
from rbdfs.devcluster.programs import require_programs, run_program
from rbdfs.devcluster.signals import signals_blocked
from rbdfs.devcluster.state import NEW_STATE_FILE, STATE_FILE, State, Store, load, locked, save
from rbdfs.errors import RbdfsError, UsageError

POOL = "rbd"
EC_POOL = "ec"
"""An erasure-coded pool for `rbd create --data-pool`. It is made if there are OSDs for all shards of an object."""
PG_COUNT = 32
SOCKET_PATH_BYTES = 107  # sun_path without its final NUL
PORT_ATTEMPTS = 8
OURS = ("ceph.conf", "keyring", "monmap", "mon", "mgr", "log", "run", "crash")  # and osd0, osd1, ...


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
        require_programs()
        with locked(self.folder):
            state = load(self.folder)
            running = self._running(state) if state else []
            if state and state.ready and len(running) == len(state.daemons):
                return False
            try:
                if state is None or not self._kept(state):
                    self._clear(state)
                    state, running = self._create(), []
                self._start(state)
            except BaseException as error:
                with signals_blocked():
                    if state := load(self.folder):
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
        with locked(self.folder):
            state = load(self.folder)
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
        state = load(self.folder)
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
        with locked(self.folder):
            state = self._known(name)
            self._stop(state, [name], signal.SIGKILL)

    def start_daemon(self, name: str) -> None:
        """Start one daemon that does not run, and wait until it is ready."""
        with locked(self.folder):
            state = self._known(name)
            if name not in self._running(state):
                self._start_and_wait(state, name)

    # ---- the folder

    def _known(self, name: str) -> State:
        state = load(self.folder)
        if state is None or name not in state.daemons:
            raise UsageError(f"{self.folder}: there is no daemon {name}")
        return state

    def _clear(self, state: State | None) -> None:
        """Remove all that we made, the state last: until then the folder is still known as ours."""
        if state is None:
            return
        self._stop(state, state.daemons, signal.SIGKILL)
        for name in (*OURS, *(f"osd{i}" for i in range(state.osds)), NEW_STATE_FILE, STATE_FILE):
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(state.run_dir, ignore_errors=True)

    def _remove_folder(self) -> None:
        with contextlib.suppress(OSError):  # another's files are in it, or it is a mount point
            self.folder.rmdir()

    # ---- making it

    def _create(self) -> State:
        """The files of a new cluster, up to where its mon can be started."""
        options = self._options
        run_dir = str(self.folder / "run")
        with signals_blocked():
            if len(os.fsencode(f"{run_dir}/ceph-osd.{options.osds}.asok")) > SOCKET_PATH_BYTES:
                run_dir = tempfile.mkdtemp(prefix="rbdfs-devcluster-", dir="/tmp")  # TMPDIR may be long
            state = State(
                str(uuid.uuid4()), ports.free_port(), options.osds, options.store, options.block_bytes, run_dir
            )
            save(self.folder, state)
        for name in ("mon", "mgr", "log", "run", "crash", *(f"osd{i}" for i in range(state.osds))):
            (self.folder / name).mkdir()
        keyring = self.folder / "keyring"
        keyring.touch(mode=0o600)
        keyring.write_text(keyring_text(state.osds))
        self.conf.write_text(conf_text(self.folder, state))
        self._write_monmap(state)
        monmap = str(self.folder / "monmap")
        self._tool("ceph-mon", "--mkfs", "--id", "a", "--monmap", monmap, "--keyring", str(keyring))
        return state

    def _write_monmap(self, state: State) -> None:
        address = f"[{mon_address(state)}]"
        monmap = str(self.folder / "monmap")
        command = ["monmaptool", "--create", "--clobber", "--fsid", state.fsid, "--addv", "a", address, monmap]
        run_program(command, self.folder)

    # ---- starting it

    def _start(self, state: State) -> None:
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
                self._make_osd(state, name)
            state = self._spawn(state, name)
        if "mgr.x" not in running:  # last, because it keeps a processor busy for its first 2.5 s
            state = self._spawn(state, "mgr.x")
        if fresh:
            self._tool("ceph", "osd", "pool", "create", POOL, str(PG_COUNT))
        for name in osds:
            self._daemon(state, name).wait_until_ready(state.processes[name])
        if fresh:
            self._tool("rbd", "pool", "init", POOL)
        if fresh and state.osds >= SHARDS:
            self._tool("ceph", "osd", "pool", "create", EC_POOL, str(PG_COUNT), "erasure")
            self._tool("ceph", "osd", "pool", "set", EC_POOL, "allow_ec_overwrites", "true")
            self._tool("ceph", "osd", "pool", "application", "enable", EC_POOL, "rbd")
        for name in state.daemons:
            if name not in self._running(state):
                raise self._daemon(state, name).error("ended")
        save(self.folder, dataclasses.replace(state, ready=True))

    def _make_osd(self, state: State, name: str) -> None:
        osd_id, osd_uuid = name.removeprefix("osd."), str(uuid.uuid4())
        self._tool("ceph", "osd", "new", osd_uuid, osd_id)
        try:
            self._tool("ceph-osd", "--id", osd_id, "--mkfs", "--osd-uuid", osd_uuid, "--no-mon-config")
        except RbdfsError:
            raise self._daemon(state, name).error("mkfs failed") from None

    def _start_mon(self, state: State) -> State:
        """The mon's own bind decides whose a port is: if another was faster, try the next."""
        for _ in range(PORT_ATTEMPTS):
            self.conf.write_text(conf_text(self.folder, state))
            try:
                return self._start_and_wait(state, "mon.a")
            except DaemonError:
                if ports.port_is_free(state.port):  # the mon may end before its log says why
                    raise
            state = save(self.folder, dataclasses.replace(state, port=ports.free_port()))
            self._write_monmap(state)
            self._tool("ceph-mon", "--id", "a", "--inject-monmap", str(self.folder / "monmap"))
        raise DaemonError(
            f"mon.a found no free port on 127.0.0.1 in {PORT_ATTEMPTS} attempts; see {self._daemon(state, 'mon.a').log}"
        )

    def _start_and_wait(self, state: State, name: str) -> State:
        state = self._spawn(state, name)
        self._daemon(state, name).wait_until_ready(state.processes[name])
        return state

    def _spawn(self, state: State, name: str) -> State:
        """Start a daemon and record it, with no signal in between."""
        with signals_blocked():
            process = self._daemon(state, name).spawn()
            return save(self.folder, dataclasses.replace(state, processes={**state.processes, name: process}))

    def _daemon(self, state: State, name: str) -> Daemon:
        log = self.folder / "log" / f"{name}.log"
        return Daemon(name, self.conf, log, f"{state.run_dir}/ceph-{name}.asok")

    def _tool(self, program: str, *arguments: str) -> str:
        return run_program([program, "--conf", str(self.conf), *arguments], self.folder)

    # ---- watching and stopping it

    def _running(self, state: State) -> list[str]:
        return [name for name, process in state.processes.items() if process.alive(self.conf)]

    def _kept(self, state: State) -> bool:
        """Whether the cluster can be started again; of a memstore nothing is left when it has stopped."""
        return state.ready and (state.store == "bluestore" or bool(self._running(state)))

    def _stop(self, state: State, names: Iterable[str], first: signal.Signals) -> None:
        stop([state.processes[name] for name in names if name in state.processes], self.conf, first)


def default_folder() -> Path:
    """One per user. On disk: a tmpfs (XDG_RUNTIME_DIR) is small, and takes bluestore's O_DIRECT from Linux 6.6 on."""
    return Path(f"/var/tmp/rbdfs-devcluster-{os.getuid()}")  # noqa: S108  another user's folder there is refused
