"""`rbdfs diff`: its options."""

import argparse

from rbdfs.cli.cluster import add_cluster_options, cluster_options
from rbdfs.cli.images import add_image

_EPILOG = """\
exit status: 0 it was listed to the end, whatever has changed, 1 it failed (one line on stderr says why, and JSON has no
end), 2 wrong usage, 128+N stopped by signal N (130 Ctrl-C, 143 SIGTERM)
"""


def add_diff(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `diff`."""
    parser = commands.add_parser(
        "diff",
        help="list what has changed in an image since a snapshot",
        description="List which bytes of an image or a snapshot were written or became zeros, as rbd diff does, in the "
        "order of the image, with a picture and totals. Each object is asked, and no fast-diff map, which is wrong "
        "after a roll back. If another parent shows through than before (flattened, or shrunk and grown), a line on "
        "stderr says where: neither command lists that.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_image(parser)
    parser.add_argument(
        "--from-snap", metavar="SNAPSHOT", help="an earlier snapshot of the image [since the image was made]"
    )
    parser.add_argument(
        "--whole-object",
        action="store_true",
        help="all of each object in which something has changed; of a striped image, all its stripe units",
    )
    parser.add_argument("--json", action="store_true", help="the list alone, as rbd diff --format json prints it")
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
