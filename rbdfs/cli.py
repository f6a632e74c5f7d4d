"""The command line: argv → typed options → a command; exit codes and one-line errors."""

import argparse
import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rbdfs import __version__
from rbdfs.errors import RbdfsError, UsageError

if TYPE_CHECKING:
    from rbdfs.ceph.connect import ClusterOptions

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

DEBIAN_PACKAGES = {
    "pyfuse3": "python3-pyfuse3",
    "tqdm": "python3-tqdm",
    "trio": "python3-trio",
    "rados": "python3-rados",
    "rbd": "python3-rbd",
    "librados": "librados2",
    "librbd": "librbd1",
}
"""Where the modules come from that a venv may lack."""

EPILOG = """\
exit status: 0 success, 1 the command failed (one line on stderr says why), 2 wrong usage, 130 interrupted
"""


EXPORT_EPILOG = """\
exit status: 0 the copy is whole and on the disk, 1 it failed (one line on stderr says why, and at which offset),
2 wrong usage, 128+N stopped by signal N (130 Ctrl-C, 143 SIGTERM)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. The exit status."""
    ours, command_line = _split_at_dashes(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser().parse_args(ours, argparse.Namespace(command_line=command_line))
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except UsageError as error:
        return _fail(str(error), EXIT_USAGE)
    except RbdfsError as error:
        return _fail(str(error), EXIT_FAILED)
    except ImportError as error:
        package = DEBIAN_PACKAGES.get(error.name or "")
        if package is None:
            raise
        return _fail(
            f"the module {error.name} is missing: apt install {package} "
            "(in a virtual environment: one made with /usr/bin/python3 -m venv --system-site-packages)",
            EXIT_FAILED,
        )
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Who read our output is gone. Nor can what is buffered of it be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _split_at_dashes(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """What stands before `--`, and the command after it."""
    position = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:position], arguments[position + 1 :]


def _fail(sentence: str, status: int) -> int:
    print(f"rbdfs: {sentence}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rbdfs",
        description="Every image in a Ceph cluster as a plain file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rbdfs {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_mount(commands)
    _add_export(commands)
    _add_map(commands)
    _add_devcluster(commands)
    return parser


def _add_cluster_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster options, as of the rbd command")
    group.add_argument("-c", "--conf", metavar="FILE", type=Path, help="ceph.conf [CEPH_CONF, /etc/ceph/CLUSTER.conf]")
    group.add_argument(
        "--cluster", metavar="NAME", help="name of the cluster, which names its files in /etc/ceph [ceph]"
    )
    who = group.add_mutually_exclusive_group()
    who.add_argument("-n", "--name", metavar="TYPE.ID", help="who connects [client.admin]")
    who.add_argument("--id", "--user", metavar="ID", help="the same, without the type client.")
    group.add_argument("-k", "--keyring", metavar="FILE", type=Path, help="the keyring with its key [as in ceph.conf]")
    group.add_argument(
        "-m", "--mon-host", "--mon_host", metavar="ADDRESS", help="monitors to connect to [as in ceph.conf]"
    )
    group.add_argument(
        "--connect-timeout",
        metavar="SECONDS",
        type=_positive,
        default=30,
        help="give up a cluster that does not answer after this time [30]",
    )
    group.add_argument(
        "--osd-timeout",
        metavar="SECONDS",
        type=int,
        default=120,
        help="a read that no OSD answers fails with ETIMEDOUT after this time [120]; 0 waits for ever; "
        "rados_osd_op_timeout in ceph.conf, if set, goes first",
    )


def _cluster_options(options: argparse.Namespace) -> "ClusterOptions":
    from rbdfs.ceph.connect import DEFAULT_NAME, ClusterOptions  # noqa: PLC0415  (needs rados)

    if options.name and "." not in options.name:
        raise UsageError(f"--name takes a type and an id, as client.{options.name}; for the id alone there is --id")
    return ClusterOptions(
        conf=options.conf,
        cluster=options.cluster,
        name=options.name or (f"client.{options.id}" if options.id else DEFAULT_NAME),
        keyring=options.keyring,
        mon_host=options.mon_host,
        connect_timeout=options.connect_timeout,
        osd_timeout=options.osd_timeout,
        events=not getattr(options, "callbacks", False),
    )


def _add_mount(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "mount",
        help="show the images of a cluster as files",
        description="Mount a cluster's images, read-only: MOUNTPOINT/POOL/IMAGE, or POOL/NAMESPACE/IMAGE. A "
        "snapshot is IMAGE@SNAPSHOT, and listed in the hidden directory .snap/IMAGE/ beside its image. Returns when "
        "the mount is usable, "
        "then serves in the background until 'umount MOUNTPOINT' ('fusermount3 -u MOUNTPOINT' without root).",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", type=Path, help="an existing directory")
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground, log to stderr")
    parser.add_argument("-p", "--pool", metavar="POOL", action="append", default=[], help="only this pool; repeatable")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is done as well, not only what is wrong")
    parser.add_argument("-d", "--debug", action="store_true", help="log everything")
    parser.add_argument(
        "--log-file", metavar="FILE", type=Path, help="log there [syslog in the background, else stderr]"
    )

    look = parser.add_argument_group("what files look like")
    look.add_argument("--allow-other", action="store_true", help="let other users in; see /etc/fuse.conf")
    look.add_argument("--uid", type=int, default=os.getuid(), help="numeric owner of the files [who mounts]")
    look.add_argument("--gid", type=int, default=os.getgid(), help="numeric group of the files [who mounts]")
    look.add_argument(
        "--umask", type=_octal, default=0, metavar="OCTAL", help="permissions to take away from 0444 and 0555 [0]"
    )

    speed = parser.add_argument_group("speed and memory")
    speed.add_argument(
        "--cache-size",
        metavar="SIZE",
        type=_size,
        default="256M",
        help="memory for image data, read or read ahead, shared by all files [256M]; 0 turns cache and readahead off",
    )
    speed.add_argument(
        "--direct-io",
        action="store_true",
        help="pass by the kernel's page cache: less CPU for large reads, far more for small ones, no mmap",
    )
    speed.add_argument(
        "--callbacks",
        action="store_true",
        help="have librbd call back for each read, as its Python binding does, instead of by its event API: "
        "slower for small reads",
    )
    parser.add_argument(
        "-o",
        metavar="OPTION[,...]",
        action="append",
        default=[],
        help="the options above without their dashes (allow_other,uid=1000), or libfuse's own",
    )
    _add_cluster_options(parser)
    parser.set_defaults(command=partial(_mount, parser))


def _mount(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    from rbdfs.commands.mount import MountOptions, mount  # noqa: PLC0415  (needs pyfuse3, trio, rados and rbd)
    from rbdfs.fuse.operations import Presentation  # noqa: PLC0415

    fuse_options = _take_mount_options(parser, options)
    verbosity = logging.DEBUG if options.debug else logging.INFO if options.verbose else logging.WARNING
    return mount(
        MountOptions(
            mountpoint=options.mountpoint.absolute(),
            cluster=_cluster_options(options),
            pools=tuple(options.pool),
            presentation=Presentation(options.uid, options.gid, options.umask, options.direct_io),
            fuse_options=fuse_options | ({"allow_other"} if options.allow_other else frozenset()),
            cache_bytes=options.cache_size,
            foreground=options.foreground,
            log_level=verbosity,
            log_file=options.log_file.absolute() if options.log_file else None,
        )
    )


def _take_mount_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> frozenset[str]:
    """Treat what follows `-o` as the option of the same name, as mount(8) and fstab have it; the rest is libfuse's."""
    fuse_options = set()
    for option in ",".join(options.o).split(","):
        name, equals, value = option.partition("=")
        if name == "rw":
            raise UsageError("images are shown read-only: there is no -o rw")
        if name in ("", "ro", "defaults"):
            continue
        ours = f"--{name.replace('_', '-')}{equals}{value}"
        _, unknown = parser.parse_known_args([ours, os.fspath(options.mountpoint)], options)
        if unknown:
            fuse_options.add(option)
    return frozenset(fuse_options)


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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
        type=_positive,
        help="reads in flight, each of up to 4M [rbd_concurrent_management_ops: 10]; each takes 8M of memory",
    )
    parser.add_argument(
        "--limit-rate",
        metavar="SIZE",
        type=_rate,
        help="read no more than this from the cluster in a second: 100M [no limit]",
    )
    parser.add_argument(
        "--checksum",
        metavar="NAME",
        type=_digest,
        help="print a digest of the whole image, holes included: sha256, or another that hashlib knows; "
        "on stderr where the image goes to stdout",
    )
    parser.add_argument("--no-progress", action="store_true", help="only tell what is wrong")
    _add_cluster_options(parser)
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    from rbdfs.commands.export import ExportOptions, export  # noqa: PLC0415  (needs trio, rados, rbd and tqdm)

    return export(
        ExportOptions(
            cluster=_cluster_options(options),
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


def _add_map(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
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
    parser.add_argument("--offset", metavar="N", type=_size, default=0, help="where to begin in the image: 0, 12G [0]")
    parser.add_argument("--length", metavar="N", type=_size, help="how much of it [to the end]")
    parser.add_argument("--json", action="store_true", help="all of it, for scripts; the table ends after 100 rows")
    _add_cluster_options(parser)
    parser.set_defaults(command=_map)


def _map(options: argparse.Namespace) -> int:
    from rbdfs.commands.map import MapOptions, map_image  # noqa: PLC0415  (needs trio, rados and rbd)

    return map_image(
        MapOptions(_cluster_options(options), options.image, options.offset, options.length, as_json=options.json)
    )


def _add_devcluster(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "devcluster",
        help="run a real single-node Ceph in a folder, to try things on",
        description="A real Ceph (mon, mgr, OSDs, cephx) on loopback, from Debian's packages, in one folder. No root "
        "needed, no path outside the folder touched.",
    )
    actions = parser.add_subparsers(metavar="up|down|status|run", required=True)

    up = actions.add_parser(
        "up",
        help="start it; prints the line to eval: export CEPH_CONF=...",
        description='Start a cluster and wait until pool rbd can be used: eval "$(rbdfs devcluster up)". One that was '
        "stopped and kept is started again with its data.",
    )
    _add_devcluster_folder(up)
    _add_devcluster_shape(up)
    up.set_defaults(command=_devcluster_up)

    down = actions.add_parser("down", help="stop it, and remove its data", description="Stop it, and remove its data.")
    _add_devcluster_folder(down)
    down.add_argument("--keep", action="store_true", help="keep the data, for the next up")
    down.set_defaults(command=_devcluster_down)

    status = actions.add_parser(
        "status", help="tell whether it runs", description="Tell whether it runs; exit status 0 if it does, 3 if not."
    )
    _add_devcluster_folder(status)
    status.set_defaults(command=_devcluster_status)

    run = actions.add_parser(
        "run",
        help="run a command with a cluster that ends with it",
        description="Start a cluster, run a command with CEPH_CONF set, take the cluster down again; the exit status "
        "is the command's.",
        usage="rbdfs devcluster run [-h] [--osds N] [--store STORE] [FOLDER] -- COMMAND ...",
    )
    _add_devcluster_shape(run)
    run.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, help="where all of it is [a temporary folder]")
    run.set_defaults(command=_devcluster_run)


def _add_devcluster_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=Path,
        help="where all of it is [/var/tmp/rbdfs-devcluster-UID]",
    )


def _add_devcluster_shape(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--osds", metavar="N", type=_positive, default=1, help="object storage daemons [1]")
    parser.add_argument(
        "--store",
        choices=("bluestore", "memstore"),
        default="bluestore",
        help="where the OSDs keep data: on disk as in production, or in memory [bluestore]",
    )


def _devcluster_up(options: argparse.Namespace) -> int:
    from rbdfs.commands import devcluster  # noqa: PLC0415
    from rbdfs.devcluster.cluster import DevclusterOptions  # noqa: PLC0415

    return devcluster.up(DevclusterOptions(options.folder, options.osds, options.store))


def _devcluster_down(options: argparse.Namespace) -> int:
    from rbdfs.commands import devcluster  # noqa: PLC0415

    return devcluster.down(options.folder, options.keep)


def _devcluster_status(options: argparse.Namespace) -> int:
    from rbdfs.commands import devcluster  # noqa: PLC0415

    return devcluster.status(options.folder)


def _devcluster_run(options: argparse.Namespace) -> int:
    from rbdfs.commands import devcluster  # noqa: PLC0415
    from rbdfs.devcluster.cluster import DevclusterOptions  # noqa: PLC0415

    return devcluster.run(DevclusterOptions(options.folder, options.osds, options.store), options.command_line)


def _positive(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _octal(text: str) -> int:
    return int(text, 8)


def _size(text: str) -> int:
    """Bytes: a number with K, M, G or T, as the rbd command takes it."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not a size; write 0, 512M, 2G")
    number, unit = match.groups()
    return int(number) << (10 * " KMGT".index(unit.upper() or " "))


def _rate(text: str) -> int:
    """Bytes in a second, more than none; a trailing /s is understood."""
    rate = _size(text.removesuffix("/s"))
    if not rate:
        raise argparse.ArgumentTypeError(f"{text} would never end")
    return rate


def _digest(text: str) -> str:
    """A digest of a fixed length, by hashlib's name."""
    try:
        known = hashlib.new(text).digest_size > 0
    except ValueError:
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"no such digest: {text}; there are sha256, sha512, blake2b, md5 and others")
    return text
