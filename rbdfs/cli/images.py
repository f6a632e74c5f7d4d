"""`rbdfs export` and `rbdfs map`, which work on one image: their options."""

import argparse
from pathlib import Path

from rbdfs.cli.cluster import EPILOG, add_cluster_options, cluster_options
from rbdfs.cli.types import digest, positive, rate, size

EXPORT_EPILOG = """\
exit status: 0 the copy is whole and on the disk, 1 it failed (one line on stderr says why, and at which offset),
2 wrong usage, 128+N stopped by signal N (130 Ctrl-C, 143 SIGTERM)
"""


def add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `export`."""
    parser = commands.add_parser(
        "export",
        help="copy an image to a file or a pipe, without a mount",
        description="Copy an image or a snapshot to a new file, PATH.partial until it is whole; holes stay holes.",
        epilog=EXPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("image", metavar="IMAGE-SPEC", help="[POOL/[NAMESPACE/]]IMAGE[@SNAPSHOT]")
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
        "--concurrency",
        metavar="N",
        type=positive,
        help="reads in flight, each of up to 4M [rbd_concurrent_management_ops: 10]; each takes 8M of memory",
    )
    parser.add_argument(
        "--limit-rate",
        metavar="SIZE",
        type=rate,
        help="read no more than this from the cluster in a second: 100M [no limit]",
    )
    parser.add_argument(
        "--checksum",
        metavar="NAME",
        type=digest,
        help="print a digest of the whole image, holes included: sha256, or another that hashlib knows; "
        "on stderr where the image goes to stdout",
    )
    parser.add_argument("--no-progress", action="store_true", help="only tell what is wrong")
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
        )
    )


def add_map(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `map`."""
    parser = commands.add_parser(
        "map",
        help="show where an image's bytes lie: objects, placement groups, OSDs",
        description="Show in which objects, placement groups and OSDs an image's bytes lie, and which are holes or its "
        "parent's. A hole over several objects is one row, without an object. Sizes and offsets are in bytes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("image", metavar="IMAGE-SPEC", help="[POOL/[NAMESPACE/]]IMAGE[@SNAPSHOT]")
    parser.add_argument("--offset", metavar="N", type=size, default=0, help="where to begin in the image: 0, 12G [0]")
    parser.add_argument("--length", metavar="N", type=size, help="how much of it [to the end]")
    parser.add_argument("--json", action="store_true", help="all of it, for scripts; the table ends after 100 rows")
    add_cluster_options(parser)
    parser.set_defaults(command=_map)


def _map(options: argparse.Namespace) -> int:
    from rbdfs.commands.map import MapOptions, map_image  # noqa: PLC0415  (needs trio, rados and rbd)

    return map_image(
        MapOptions(cluster_options(options), options.image, options.offset, options.length, as_json=options.json)
    )
