"""Connecting to a cluster, and what a person can do if that fails."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import rados

from rbdfs.ceph.bindings import librados
from rbdfs.ceph.bindings.lifetime import Lifetime
from rbdfs.ceph.errors import errno_of
from rbdfs.errors import ConnectError

DEFAULT_NAME = "client.admin"
DEFAULT_CLUSTER = "ceph"

SHORT_TIMEOUT_SECONDS = 40.0
"""With a shorter timeout, operations would end before librados asks the monitors where their OSD is now
(objecter_timeout: 10 s), and an OSD that comes back at another address would not be found."""

NEEDED_CAPS = "mon 'profile rbd' osd 'profile rbd-read-only'"

ASK_SECONDS = 3
"""How long a monitor, or an OSD, may take to say why nothing is served. They are asked only after `connect_timeout`."""
ASKED_OSDS = 3
"""How many OSDs are tried: one of them may be at fault."""
BANNER = b"ceph v"
"""What an OSD sends first on each connection, in both versions of the messenger's protocol (msgr, msgr2)."""
FAULTS = ("PG_AVAILABILITY", "OSD_FULL", "SLOW_OPS")
"""The health checks that tell why an operation gets no answer."""


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Which cluster, and as which client: the options of the `rbd` command. None means librados's own default."""

    conf: Path | None = None
    cluster: str | None = None
    name: str = DEFAULT_NAME
    keyring: Path | None = None
    mon_host: str | None = None
    connect_timeout: int = 30
    """Seconds until a connection attempt is given up."""
    osd_timeout: int = 120
    """Seconds until an operation that no OSD answers fails with ETIMEDOUT; 0 waits for ever."""
    probe_seconds: int = 0
    """If not 0, replaces `osd_timeout` and the timeouts of the configuration: for a connection that is only tried."""


def connect(options: ClusterOptions) -> rados.Rados:
    """Connect. Blocks for `connect_timeout` at most. Raises ConnectError, which says what to do."""
    client = _configured(options)
    try:
        client.connect()
    except rados.Error as error:
        reason = _why_refused(client, options, errno_of(error))
        client.shutdown()
        raise ConnectError(f"cannot connect to the cluster: {reason}") from error
    return client


def connect_for_reads(client: rados.Rados, options: ClusterOptions, lifetime: Lifetime) -> librados.Cluster:
    """Make a second connection for image data, to the same cluster and as the same client as `client`.

    Blocks for `connect_timeout` at most. Raises ConnectError.
    """
    return librados.connect(
        {**librados.READ_OPTIONS, **_settings(client, options)},
        conf_file=options.conf,
        read_conf=client.conffile != rados.Rados.NO_CONF_FILE,
        cluster_name=options.cluster or DEFAULT_CLUSTER,
        client_name=options.name,
        lifetime=lifetime,
    )


def _configured(options: ClusterOptions) -> rados.Rados:
    client = _read_conf(options)
    for option, value in _settings(client, options).items():
        try:
            client.conf_set(option, value)
        except rados.Error as error:
            raise ConnectError(f"Ceph does not take {option} = {value}: {os.strerror(errno_of(error))}") from error
    return client


def _settings(client: rados.Rados, options: ClusterOptions) -> dict[str, str]:
    """The Ceph options that we set."""
    settings = {
        "client_mount_timeout": str(options.connect_timeout),
        # librbd's own cache would keep what others overwrite; ours knows close-to-open.
        "rbd_cache": "false",
        # Reads of a mount that promises not to write must not write access timestamps either.
        "rbd_atime_update_interval": "0",
        # Nor must they copy a parent's objects up into a clone.
        "rbd_clone_copy_on_read": "false",
    }
    if options.keyring is not None:
        settings["keyring"] = str(options.keyring)
    if options.mon_host is not None:
        settings["mon_host"] = options.mon_host
    # Whole seconds: Ceph takes no other.
    timeout = options.probe_seconds or int(float(client.conf_get("rados_osd_op_timeout") or 0)) or options.osd_timeout
    settings["rados_osd_op_timeout"] = str(timeout)
    if options.probe_seconds or not float(client.conf_get("rados_mon_op_timeout") or 0):
        settings["rados_mon_op_timeout"] = str(timeout)  # of a command; that of the binding does nothing (16.2)
    if 0 < timeout < SHORT_TIMEOUT_SECONDS:
        # The age of an operation at which librados asks for a new map, and how often it looks: soon enough.
        settings["objecter_timeout"] = settings["objecter_tick_interval"] = str(timeout / 4)
    return settings


def _read_conf(options: ClusterOptions) -> rados.Rados:
    names = {"name": options.name, "clustername": options.cluster}
    try:
        client = rados.Rados(conffile=str(options.conf) if options.conf else rados.Rados.DEFAULT_CONF_FILES, **names)
    except rados.Error as error:
        if options.conf is not None:
            raise ConnectError(f"cannot read {options.conf}: {os.strerror(errno_of(error))}") from error
        if options.mon_host is None:
            where = os.environ.get("CEPH_CONF") or f"/etc/ceph/{options.cluster or DEFAULT_CLUSTER}.conf"
            raise ConnectError(
                f"no ceph.conf: {where}: {os.strerror(errno_of(error))}; name one with --conf, or the monitors with -m"
            ) from error
        client = rados.Rados(conffile=rados.Rados.NO_CONF_FILE, **names)
    client.conf_parse_env()  # CEPH_ARGS and CEPH_KEYRING, as the rbd command does
    return client


def _why_refused(client: rados.Rados, options: ClusterOptions, number: int) -> str:
    """What a person can do about a connect() that failed. librados reports several causes by one errno."""
    monitors = client.conf_get("mon_host") or "none configured"
    if number == errno.ETIMEDOUT:
        return (
            f"no monitor answered within {options.connect_timeout} s (mon_host: {monitors}); "
            "is the cluster up, and reachable from here?"
        )
    if number in (errno.EACCES, errno.EPERM):
        keyrings = [Path(name) for name in client.conf_get("keyring").split(",")]
        present = [path for path in keyrings if os.access(path, os.R_OK)]
        if not present and not client.conf_get("key") and not client.conf_get("keyfile"):
            where = " or ".join(map(str, keyrings))
            return f"no key for {options.name}: cannot read {where}; name a keyring with --keyring"
        if present and not any(f"[{options.name}]" in path.read_text(errors="replace") for path in present):
            return f"no key for {options.name} in {' or '.join(map(str, present))}; name another user with --id"
        return (
            f"the monitors refuse {options.name}: its key is not the one the cluster has, or it has no mon caps "
            f"(compare 'ceph auth get {options.name}'; it needs mon 'profile rbd')"
        )
    return f"{os.strerror(number)} (mon_host: {monitors})"


class Monitors(Protocol):
    """The part of `rados.Rados` that tells the state of the cluster."""

    def mon_command(self, cmd: str, inbuf: bytes, timeout: int) -> tuple[int, bytes, str]:
        """Send a command to the monitors; returns status, answer and error text."""


def why_no_osd_answers(monitors: Monitors, name: str) -> str:
    """What a person can do when the monitors answer `name` and no OSD does. Blocks, for a few seconds at most.

    To a key without any OSD caps an OSD of Ceph 16.2 answers EPERM. One of 18.2 refuses its connection, and librados
    tries again for ever and reports nothing. The client is not told, so this function rules out all other causes.
    """
    osds = list(_addresses(_ask(monitors, "osd dump").get("osds", [])))
    if not osds:
        return "none is up that the monitors tell of; see 'ceph osd tree'"
    checks = _ask(monitors, "health").get("checks", {})
    for fault in FAULTS:
        if fault in checks:
            return f"{checks[fault]['summary']['message']}; see 'ceph health detail'"
    if not any(_is_served(host, port) for _, host, port in osds[:ASKED_OSDS]):
        osd, host, port = osds[0]
        return (
            f"this host cannot reach them, such as osd.{osd} at {host}:{port}; look for a network or firewall between"
        )
    return (
        f"they can be reached and the cluster reports no fault, so {name} may have no OSD caps "
        f"(compare 'ceph auth get {name}'); it needs the caps {NEEDED_CAPS}"
    )


def _ask(monitors: Monitors, command: str) -> dict[str, Any]:
    """The answer to a command; empty if this key may not ask."""
    question = json.dumps({"prefix": command, "format": "json"})
    status, answer, _ = monitors.mon_command(question, b"", ASK_SECONDS)
    return dict(json.loads(answer)) if status == 0 else {}


def _addresses(osds: list[dict[str, Any]]) -> Iterator[tuple[int, str, int]]:
    """The number, host and port of each OSD that is up."""
    for osd in osds:
        if osd["up"] and osd["public_addrs"]["addrvec"]:
            host, port = osd["public_addrs"]["addrvec"][0]["addr"].rsplit(":", 1)
            yield osd["osd"], host.strip("[]"), int(port)


def _is_served(host: str, port: int) -> bool:
    """Whether an OSD answers at this address. A stopped process accepts connections, and does not answer."""
    try:
        with socket.create_connection((host, port), ASK_SECONDS) as connection:
            return connection.recv(len(BANNER)) == BANNER
    except OSError:
        return False
