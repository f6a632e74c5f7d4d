"""SEMANTICS.md keeps its word: the tests that it names are there."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent


def test_every_test_that_semantics_md_names_is_there() -> None:
    text = (TESTS.parent / "SEMANTICS.md").read_text()
    named = re.findall(r"`(\w+/test_\w+\.py)(?:: (test_\w+))?`", text)
    assert named
    missing = [f"{file}: {test}" for file, test in named if f"def {test or 'test_'}" not in (TESTS / file).read_text()]
    assert not missing
