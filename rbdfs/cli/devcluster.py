"""`rbdfs devcluster`: its options."""

import argparse
from pathlib import Path

from rbdfs.cli.types import positive


def add_devcluster(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `devcluster`."""
    parser = commands.add_parser(
        "devcluster",
        help="run a real single-node Ceph in a folder, to try things on",
        description="A real Ceph (mon, mgr, OSDs, cephx) on loopback, from Debian's packages, in one folder. No root "
        "needed, no path outside the folder touched.",
    )
    actions = parser.add_subparsers(metavar="up|down|status|run", required=True)

    up = actions.add_parser(
        "up",
        help="start it; prints the line to eval: export CEPH_CONF=...",
        description='Start a cluster and wait until pool rbd can be used: eval "$(rbdfs devcluster up)". One that was '
        "stopped and kept is started again with its data.",
    )
    _add_devcluster_folder(up)
    _add_devcluster_shape(up)
    up.set_defaults(command=_devcluster_up)

    down = actions.add_parser("down", help="stop it, and remove its data", description="Stop it, and remove its data.")
    _add_devcluster_folder(down)
    down.add_argument("--keep", action="store_true", help="keep the data, for the next up")
    down.set_defaults(command=_devcluster_down)

    status = actions.add_parser(
        "status", help="tell whether it runs", description="Tell whether it runs; exit status 0 if it does, 3 if not."
    )
    _add_devcluster_folder(status)
    status.set_defaults(command=_devcluster_status)

    run = actions.add_parser(
        "run",
        help="run a command with a cluster that ends with it",
        description="Start a cluster, run a command with CEPH_CONF set, take the cluster down again; the exit status "
        "is the command's.",
        usage="rbdfs devcluster run [-h] [--osds N] [--store STORE] [FOLDER] -- COMMAND ...",
    )
    _add_devcluster_shape(run)
    run.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, help="where all of it is [a temporary folder]")
    run.set_defaults(command=_devcluster_run)


def _add_devcluster_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=Path,
        help="where all of it is [/var/tmp/rbdfs-devcluster-UID]",
    )


def _add_devcluster_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--osds",
        metavar="N",
        type=positive,
        default=1,
        help="object storage daemons [1]; with 3 or more, pools keep 3 copies of each object, and there is a pool ec, "
        "erasure-coded (k=2, m=1), for rbd create --data-pool ec",
    )
    parser.add_argument(
        "--store",
        choices=("bluestore", "memstore"),
        default="bluestore",
        help="where the OSDs keep data: on disk as in production, or in memory [bluestore]",
    )


def _devcluster_up(options: argparse.Namespace) -> int:
    from rbdfs.commands import devcluster  # noqa: PLC0415
    from rbdfs.devcluster.cluster import DevclusterOptions  # noqa: PLC0415

    return devcluster.up(DevclusterOptions(options.folder, options.osds, options.store))


def _devcluster_down(options: argparse.Namespace) -> int:
    from rbdfs.commands import devcluster  # noqa: PLC0415

    return devcluster.down(options.folder, options.keep)


def _devcluster_status(options: argparse.Namespace) -> int:
    from rbdfs.commands import devcluster  # noqa: PLC0415

    return devcluster.status(options.folder)


def _devcluster_run(options: argparse.Namespace) -> int:
    from rbdfs.commands import devcluster  # noqa: PLC0415
    from rbdfs.devcluster.cluster import DevclusterOptions  # noqa: PLC0415

    return devcluster.run(DevclusterOptions(options.folder, options.osds, options.store), options.command_line)
