"""`rbdfs status`: its options."""

import argparse
from pathlib import Path

EPILOG = """\
exit status: 0 every mount that is shown answers, 1 one does not, or MOUNTPOINT is no mount, 2 wrong usage
"""


def add_status(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `status`."""
    parser = commands.add_parser(
        "status",
        help="show the mounts of this host, what they have open, and what waits",
        description="Show the mounts of this host: cluster and client, which process serves it, what is open and who "
        "has opened it, how full the cache is, what waits and for how long, and the last errors. A mount tells root "
        "and the user who mounted it, and does not ask the cluster for that.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?", type=Path, help="this one alone [all]")
    parser.add_argument(
        "--json", action="store_true", help="for scripts: sizes in bytes, durations in seconds, times since the epoch"
    )
    parser.set_defaults(command=_status)


def _status(options: argparse.Namespace) -> int:
    from rbdfs.commands.status import StatusOptions, status  # noqa: PLC0415  (needs trio)

    return status(StatusOptions(options.mountpoint, as_json=options.json))
