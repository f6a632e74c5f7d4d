"""The options of `rbdfs mount`."""

import argparse
import logging
import os
import re
from functools import partial
from pathlib import Path

from rbdfs.cli.options import add_cluster_options, add_command, cluster_options
from rbdfs.cli.types import address, octal, size

OPTION = re.compile(r'(?:\\.|"[^"]*"|[^,])+')
"""One of the options after -o, which commas separate; a comma within one is quoted or follows a backslash."""


def add_mount(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command `mount`."""
    parser = add_command(
        commands,
        "mount",
        summary="show the images of a cluster as files",
        description="Mount a cluster's images, read-only: MOUNTPOINT/POOL/IMAGE, or POOL/NAMESPACE/IMAGE. A "
        "snapshot is IMAGE@SNAPSHOT, listed in the hidden directory .snap/IMAGE/ beside its image. Returns when the "
        "mount is usable, then serves in the background until 'umount MOUNTPOINT' ('fusermount3 -u MOUNTPOINT' without "
        "root).",
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", type=Path, help="an existing directory")
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground, log to stderr")
    parser.add_argument(
        "-p", "--pool", metavar="POOL", action="append", default=[], help="show only this pool; repeatable"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log normal events too, not only problems")
    parser.add_argument("-d", "--debug", action="store_true", help="log everything")
    parser.add_argument(
        "--log-file", metavar="FILE", type=Path, help="file to log to [syslog in the background, else stderr]"
    )
    parser.add_argument(
        "--metrics",
        metavar="[ADDRESS:]PORT",
        type=address,
        help="serve figures for Prometheus there, by HTTP [none]; without ADDRESS only to this host, at 127.0.0.1",
    )

    look = parser.add_argument_group("owner and permissions of the files")
    look.add_argument("--allow-other", action="store_true", help="let other users use the mount; see /etc/fuse.conf")
    look.add_argument("--uid", type=int, default=os.getuid(), help="numeric owner of the files [the user who mounts]")
    look.add_argument("--gid", type=int, default=os.getgid(), help="numeric group of the files [the user who mounts]")
    look.add_argument(
        "--umask", type=octal, default=0, metavar="OCTAL", help="permissions to remove from 0444 and 0555 [0]"
    )

    speed = parser.add_argument_group("speed and memory")
    speed.add_argument(
        "--cache-size",
        metavar="SIZE",
        type=size,
        default="256M",
        help="memory for image data, shared by all files [256M]; 0 turns cache and readahead off",
    )
    speed.add_argument(
        "--direct-io",
        action="store_true",
        help="bypass the kernel's page cache: less CPU for large reads, far more for small ones, no mmap",
    )
    parser.add_argument(
        "-o",
        metavar="OPTION[,...]",
        action="append",
        default=[],
        help="the options above without their dashes (allow_other,uid=1000), or those of mount(8) and of FUSE (noexec)",
    )
    add_cluster_options(parser)
    parser.set_defaults(command=partial(_mount, parser))


def _mount(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from rbdfs.commands.mount import MountOptions, mount  # noqa: PLC0415  (needs pyfuse3, trio, rados and rbd)
    from rbdfs.errors import NOTICE  # noqa: PLC0415
    from rbdfs.fuse.attributes import FileAttributes  # noqa: PLC0415
    from rbdfs.fuse.mount_options import parse_options  # noqa: PLC0415

    fuse_options = _take_mount_options(parser, options)
    verbosity = logging.DEBUG if options.debug else logging.INFO if options.verbose else NOTICE
    return mount(
        MountOptions(
            mountpoint=options.mountpoint.absolute(),
            cluster=cluster_options(options),
            pools=tuple(options.pool),
            attributes=FileAttributes(options.uid, options.gid, options.umask, options.direct_io),
            fuse_options=parse_options([*fuse_options, *(["allow_other"] if options.allow_other else [])]),
            cache_bytes=options.cache_size,
            foreground=options.foreground,
            log_level=verbosity,
            log_file=options.log_file.absolute() if options.log_file else None,
            metrics=options.metrics,
        )
    )


def _take_mount_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """Read each option after `-o` as our own option of that name, as in fstab. Returns those that are not ours."""
    others = []
    for option in (option for text in options.o for option in OPTION.findall(text)):
        name, equals, value = re.sub(r"\\(.)", r"\1", option).partition("=")
        ours = f"--{name.replace('_', '-')}{equals}{value}"
        _, unknown = parser.parse_known_args([ours, os.fspath(options.mountpoint)], options)
        if unknown:
            others.append(f"{name}{equals}{value}")
    return others
