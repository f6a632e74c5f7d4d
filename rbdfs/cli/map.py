"""The options of `rbdfs map`."""

import argparse

from rbdfs.cli.options import add_cluster_options, add_command, add_image, cluster_options
from rbdfs.cli.types import size


def add_map(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command `map`."""
    parser = add_command(
        commands,
        "map",
        summary="show where an image's bytes are: objects, placement groups, OSDs",
        description="Show in which objects, placement groups and OSDs an image's bytes are, and which are holes or its "
        "parent's. A hole over several objects is one row, without an object. Sizes and offsets are in bytes.",
    )
    add_image(parser)
    parser.add_argument("--offset", metavar="N", type=size, default=0, help="where to start in the image: 0, 12G [0]")
    parser.add_argument("--length", metavar="N", type=size, help="how many bytes to show: 64M [to the end]")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print all rows, for scripts; the table ends after 100; an OSD that the table calls none is 2147483647, "
        "as in ceph osd map --format json",
    )
    add_cluster_options(parser)
    parser.set_defaults(command=_map)


def _map(options: argparse.Namespace) -> int:
    from rbdfs.commands.map import MapOptions, map_image  # noqa: PLC0415  (needs trio, rados and rbd)

    return map_image(
        MapOptions(cluster_options(options), options.image, options.offset, options.length, as_json=options.json)
    )
