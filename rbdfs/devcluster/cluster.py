"""The cluster of one folder: making it, starting it, asking how it is, stopping and removing it."""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import socket
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rbdfs.devcluster.conf import SHARDS, UNSAFE_IN_CONF, conf_text, keyring_text, mon_address
from rbdfs.devcluster.daemon import Daemon, DaemonError, running, stop
from rbdfs.devcluster.programs import require_programs, run_program
from rbdfs.devcluster.signals import signals_blocked
from rbdfs.devcluster.state import NEW_STATE_FILE, STATE_FILE, State, Store, load, locked, save
from rbdfs.errors import RbdfsError, UsageError

POOL = "rbd"
EC_POOL = "ec"
"""An erasure-coded pool for `rbd create --data-pool`. It is made if there are OSDs for all shards of an object."""
PG_COUNT = 32
SOCKET_PATH_BYTES = 107  # sun_path without its final NUL
MON_PORTS = range(20000, 32000)  # below Linux's ephemeral ports, away from Ceph's own 6800-7568
PORT_ATTEMPTS = 8
OURS = ("ceph.conf", "keyring", "monmap", "mon", "mgr", "log", "run", "crash")  # and osd0, osd1, ...


@dataclass(frozen=True, slots=True)
class DevclusterOptions:
    """What to make. A cluster that exists keeps the OSDs and the store that it was made with."""

    folder: Path | None = None
    """None: one per user; for `run`, a temporary folder."""
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
        # On disk: a tmpfs (XDG_RUNTIME_DIR) is small, and takes bluestore's O_DIRECT from Linux 6.6 on.
        default = Path(f"/var/tmp/rbdfs-devcluster-{os.getuid()}")  # noqa: S108  another user's folder is refused
        self.folder = (options.folder or default).absolute()
        self.conf = self.folder / "ceph.conf"
        """What CEPH_CONF must name to use the cluster."""
        if UNSAFE_IN_CONF.search(str(self.folder)):
            raise UsageError(f"{self.folder}: ceph.conf cannot name a folder with spaces or any of #;,=$\"'\\")
        if options.osds < 1:
            raise UsageError("a devcluster needs at least one OSD")

    def up(self) -> bool:
        """Make what is not there, start what does not run, wait until pool `rbd` can be used. False: it ran already.

        What was started is stopped again on any error. An error leaves the logs, for the person who reads its message;
        an interruption leaves nothing, or a kept cluster as it was.
        """
        require_programs()
        with locked(self.folder):
            state = load(self.folder)
            before = running(self.folder) if state else {}
            if state and state.ready and before.keys() >= set(state.daemons):
                return False
            try:
                if state is None or not self._kept(state):
                    self._clear(state)
                    state, before = self._create(), {}
                self._start(state)
            except BaseException as error:
                with signals_blocked():
                    if state := load(self.folder):
                        stop(self.folder, [name for name in state.daemons if name not in before], signal.SIGKILL)
                        if not state.ready and not isinstance(error, RbdfsError):
                            self._remove(state)
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
            if state and keep:
                if state.store == "memstore":
                    raise UsageError(f"{self.folder}: a memstore holds its data in memory; it cannot be kept")
                # One after the other: an OSD that ends tells the mon, and waits 5 s for one that is gone.
                for name in sorted(state.daemons, reverse=True):
                    stop(self.folder, [name], signal.SIGTERM)
            else:
                self._remove(state)
        return state is not None

    def status(self) -> DevclusterStatus:
        """Asks the mon for the health if it runs; changes nothing."""
        state = load(self.folder)
        if state is None:
            return DevclusterStatus({}, "no cluster", kept=False)
        found = running(self.folder)
        pids = {name: found.get(name) for name in state.daemons}
        health = "stopped" if state.ready else "did not start"
        if pids["mon.a"]:
            try:
                health = self._tool("ceph", "--connect-timeout", "5", "health").splitlines()[0]
            except RbdfsError as error:
                health = str(error)
        return DevclusterStatus(pids, health, self._kept(state))

    def kill_daemon(self, name: str) -> None:
        """SIGKILL to one daemon (`osd.0`), and wait until it is gone: what a power failure is like."""
        with locked(self.folder):
            self._known(name)
            stop(self.folder, [name], signal.SIGKILL)

    def start_daemon(self, name: str) -> None:
        """Start one daemon that does not run, and wait until it is ready."""
        with locked(self.folder):
            state = self._known(name)
            if name not in running(self.folder):
                self._start_daemon(state, name)
                self._daemon(state, name).wait_until_ready()

    def _known(self, name: str) -> State:
        state = load(self.folder)
        if state is None or name not in state.daemons:
            raise UsageError(f"{self.folder}: there is no daemon {name}")
        return state

    def _clear(self, state: State | None) -> None:
        """Remove all that we made, the state last: until then the folder is still known as ours."""
        if state is None:
            return
        stop(self.folder, state.daemons, signal.SIGKILL)
        for name in (*OURS, *(f"osd{i}" for i in range(state.osds)), NEW_STATE_FILE, STATE_FILE):
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.rmtree(state.run_dir, ignore_errors=True)

    def _remove(self, state: State | None) -> None:
        self._clear(state)
        with contextlib.suppress(OSError):  # another's files are in it, or it is a mount point
            self.folder.rmdir()

    def _create(self) -> State:
        """The files of a new cluster, up to where its mon can be started."""
        options = self._options
        run_dir = str(self.folder / "run")
        with signals_blocked():
            if len(os.fsencode(f"{run_dir}/ceph-osd.{options.osds}.asok")) > SOCKET_PATH_BYTES:
                run_dir = tempfile.mkdtemp(prefix="rbdfs-devcluster-", dir="/tmp")  # TMPDIR may be long
            state = State(str(uuid.uuid4()), free_port(), options.osds, options.store, options.block_bytes, run_dir)
            save(self.folder, state)
        for name in ("mon", "mgr", "log", "run", "crash", *(f"osd{i}" for i in range(state.osds))):
            (self.folder / name).mkdir()
        keyring = self.folder / "keyring"
        keyring.touch(mode=0o600)
        keyring.write_text(keyring_text(state))
        self._configure(state)
        monmap = str(self.folder / "monmap")
        self._tool("ceph-mon", "--mkfs", "--id", "a", "--monmap", monmap, "--keyring", str(keyring))
        return state

    def _configure(self, state: State) -> None:
        """Write what daemons and clients are told."""
        self.conf.write_text(conf_text(self.folder, state))
        mon = ["--fsid", state.fsid, "--addv", "a", f"[{mon_address(state)}]", str(self.folder / "monmap")]
        run_program(["monmaptool", "--create", "--clobber", *mon], self.folder)

    def _start(self, state: State) -> None:
        fresh = not state.ready
        before = running(self.folder)
        osds = [name for name in state.daemons if name.startswith("osd.") and name not in before]
        if "mon.a" not in before:
            self._configure(state)
            state = self._start_daemon(state, "mon.a")
            self._daemon(state, "mon.a").wait_until_ready()
        if fresh:
            # Device health would add a pool of its own. The mgr, not yet there, is who knows the option: --force.
            self._tool("ceph", "config", "set", "mgr", "mgr/devicehealth/enable_monitoring", "false", "--force")
        for name in osds:
            if fresh:
                self._make_osd(state, name)
            self._start_daemon(state, name)
        if "mgr.x" not in before:  # last, because it keeps a processor busy for its first 2.5 s
            self._start_daemon(state, "mgr.x")
        if fresh:
            self._tool("ceph", "osd", "pool", "create", POOL, str(PG_COUNT))
        for name in osds:
            self._daemon(state, name).wait_until_ready()
        if fresh:
            self._tool("rbd", "pool", "init", POOL)
        if fresh and state.osds >= SHARDS:
            self._tool("ceph", "osd", "pool", "create", EC_POOL, str(PG_COUNT), "erasure")
            self._tool("ceph", "osd", "pool", "set", EC_POOL, "allow_ec_overwrites", "true")
            self._tool("ceph", "osd", "pool", "application", "enable", EC_POOL, "rbd")
        for name in state.daemons:
            if name not in running(self.folder):
                raise self._daemon(state, name).error("ended")
        save(self.folder, dataclasses.replace(state, ready=True))

    def _make_osd(self, state: State, name: str) -> None:
        osd_id, osd_uuid = name.removeprefix("osd."), str(uuid.uuid4())
        self._tool("ceph", "osd", "new", osd_uuid, osd_id)
        try:
            self._tool("ceph-osd", "--id", osd_id, "--mkfs", "--osd-uuid", osd_uuid, "--no-mon-config")
        except RbdfsError:
            raise self._daemon(state, name).error("mkfs failed") from None

    def _start_daemon(self, state: State, name: str) -> State:
        """The mon's own bind decides whose a port is: if another was faster, try the next."""
        for _ in range(PORT_ATTEMPTS):
            try:
                self._daemon(state, name).start()
                return state
            except DaemonError:
                if name != "mon.a" or port_is_free(state.port):
                    raise
            state = save(self.folder, dataclasses.replace(state, port=free_port()))
            self._configure(state)
            self._tool("ceph-mon", "--id", "a", "--inject-monmap", str(self.folder / "monmap"))
        raise self._daemon(state, name).error(f"found no free port on 127.0.0.1 in {PORT_ATTEMPTS} attempts")

    def _daemon(self, state: State, name: str) -> Daemon:
        return Daemon(name, self.folder, Path(state.run_dir))

    def _tool(self, program: str, *arguments: str) -> str:
        return run_program([program, "--conf", str(self.conf), *arguments], self.folder)

    def _kept(self, state: State) -> bool:
        """Whether the cluster can be started again; of a memstore nothing is left when it has stopped."""
        return state.ready and (state.store == "bluestore" or bool(running(self.folder)))


def free_port() -> int:
    """A port that nothing listens on now; whether it stays so, the mon finds out."""
    while not port_is_free(port := random.choice(MON_PORTS)):  # noqa: S311
        pass
    return port


def port_is_free(port: int) -> bool:
    """Whether it could be bound at this moment."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Ceph does: connections that linger do no harm
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
