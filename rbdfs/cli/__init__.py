"""The command line: argv → typed options → a command; exit codes and one-line errors."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from rbdfs import __version__
from rbdfs.cli.devcluster import add_devcluster
from rbdfs.cli.diff import add_diff
from rbdfs.cli.export import add_export
from rbdfs.cli.map import add_map
from rbdfs.cli.mount import add_mount
from rbdfs.cli.options import EPILOG
from rbdfs.cli.status import add_status
from rbdfs.cli.verify import add_verify
from rbdfs.commands.logs import ERROR, stderr_is_journal
from rbdfs.errors import RbdfsError, UsageError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

DEBIAN_PACKAGES = {
    "prometheus_client": "python3-prometheus-client",
    "pyfuse3": "python3-pyfuse3",
    "tqdm": "python3-tqdm",
    "trio": "python3-trio",
    "rados": "python3-rados",
    "rbd": "python3-rbd",
    "librados": "librados2",
    "librbd": "librbd1",
}
"""The packages of the modules that a virtual environment may lack."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status."""
    ours, command_line = _split_at_dashes(sys.argv[1:] if arguments is None else arguments)
    try:
        options = make_parser().parse_args(ours, argparse.Namespace(command_line=command_line))
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
        # The reader of our output is gone, and at exit Python would fail to write what is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _split_at_dashes(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The arguments before `--`, and the command after it."""
    position = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:position], arguments[position + 1 :]


def _fail(sentence: str, status: int) -> int:
    level = f"<{ERROR}>" if stderr_is_journal() else ""
    print(f"{level}rbdfs: {sentence}", file=sys.stderr)
    return status


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; the man page and shell completion are made from it too."""
    parser = argparse.ArgumentParser(
        prog="rbdfs",
        description="Every image in a Ceph cluster as a plain file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rbdfs {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_mount(commands)
    add_status(commands)
    add_export(commands)
    add_verify(commands)
    add_diff(commands)
    add_map(commands)
    add_devcluster(commands)
    return parser
