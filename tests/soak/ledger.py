"""What came of it all: rounds, bytes and errors of each reader, and what must not have been."""

import errno
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.cluster import MIB

ERRNO_NAMES = {os.strerror(number).lower(): name for number, name in errno.errorcode.items()}


class WrongError(Exception):
    """A reader got something that was never there: bytes, a size, a listing."""


class FailedError(Exception):
    """A reader was told of an error."""

    def __init__(self, names: Iterable[str], message: str) -> None:
        super().__init__(message)
        self.names = frozenset(names)
        """Of errnos (ETIMEDOUT), signals (SIGBUS), or an exit status of a program that named none."""


def errnos_in(text: str) -> set[str]:
    """The errnos that a program names in its messages."""
    lower = text.lower()
    return {name for words, name in ERRNO_NAMES.items() if words in lower}


@dataclass(slots=True)
class Tally:
    """Of one reader."""

    rounds: int = 0
    """That ended without an error."""
    bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    """Rounds that ended with an error, by its name."""
    longest_seconds: float = 0.0


class Ledger:
    """Written by all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.tallies: dict[str, Tally] = defaultdict(Tally)
        self.answers: list[float] = []
        """How long single reads took, in seconds; those of more than a second alone."""
        self.failures: list[str] = []

    def fail(self, what: str) -> None:
        """Something that must not be."""
        with self._lock:
            self.failures.append(what)
        print(f"{time.strftime('%X')} FAILED: {what}", flush=True)

    def count(self, name: str, *, seconds: float, bytes_read: int = 0, errors: Iterable[str] = ()) -> None:
        """A round that has ended."""
        with self._lock:
            tally = self.tallies[name]
            tally.longest_seconds = max(tally.longest_seconds, seconds)
            tally.errors.update(errors)
            if not errors:
                tally.rounds += 1
                tally.bytes += bytes_read

    def answered(self, seconds: float) -> None:
        """One read of a few bytes has been answered, by bytes or by an error."""
        if seconds > 1:
            with self._lock:
                self.answers.append(seconds)

    @property
    def totals(self) -> tuple[int, int, int]:
        """Rounds, bytes, errors."""
        with self._lock:
            tallies = list(self.tallies.values())
        return (
            sum(tally.rounds for tally in tallies),
            sum(tally.bytes for tally in tallies),
            sum(tally.errors.total() for tally in tallies),
        )

    def summary(self) -> str:
        """For a person."""
        lines = [f"{'reader':22}{'rounds':>8}{'MiB':>10}{'longest':>10}  errors"]
        for name, tally in sorted(self.tallies.items()):
            errors = ", ".join(f"{count} {what}" for what, count in sorted(tally.errors.items())) or "-"
            longest = f"{tally.longest_seconds:.1f} s"
            lines.append(f"{name:22}{tally.rounds:8}{tally.bytes // MIB:10,}{longest:>10}  {errors}")
        slow = sorted(self.answers)
        longest = f"{slow[-1]:.1f} s" if slow else "under 1 s"
        lines.append(f"single reads: {len(slow)} took more than 1 s, the longest {longest}")
        return "\n".join(lines)
