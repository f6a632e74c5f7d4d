"""The man page rbdfs(8) and the completion of shells say what the option parser says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rbdfs.cli.completion import completion
from rbdfs.cli.manual import manual
from tests.cluster import rbdfs

COMMANDS = (
    "mount",
    "status",
    "export",
    "verify",
    "diff",
    "map",
    "devcluster up",
    "devcluster down",
    "devcluster status",
    "devcluster run",
)
OPTION = r"(?<![\w.-])--?[a-z][\w-]*"


@pytest.fixture
def page(tmp_path: Path) -> str:
    """The page as a terminal shows it, made without a warning."""
    source = tmp_path / "rbdfs.8"
    source.write_text(manual())
    command = ["groff", "-man", "-Tascii", "-ww", "-P-cbou", str(source)]
    done: subprocess.CompletedProcess[str] = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def section(page: str, title: str) -> str:
    """The text below a heading, as words with one space between them."""
    found = re.search(rf"^(?P<indent> *){re.escape(title)}\n(?P<text>(?:(?P=indent) +.*\n|\n)*)", page, re.MULTILINE)
    assert found is not None, f"there is no {title} in {page}"
    return " ".join(found["text"].split())


def help_of(command: str, monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], list[str]]:
    """The options of a command but --help, and the help for each option and argument, as --help prints them."""
    monkeypatch.setenv("COLUMNS", "10000")  # no line is broken
    text = re.sub(r"\n {10,}", "  ", rbdfs(*command.split(), "--help").stdout)
    rows = [row for row in re.findall(r"^  (\S.*)$", text, re.MULTILINE) if not row.startswith("-h, --help")]
    assert rows
    names, texts = zip(*(re.split("  +", row, maxsplit=1) for row in rows), strict=True)
    return {option for each in names for option in re.findall(OPTION, each)}, list(texts)


def test_the_man_page_has_every_option_that_help_has_with_its_help(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in COMMANDS:
        options, texts = help_of(command, monkeypatch)
        shown = section(page, f"rbdfs {command}")
        if "--conf" in options:
            shown += " " + section(page, "CLUSTER OPTIONS")
        assert options <= set(re.findall(OPTION, shown)), command
        assert [text for text in texts if text not in shown] == [], command


def test_the_man_page_has_the_sections_of_one(page: str) -> None:
    headings = re.findall(r"^[A-Z][A-Z ]*$", page, re.MULTILINE)
    assert headings == [
        *("NAME", "SYNOPSIS", "DESCRIPTION", "COMMANDS", "CLUSTER OPTIONS"),
        *("EXIT STATUS", "ENVIRONMENT", "FILES", "EXAMPLES", "SEE ALSO"),
    ]
    synopsis = section(page, "SYNOPSIS")
    assert "rbdfs devcluster run [OPTION...] [FOLDER] -- COMMAND ..." in synopsis
    assert all(f"rbdfs {command} [OPTION...]" in synopsis for command in COMMANDS)


def test_no_command_loads_what_only_an_installation_needs() -> None:
    script = "import rbdfs.cli, sys; rbdfs.cli.make_parser(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "rbdfs.cli.mount" in loaded
    assert not {"shtab", "rbdfs.cli.manual", "rbdfs.cli.completion"} & set(loaded)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_has_every_option(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = completion(shell)
    options = {option for command in COMMANDS for option in help_of(command, monkeypatch)[0]}
    assert len(options) > 30
    for option in options:
        words = rf"-[ls] {option.lstrip('-')}\b" if shell == "fish" else rf"(?<![\w-]){option}(?![\w-])"
        assert re.search(words, script), option
