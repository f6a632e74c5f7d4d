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
    actions = parser.add_subparsers(metavar="up|down|status|run", required=True, dest="action")
    up = actions.add_parser(
        "up",
        help="start it; prints the line to eval: export CEPH_CONF=...",
        description='Start a cluster and wait until pool rbd can be used: eval "$(rbdfs devcluster up)". One that was '
        "stopped and kept is started again with its data.",
    )
    down = actions.add_parser("down", help="stop it, and remove its data", description="Stop it, and remove its data.")
    status = actions.add_parser(
        "status", help="tell whether it runs", description="Tell whether it runs; exit status 0 if it does, 3 if not."
    )
    run = actions.add_parser(
        "run",
        help="run a command with a cluster that ends with it",
        description="Start a cluster, run a command with CEPH_CONF set, take the cluster down again; the exit status "
        "is the command's.",
        usage="rbdfs devcluster run [-h] [--osds N] [--store STORE] [FOLDER] -- COMMAND ...",
    )
    for action in (up, down, status, run):
        where = "a temporary folder" if action is run else "/var/tmp/rbdfs-devcluster-UID"  # noqa: S108  (help)
        action.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, help=f"where all of it is [{where}]")
        action.set_defaults(command=_devcluster)
    down.add_argument("--keep", action="store_true", help="keep the data, for the next up")
    for action in (up, run):
        action.add_argument(
            "--osds",
            metavar="N",
            type=positive,
            default=1,
            help="object storage daemons [1]; with 3 or more, pools keep 3 copies of each object, and there is a pool "
            "ec, erasure-coded (k=2, m=1), for rbd create --data-pool ec",
        )
        action.add_argument(
            "--store",
            choices=("bluestore", "memstore"),
            default="bluestore",
            help="where the OSDs keep data: on disk as in production, or in memory [bluestore]",
        )


def _devcluster(options: argparse.Namespace) -> int:
    from rbdfs.commands import devcluster  # noqa: PLC0415
    from rbdfs.devcluster.cluster import DevclusterOptions  # noqa: PLC0415

    if options.action == "down":
        return devcluster.down(options.folder, options.keep)
    if options.action == "status":
        return devcluster.status(options.folder)
    shape = DevclusterOptions(options.folder, options.osds, options.store)
    return devcluster.up(shape) if options.action == "up" else devcluster.run(shape, options.command_line)
