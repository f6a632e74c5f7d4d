"""What several commands have in common on the command line: options, exit statuses, the way they are described."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rbdfs.cli.types import positive, rate
from rbdfs.errors import UsageError

if TYPE_CHECKING:
    from rbdfs.ceph.connection.connect import ClusterOptions

EPILOG = """\
exit status: 0 success, 1 the command failed (one line on stderr says why), 2 wrong usage, 130 interrupted
"""

CLUSTER_OPTIONS = "cluster options, as of the rbd command"


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    *,
    summary: str,
    description: str,
    epilog: str = EPILOG,
) -> argparse.ArgumentParser:
    """Add a command. `summary` is its line in `rbdfs --help`; the epilog is printed as it is."""
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the cluster and the user."""
    group = parser.add_argument_group(CLUSTER_OPTIONS)
    _add_early_options(group, group.add_mutually_exclusive_group())
    group.add_argument(
        "-k", "--keyring", metavar="FILE", type=Path, help="keyring with the user's key [as in ceph.conf]"
    )
    group.add_argument(
        "-m", "--mon-host", "--mon_host", metavar="ADDRESS", help="monitors to connect to [as in ceph.conf]"
    )
    group.add_argument(
        "--connect-timeout",
        metavar="SECONDS",
        type=positive,
        default=30,
        help="give up connecting after this time [30]",
    )
    group.add_argument(
        "--osd-timeout",
        metavar="SECONDS",
        type=int,
        default=120,
        help="requests that the cluster does not answer fail with ETIMEDOUT after this time [120]; 0 waits forever; "
        "rados_osd_op_timeout in ceph.conf, if set, takes precedence",
    )


def _add_early_options(group: "argparse._ActionsContainer", user: "argparse._ActionsContainer") -> None:
    """Those without which librados reads no configuration (`ceph_argparse_early_args`)."""
    group.add_argument("-c", "--conf", metavar="FILE", type=Path, help="ceph.conf [CEPH_CONF, /etc/ceph/CLUSTER.conf]")
    group.add_argument(
        "--cluster", metavar="NAME", help="name of the cluster, which names its files in /etc/ceph [ceph]"
    )
    user.add_argument("-n", "--name", metavar="TYPE.ID", help="the user to connect as [client.admin]")
    user.add_argument(
        "--id", "--user", dest="name", metavar="ID", type="client.{}".format, help="the same, without the type client."
    )


def _early_options_of_environment() -> argparse.Namespace:
    """What CEPH_ARGS says of the cluster and the user, as the rbd command takes it. librados sees to the rest of it."""
    parser = argparse.ArgumentParser(prog="CEPH_ARGS", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    _add_early_options(parser, parser)
    return parser.parse_known_args(os.environ.get("CEPH_ARGS", "").split())[0]


def cluster_options(options: argparse.Namespace) -> "ClusterOptions":
    """The values of the cluster options. Raises UsageError."""
    from rbdfs.ceph.connection.connect import DEFAULT_NAME, ClusterOptions  # noqa: PLC0415  (needs rados)

    environment = _early_options_of_environment()
    name = options.name or environment.name or DEFAULT_NAME
    if "." not in name:
        raise UsageError(f"--name takes a type and an id, as client.{name}; for the id alone there is --id")
    return ClusterOptions(
        conf=options.conf or environment.conf,
        cluster=options.cluster or environment.cluster,
        name=name,
        keyring=options.keyring,
        mon_host=options.mon_host,
        connect_timeout=options.connect_timeout,
        osd_timeout=options.osd_timeout,
    )


def add_image(parser: argparse.ArgumentParser) -> None:
    """Add the image as an argument."""
    parser.add_argument("image", metavar="IMAGE-SPEC", help="[POOL/[NAMESPACE/]]IMAGE[@SNAPSHOT]")


def add_read_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that reads all of an image."""
    parser.add_argument(
        "--concurrency",
        metavar="N",
        type=positive,
        help="reads in flight, each of up to 4M [rbd_concurrent_management_ops: 10]; each takes 8M of memory",
    )
    parser.add_argument(
        "--limit-rate",
        metavar="SIZE",
        type=rate,
        help="bytes to read from the cluster per second, at most: 100M [no limit]",
    )
    parser.add_argument("--no-progress", action="store_true", help="print no progress, only results and errors")
