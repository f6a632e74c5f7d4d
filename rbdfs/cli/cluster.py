"""What commands that talk to a cluster have in common: its options, and the exit status."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rbdfs.cli.types import positive
from rbdfs.errors import UsageError

if TYPE_CHECKING:
    from rbdfs.ceph.connection.connect import ClusterOptions

EPILOG = """\
exit status: 0 success, 1 the command failed (one line on stderr says why), 2 wrong usage, 130 interrupted
"""

CLUSTER_OPTIONS = "cluster options, as of the rbd command"


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Which cluster, and who we are there."""
    group = parser.add_argument_group(CLUSTER_OPTIONS)
    group.add_argument("-c", "--conf", metavar="FILE", type=Path, help="ceph.conf [CEPH_CONF, /etc/ceph/CLUSTER.conf]")
    group.add_argument(
        "--cluster", metavar="NAME", help="name of the cluster, which names its files in /etc/ceph [ceph]"
    )
    who = group.add_mutually_exclusive_group()
    who.add_argument("-n", "--name", metavar="TYPE.ID", help="who connects [client.admin]")
    who.add_argument("--id", "--user", metavar="ID", help="the same, without the type client.")
    group.add_argument("-k", "--keyring", metavar="FILE", type=Path, help="the keyring with its key [as in ceph.conf]")
    group.add_argument(
        "-m", "--mon-host", "--mon_host", metavar="ADDRESS", help="monitors to connect to [as in ceph.conf]"
    )
    group.add_argument(
        "--connect-timeout",
        metavar="SECONDS",
        type=positive,
        default=30,
        help="give up a cluster that does not answer after this time [30]",
    )
    group.add_argument(
        "--osd-timeout",
        metavar="SECONDS",
        type=int,
        default=120,
        help="what the cluster does not answer fails with ETIMEDOUT after this time [120]; 0 waits for ever; "
        "rados_osd_op_timeout in ceph.conf, if set, goes first",
    )


def cluster_options(options: argparse.Namespace) -> "ClusterOptions":
    """What they say. Raises UsageError."""
    from rbdfs.ceph.connection.connect import DEFAULT_NAME, ClusterOptions  # noqa: PLC0415  (needs rados)

    if options.name and "." not in options.name:
        raise UsageError(f"--name takes a type and an id, as client.{options.name}; for the id alone there is --id")
    return ClusterOptions(
        conf=options.conf,
        cluster=options.cluster,
        name=options.name or (f"client.{options.id}" if options.id else DEFAULT_NAME),
        keyring=options.keyring,
        mon_host=options.mon_host,
        connect_timeout=options.connect_timeout,
        osd_timeout=options.osd_timeout,
    )
