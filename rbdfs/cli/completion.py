"""Shell completion: `python -m rbdfs.cli.completion bash|zsh|fish` prints a script for the shell.

The script has all commands and options, so that completing starts no Python.
"""

import argparse
import sys
from pathlib import Path

import shtab

from rbdfs.cli import make_parser


def completion(shell: str) -> str:
    """The script for a shell."""
    parser = make_parser()
    _complete_paths(parser)
    return str(shtab.complete(parser, shell))


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Tell shtab which values are files, directories, or neither."""
    for action in parser._actions:  # noqa: SLF001  (argparse has no public way to its actions)
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for command in action.choices.values():
                _complete_paths(command)
        elif action.metavar in ("MOUNTPOINT", "FOLDER"):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path or action.metavar == "PATH":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif not action.option_strings:
            # An image. With shtab's default, a message, zsh lists the only option that fits, and does not take it.
            action.complete = {"zsh": "_nothing"}  # type: ignore[attr-defined]


if __name__ == "__main__":
    print(completion(sys.argv[1]))
