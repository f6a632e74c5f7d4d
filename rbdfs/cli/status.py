"""The options of `rbdfs status`."""

import argparse
from pathlib import Path

from rbdfs.cli.options import add_command

EPILOG = """\
exit status: 0 every mount shown answers, 1 one does not, or MOUNTPOINT is no rbdfs mount, 2 wrong usage
"""


def add_status(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command `status`."""
    parser = add_command(
        commands,
        "status",
        summary="show the mounts of this host, their open files and waiting requests",
        description="Show the mounts of this host: cluster and client, the process that serves it, open files and the "
        "processes that opened them, how full the cache is, which requests wait and for how long, and the last errors. "
        "A mount answers only root and the user who mounted it, and asks the cluster nothing.",
        epilog=EPILOG,
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?", type=Path, help="show only this mount [all]")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON for scripts: sizes in bytes, durations in seconds, times since the epoch",
    )
    parser.set_defaults(command=_status)


def _status(options: argparse.Namespace) -> int:
    from rbdfs.commands.status import StatusOptions, status  # noqa: PLC0415  (needs trio)

    return status(StatusOptions(options.mountpoint, as_json=options.json))
