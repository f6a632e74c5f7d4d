"""`rbdfs export`, `verify`, `diff` and `map`, which work on one image: their options."""

import argparse
from pathlib import Path

from rbdfs.cli.cluster import EPILOG, add_cluster_options, cluster_options
from rbdfs.cli.types import digest, positive, rate, size

EXPORT_EPILOG = """\
exit status: 0 the copy is whole and on the disk, 1 it failed (one line on stderr says why, and at which offset),
2 wrong usage, 3 nothing tells that PATH is what --update could go on from (--full can), 128+N stopped by signal N
(130 Ctrl-C, 143 SIGTERM)
"""


DIFF_EPILOG = """\
exit status: 0 it was listed to the end, whatever has changed, 1 it failed (one line on stderr says why, and JSON has no
end), 2 wrong usage, 128+N stopped by signal N (130 Ctrl-C, 143 SIGTERM)
"""

VERIFY_EPILOG = """\
exit status: 0 the same, 1 it differs, or is not known to be whole, or it could not be compared (then one line on stderr
says why), 2 wrong usage, 128+N stopped by signal N (130 Ctrl-C, 143 SIGTERM)
"""


def _add_image(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE-SPEC", help="[POOL/[NAMESPACE/]]IMAGE[@SNAPSHOT]")


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
    _add_image(parser)
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
    _add_read_options(parser)
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


def _add_read_options(parser: argparse.ArgumentParser) -> None:
    """Of a command that reads all of an image."""
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


def add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `verify`."""
    parser = commands.add_parser(
        "verify",
        help="compare a file or block device with an image",
        description="Read an image or a snapshot and a file or block device, and print which ranges differ, in sectors "
        "of 512 bytes. A file must have the size of the image; a device may be larger. Nothing is written. A file that "
        "an export --update has begun to change is never the same, whatever it holds: it is to be ended first.",
        epilog=VERIFY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_image(parser)
    parser.add_argument("path", metavar="PATH", help="the file or block device, made by any program")
    _add_read_options(parser)
    parser.add_argument("--no-progress", action="store_true", help="print only what was found")
    parser.add_argument(
        "--json",
        action="store_true",
        help="all ranges that differ, for scripts; without, the first 100; beyond 262144 their bytes are counted, as "
        "left_out_bytes",
    )
    add_cluster_options(parser)
    parser.set_defaults(command=_verify)


def _verify(options: argparse.Namespace) -> int:
    from rbdfs.commands.verify import VerifyOptions, verify  # noqa: PLC0415  (needs trio, rados, rbd and tqdm)

    return verify(
        VerifyOptions(
            cluster=cluster_options(options),
            image=options.image,
            path=Path(options.path),
            concurrency=options.concurrency,
            bytes_per_second=options.limit_rate,
            progress=not options.no_progress,
            as_json=options.json,
        )
    )


def add_diff(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `diff`."""
    parser = commands.add_parser(
        "diff",
        help="list what has changed in an image since a snapshot",
        description="List which bytes of an image or a snapshot were written or became zeros, as rbd diff does, in the "
        "order of the image, with a picture and totals. Each object is asked, and no fast-diff map, which is wrong "
        "after a roll back. If another parent shows through than before (flattened, or shrunk and grown), a line on "
        "stderr says where: neither command lists that.",
        epilog=DIFF_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_image(parser)
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
    _add_image(parser)
    parser.add_argument("--offset", metavar="N", type=size, default=0, help="where to begin in the image: 0, 12G [0]")
    parser.add_argument("--length", metavar="N", type=size, help="how much of it [to the end]")
    parser.add_argument(
        "--json",
        action="store_true",
        help="all of it, for scripts; the table ends after 100 rows; an OSD that the table calls none is 2147483647, "
        "as in ceph osd map --format json",
    )
    add_cluster_options(parser)
    parser.set_defaults(command=_map)


def _map(options: argparse.Namespace) -> int:
    from rbdfs.commands.map import MapOptions, map_image  # noqa: PLC0415  (needs trio, rados and rbd)

    return map_image(
        MapOptions(cluster_options(options), options.image, options.offset, options.length, as_json=options.json)
    )
