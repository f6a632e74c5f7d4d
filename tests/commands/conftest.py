"""Commands that run in the tests' own process."""

import pytest

from rbdfs.commands import shutdown


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that closes its images slowly, on a busy machine, must not exit: the whole run would be over."""
    monkeypatch.setattr(shutdown, "STOP_SECONDS", 60.0)
