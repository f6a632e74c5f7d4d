"""The way into a cluster, and what is wrong with it when it is barred."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import rados

from rbdfs.ceph import librados
from rbdfs.ceph.errors import errno_of
from rbdfs.errors import ConnectError

DEFAULT_NAME = "client.admin"
DEFAULT_CLUSTER = "ceph"

SHORT_TIMEOUT_SECONDS = 40.0
"""Below it, operations would time out before librados asks the monitors where their OSD is now (objecter_timeout:
10 s), and an OSD that comes back elsewhere would not be found again."""


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Which cluster, and who we are there: the options of the `rbd` command. None is what librados finds by itself."""

    conf: Path | None = None
    cluster: str | None = None
    name: str = DEFAULT_NAME
    keyring: Path | None = None
    mon_host: str | None = None
    connect_timeout: int = 30
    """Seconds until an unreachable cluster is given up."""
    osd_timeout: int = 120
    """Seconds until an operation that no OSD answers fails with ETIMEDOUT; 0 waits for ever."""


def connect(options: ClusterOptions) -> rados.Rados:
    """A connection. Blocks for `connect_timeout` at most. Raises ConnectError, which says what to do."""
    client = _configured(options)
    try:
        client.connect()
    except rados.Error as error:
        reason = _why_refused(client, options, errno_of(error))
        client.shutdown()
        raise ConnectError(f"cannot connect to the cluster: {reason}") from error
    return client


def connect_for_reads(client: rados.Rados, options: ClusterOptions) -> librados.Cluster:
    """A second connection, for image data by the event API, as whom and to where `client` is connected.

    Blocks for `connect_timeout` at most. Raises ConnectError.
    """
    return librados.connect(
        {**librados.READ_OPTIONS, **_settings(client, options)},
        conf_file=options.conf,
        read_conf=client.conffile != rados.Rados.NO_CONF_FILE,
        cluster_name=options.cluster or DEFAULT_CLUSTER,
        client_name=options.name,
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
    """What we ask of Ceph beyond what its configuration says."""
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
    timeout = int(float(client.conf_get("rados_osd_op_timeout") or 0)) or options.osd_timeout
    settings["rados_osd_op_timeout"] = str(timeout)
    if 0 < timeout < SHORT_TIMEOUT_SECONDS:
        # librados asks for a new map when an operation is this old, and looks every so often: in time, then.
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
    client.conf_parse_env()  # CEPH_ARGS and CEPH_KEYRING, as the rbd command has it
    return client


def _why_refused(client: rados.Rados, options: ClusterOptions, number: int) -> str:
    """What a person can do about a connect() that failed. librados tells several causes by one errno."""
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
