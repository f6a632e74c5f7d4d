"""`rbdfs verify`: its options."""

import argparse
from pathlib import Path

from rbdfs.cli.cluster import add_cluster_options, cluster_options
from rbdfs.cli.images import add_image, add_read_options

_EPILOG = """\
exit status: 0 the same, 1 it differs, or is not known to be whole, or it could not be compared (then one line on stderr
says why), 2 wrong usage, 128+N stopped by signal N (130 Ctrl-C, 143 SIGTERM)
"""


def add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command `verify`."""
    parser = commands.add_parser(
        "verify",
        help="compare a file or block device with an image",
        description="Read an image or a snapshot and a file or block device, and print which ranges differ, in sectors "
        "of 512 bytes. A file must have the size of the image; a device may be larger. Nothing is written. A file that "
        "an export --update has begun to change is never the same, whatever it holds: it is to be ended first.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_image(parser)
    parser.add_argument("path", metavar="PATH", help="the file or block device, made by any program")
    add_read_options(parser)
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
