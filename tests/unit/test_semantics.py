"""The documents keep their word: each promise in SEMANTICS.md has a test, and what the README explains is logged."""

import ast
import os
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
CHECKOUT = TESTS.parent
PROMISES, TABLE = (CHECKOUT / "SEMANTICS.md").read_text().split("\n## Tests\n")
PROMISED = re.findall(r"^- \*\*([A-Z]\d+)\*\* ", PROMISES, re.MULTILINE)
ROWS = [line for line in TABLE.splitlines() if line.startswith("|")][2:]
HELD = [re.fullmatch(r"\| ([A-Z]\d+) \| `(\w+/test_\w+\.py): (test_\w+)` \|", row) for row in ROWS]


def functions(file: str) -> set[str]:
    """The tests in a file, by their full names."""
    return {node.name for node in ast.walk(ast.parse((TESTS / file).read_text())) if hasattr(node, "name")}


def test_each_promise_has_one_number_and_each_row_names_a_promise_and_a_test() -> None:
    assert PROMISED
    assert len(set(PROMISED)) == len(PROMISED)
    assert [row for row, match in zip(ROWS, HELD, strict=True) if match is None] == []
    assert len(set(ROWS)) == len(ROWS)


def test_each_promise_has_a_test_and_each_row_a_promise() -> None:
    assert {match[1] for match in HELD if match} == set(PROMISED)


def test_each_test_that_is_named_exists() -> None:
    named = {(match[2], match[3]) for match in HELD if match}
    assert [each for each in sorted(named) if not (TESTS / each[0]).exists() or each[1] not in functions(each[0])] == []


def test_each_line_that_the_readme_explains_is_in_the_code() -> None:
    table = (CHECKOUT / "README.md").read_text().split("| line |", 1)[1].split("\n\n", 1)[0]
    lines = re.findall(r"`([^`]+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:]))
    parts = {part for line in lines for part in re.split(r"…|: |\d+", line) if len(part) > 3}
    trees = [ast.parse(path.read_text()) for path in (CHECKOUT / "rbdfs").rglob("*.py")]
    words = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    said = "\n".join([each for each in words if isinstance(each, str)] + [os.strerror(number) for number in range(134)])
    assert len(lines) > 10
    assert [part for part in sorted(parts) if part not in said] == []


def test_each_file_that_the_readme_and_the_picture_name_exists() -> None:
    documents = ("README.md", "examples/path-of-a-byte.svg", "tests/benchmarks/README.md")
    text = "".join((CHECKOUT / document).read_text() for document in documents)
    named = set(re.findall(r"[\w/-][\w./-]*\.(?:py|sh|md|svg|json|service|timer)\b", text))
    folders = [CHECKOUT / "rbdfs", TESTS, CHECKOUT / "examples"]
    there = [f"/{path}" for folder in folders for path in folder.rglob("*.*")] + [
        f"/{path}" for path in CHECKOUT.iterdir()
    ]
    assert len(named) > 10
    assert [name for name in sorted(named) if not any(path.endswith(f"/{name.lstrip('/')}") for path in there)] == []
