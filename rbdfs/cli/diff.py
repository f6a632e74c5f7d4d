"""The options of `rbdfs diff`."""

import argparse

from rbdfs.cli.options import add_cluster_options, add_command, add_image, cluster_options

EPILOG = """\
exit status: 0 the list is complete, whatever has changed, 1 it failed (one line on stderr says why, and JSON is cut
off), 2 wrong usage, 128+N stopped by signal N (130 Ctrl-C, 143 SIGTERM)
"""


def add_diff(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command `diff`."""
    parser = add_command(
        commands,
        "diff",
        summary="list what has changed in an image since a snapshot",
        description="List which bytes of an image or a snapshot were written or became zeros, as rbd diff does, in the "
        "order of the image, with a bar and totals. It asks each object and does not use the fast-diff map, which is "
        "wrong after a rollback. If another parent shows through than before (flattened, or shrunk and grown), a line "
        "on stderr says where: neither command lists that.",
        epilog=EPILOG,
    )
    add_image(parser)
    parser.add_argument(
        "--from-snap", metavar="SNAPSHOT", help="an earlier snapshot to compare with [the creation of the image]"
    )
    parser.add_argument(
        "--whole-object",
        action="store_true",
        help="list each object that has changed as a whole; with striping, all its stripe units",
    )
    parser.add_argument("--json", action="store_true", help="print only the list, as rbd diff --format json does")
    add_cluster_options(parser)
    parser.set_defaults(command=_diff)


def _diff(options: argparse.Namespace) -> int:
    from rbdfs.commands.diff import DiffOptions, diff  # noqa: PLC0415  (needs trio, rados and rbd)

    return diff(
        DiffOptions(
            cluster=cluster_options(options),
            image=options.image,
            from_snapshot=options.from_snap,
            whole_objects=options.whole_object,
            as_json=options.json,
        )
    )
