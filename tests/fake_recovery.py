"""A connection that nothing replaces, or that a test does."""

from contextlib import AbstractContextManager, nullcontext

from rbdfs.ceph.bindings.lifetime import Lifetime


class FakeRecovery:
    """Notes what operations came to, and tries nothing."""

    def __init__(self) -> None:
        self.results: list[int] = []
        self.attempts = 0

    def note(self, result: int) -> None:
        self.results.append(result)

    def patience(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def attempt(self) -> None:
        self.attempts += 1


def lifetime() -> Lifetime:
    """Of a connection that stays."""
    return Lifetime(FakeRecovery())
