"""What commands that read one image have in common: their options."""

import argparse

from rbdfs.cli.types import positive, rate


def add_image(parser: argparse.ArgumentParser) -> None:
    """Which image."""
    parser.add_argument("image", metavar="IMAGE-SPEC", help="[POOL/[NAMESPACE/]]IMAGE[@SNAPSHOT]")


def add_read_options(parser: argparse.ArgumentParser) -> None:
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
