"""One line for each new trouble and one when it is over, however many requests fail in between. Policy alone.

It takes each error and, while there is a trouble, each success, and returns what to log. A trouble is all errors of one
kind with one file or directory. It is over when all operations that have failed have worked again.
"""

import errno
import logging
from dataclasses import dataclass
from typing import Final, NamedTuple

from rbdfs.errors import NOTICE

FILES_MAX: Final = 8
"""Troubles of one kind that are logged one by one. All other files and directories with it are one more trouble."""

REPEAT_SECONDS: Final = 60.0
"""How often a trouble that goes on is logged."""

SETTLE_SECONDS: Final = 10.0
"""How long a trouble must be over before that is logged: if one placement group is dead, other reads work."""

SILENT_SECONDS: Final = 300.0
"""How long after its last error a trouble ends, even if nobody has tried again."""


class Line(NamedTuple):
    """A line for the log."""

    level: int
    text: str
    inode: int | None
    """Of the file or directory; None for many."""


@dataclass(slots=True)
class _Trouble:
    first: str
    last: str
    """What went wrong, in a sentence."""
    began: float
    failed_at: float
    """When there was an error last."""
    logged_at: float
    failing: set[str]
    """Operations that have failed and have not worked since."""
    worked_at: float | None = None
    """Since when all of them work."""
    errors: int = 1
    logged: int = 1


class Troubles:
    """All troubles that are not over. Times are in seconds of any clock that never goes back."""

    def __init__(self, osd_timeout: float = 0.0) -> None:
        """`osd_timeout` is how long a request waits for an answer: one that began in a trouble can fail so late."""
        self.are_open = False
        """Whether anything is wrong. If not, `work` need not be called."""
        self._osd_timeout = osd_timeout
        self._open: dict[tuple[int | str, int | None], _Trouble] = {}

    def fail(self, kind: int | str, inode: int | None, operation: str, sentence: str, now: float) -> str | None:
        """Count an error; `kind` is its errno, or what else tells it from others.

        Returns what to log at once: None if the trouble is in the log already.
        """
        key = kind, inode
        is_one_of_many = key not in self._open and sum(each == kind for each, _ in self._open) >= FILES_MAX
        if is_one_of_many:
            key = kind, None
        trouble = self._open.get(key)
        if trouble is None:
            self._open[key] = _Trouble(sentence, sentence, now, now, now, {operation})
            self.are_open = True
            return f"{sentence}; further files with this trouble are counted only" if is_one_of_many else sentence
        trouble.errors += 1
        trouble.last = sentence
        trouble.failed_at = now
        trouble.worked_at = None
        trouble.failing.add(operation)
        return None

    def work(self, inode: int | None, operation: str, now: float) -> None:
        """Note that an operation has worked."""
        for (_, where), trouble in self._open.items():
            if where == inode and where is not None and trouble.worked_at is None:
                trouble.failing.discard(operation)
                if not trouble.failing:
                    trouble.worked_at = now

    def due(self, now: float) -> list[Line]:
        """Return what to log now. Call every few seconds."""
        lines = []
        for (kind, inode), trouble in list(self._open.items()):
            quiet = now - trouble.failed_at - (self._osd_timeout if kind == errno.ETIMEDOUT else 0.0)
            if trouble.worked_at is not None and quiet >= SETTLE_SECONDS:
                text = f"over after {trouble.worked_at - trouble.began:.0f} s and {_errors(trouble)}: {trouble.first}"
            elif quiet >= SILENT_SECONDS:
                text = f"no error for {now - trouble.failed_at:.0f} s, after {_errors(trouble)}: {trouble.first}"
            else:
                if trouble.errors > trouble.logged and now - trouble.logged_at >= REPEAT_SECONDS:
                    more, seconds = trouble.errors - trouble.logged, now - trouble.logged_at
                    text = f"{more:,} more in the last {seconds:.0f} s: {trouble.last}"
                    lines.append(Line(logging.ERROR, text, inode))
                    trouble.logged, trouble.logged_at = trouble.errors, now
                continue
            del self._open[kind, inode]
            lines.append(Line(NOTICE, text, inode))
        self.are_open = bool(self._open)
        return lines

    def summary(self) -> str:
        """Return in one line what is wrong now; empty if nothing is."""
        if not self._open:
            return ""
        latest = max(self._open.values(), key=lambda trouble: trouble.failed_at)
        more = len(self._open) - 1
        others = f", and {more} more trouble{'' if more == 1 else 's'}" if more else ""
        return f"{latest.last} ({_errors(latest)}{others})"


def _errors(trouble: _Trouble) -> str:
    return "1 error" if trouble.errors == 1 else f"{trouble.errors:,} errors"
