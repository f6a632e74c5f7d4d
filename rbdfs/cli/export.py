"""The options of `rbdfs export`."""

import argparse
from pathlib import Path

from rbdfs.cli.options import add_cluster_options, add_command, add_image, add_read_options, cluster_options
from rbdfs.cli.types import digest

EPILOG = """\
exit status: 0 the copy is whole and on the disk, 1 it failed (one line on stderr says why, and at which offset),
2 wrong usage, 3 PATH is not known to be a copy that --update can start from (--full can), 128+N stopped by signal N
(130 Ctrl-C, 143 SIGTERM)
"""


def add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command `export`."""
    parser = add_command(
        commands,
        "export",
        summary="copy an image to a file or a pipe, without a mount",
        description="Copy an image or a snapshot to a new file. Its name is PATH.partial until it is whole. Holes stay "
        "holes.",
        epilog=EPILOG,
    )
    add_image(parser)
    parser.add_argument("path", metavar="PATH", help="a file that does not exist yet; - is standard output")
    parser.add_argument(
        "--force", action="store_true", help="overwrite an existing file or block device; its contents are lost"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue PATH.partial of an unfinished export of the same snapshot, after checking its contents",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="PATH is a copy of an earlier snapshot of the image, made by this command: write only what has changed "
        "since, in place. If PATH does not exist, make it. After a crash at any moment, run the same command again",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="with --update, for any PATH: compare all of it with the image and write what differs",
    )
    add_read_options(parser)
    parser.add_argument(
        "--checksum",
        metavar="NAME",
        type=digest,
        help="print a digest of the whole image, holes included: sha256, or another that hashlib knows; "
        "on stderr if stdout is in use",
    )
    parser.add_argument(
        "--json", action="store_true", help="print figures for scripts: bytes changed, read and written, and seconds"
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
