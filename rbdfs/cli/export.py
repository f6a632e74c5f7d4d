"""`rbdfs export`: its options."""

import argparse
from pathlib import Path

from rbdfs.cli.cluster import add_cluster_options, cluster_options
from rbdfs.cli.images import add_image, add_read_options
from rbdfs.cli.types import digest

_EPILOG = """\
exit status: 0 the copy is whole and on the disk, 1 it failed (one line on stderr says why, and at which offset),
2 wrong usage, 3 nothing tells that PATH is what --update could go on from (--full can), 128+N stopped by signal N
(130 Ctrl-C, 143 SIGTERM)
"""


def add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `export`."""
    parser = commands.add_parser(
        "export",
        help="copy an image to a file or a pipe, without a mount",
        description="Copy an image or a snapshot to a new file, PATH.partial until it is whole; holes stay holes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_image(parser)
    parser.add_argument("path", metavar="PATH", help="a file that is not there yet; - is standard output")
    parser.add_argument(
        "--force", action="store_true", help="write over a file or block device that is there: what it held is lost"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue PATH.partial, of an export of the same snapshot that did not end, after a look at what is in it",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="if PATH is a copy of an earlier snapshot of the image, made by this command: write into it what has "
        "changed since, in place; if it is not there, make it. Killed at any moment, the same command goes on",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="with --update, whatever PATH is: compare all of it with the image, and write what differs",
    )
    add_read_options(parser)
    parser.add_argument(
        "--checksum",
        metavar="NAME",
        type=digest,
        help="print a digest of the whole image, holes included: sha256, or another that hashlib knows; "
        "on stderr where the image goes to stdout",
    )
    parser.add_argument("--no-progress", action="store_true", help="only tell what is wrong")
    parser.add_argument(
        "--json", action="store_true", help="print what was done: bytes changed, read and written, and seconds"
    )
    add_cluster_options(parser)
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    from rbdfs.commands.export import ExportOptions, export  # noqa: PLC0415  (needs trio, rados, rbd and tqdm)

    return export(
        ExportOptions(
            cluster=cluster_options(options),
            image=options.image,
            path=None if options.path == "-" else Path(options.path),
            force=options.force,
            resume=options.resume,
            concurrency=options.concurrency,
            bytes_per_second=options.limit_rate,
            checksum=options.checksum,
            progress=not options.no_progress,
            update=options.update,
            full=options.full,
            as_json=options.json,
        )
    )
