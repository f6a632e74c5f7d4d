"""The options of `rbdfs verify`."""

import argparse
from pathlib import Path

from rbdfs.cli.options import add_cluster_options, add_command, add_image, add_read_options, cluster_options

EPILOG = """\
exit status: 0 the same, 1 it differs, or is not known to be whole, or could not be compared (then one line on stderr
says why), 2 wrong usage, 128+N stopped by signal N (130 Ctrl-C, 143 SIGTERM)
"""


def add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command `verify`."""
    parser = add_command(
        commands,
        "verify",
        summary="compare a file or block device with an image",
        description="Read an image or a snapshot and a file or block device, and print which ranges differ, in sectors "
        "of 512 bytes. A file must have the size of the image; a device may be larger. Nothing is written. A file "
        "that an unfinished export --update has changed is never the same, whatever it holds: finish the update first.",
        epilog=EPILOG,
    )
    add_image(parser)
    parser.add_argument("path", metavar="PATH", help="the file or block device, made by any program")
    add_read_options(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help="print all ranges that differ, for scripts; without, the first 100; beyond 262144, only their bytes are "
        "counted, as left_out_bytes",
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
