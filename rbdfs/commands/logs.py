"""Where a mount logs to: a file, the journal, syslog or stderr, each with its own format and levels."""

import logging
import logging.handlers
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rbdfs.errors import NOTICE
from rbdfs.spec import ImageSpec

IDENTIFIER = "rbdfs"
WITH_TIME = "%(asctime)s rbdfs[%(process)d] %(levelname)s %(name)s: %(message)s"
TAGGED = "rbdfs[%(process)d]: %(message)s"
"""The format of syslog(3), so that the receiver finds program and process."""
MESSAGE_ALONE = "%(message)s"
"""For the journal, which records the rest itself."""

STDERR = 2
SYSLOG = Path("/dev/log")
JOURNAL = Path("/run/systemd/journal/socket")

DEBUG, INFO, NOTICE_, WARNING, ERROR, CRITICAL = 7, 6, 5, 4, 3, 2
"""Priorities of syslog(3) and sd-daemon(3)."""


def log_to(log_file: Path | None, level: int, *, foreground: bool) -> None:
    """Set up logging: to a file if one is given, else as fits a process in the foreground or in the background."""
    logging.addLevelName(NOTICE, "NOTICE")
    logging.basicConfig(level=level, handlers=[_handler(log_file, foreground=foreground)])


def stderr_is_journal() -> bool:
    """Whether stderr is connected to the journal, which takes it line by line (systemd.exec(5), JOURNAL_STREAM)."""
    stream = os.environ.get("JOURNAL_STREAM")
    if stream is None:
        return False
    status = os.fstat(STDERR)
    return stream == f"{status.st_dev}:{status.st_ino}"


def _handler(log_file: Path | None, *, foreground: bool) -> logging.Handler:
    if log_file is not None:
        return _with_format(_LogFile(log_file), WITH_TIME)
    if foreground:
        if not stderr_is_journal():
            return _with_format(logging.StreamHandler(sys.stderr), WITH_TIME)
        return _journal() or _with_format(logging.StreamHandler(sys.stderr), MESSAGE_ALONE, _LevelledLines)
    return (JOURNAL.exists() and _journal()) or _syslog()


def _journal() -> logging.Handler | None:
    """The journal with all its fields, if python3-systemd is installed."""
    try:
        from systemd import journal  # noqa: PLC0415  (may be missing)
    except ImportError:
        return None

    def send(message: str, /, **fields: Any) -> None:  # a record has a field `message` as well
        journal.send(message, **journal_fields(fields))

    handler: logging.Handler = journal.JournalHandler(sender_function=send, SYSLOG_IDENTIFIER=IDENTIFIER)
    return _with_format(handler, MESSAGE_ALONE)


def journal_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields for the journal beside the message, out of those that JournalHandler sends.

    A record has its image as `extra={"image": ...}`, or as an argument of its message.
    """
    sent = {name: value for name, value in fields.items() if name.isupper()} | {"PRIORITY": priority(fields["levelno"])}
    arguments = fields["args"] if isinstance(fields.get("args"), tuple) else ()
    image = fields.get("image") or next((each for each in arguments if isinstance(each, ImageSpec)), None)
    if image is not None:
        sent |= {"RBDFS_IMAGE": in_utf8(str(image)), "RBDFS_POOL": in_utf8(image.pool)}
    return sent


def priority(level: int) -> int:
    """The priority of syslog for a level of Python's logging."""
    bounds = {
        logging.CRITICAL: CRITICAL,
        logging.ERROR: ERROR,
        logging.WARNING: WARNING,
        NOTICE: NOTICE_,
        logging.INFO: INFO,
    }
    return next((found for bound, found in bounds.items() if level >= bound), DEBUG)


def _syslog() -> logging.Handler:
    """The system's log, or nothing if there is none."""
    if not SYSLOG.exists():
        return logging.NullHandler()
    handler = _Syslog(os.fspath(SYSLOG), _Syslog.LOG_DAEMON)
    return _with_format(handler, TAGGED)


def in_utf8(text: str) -> str:
    """Text without the bytes of names in Ceph that are not UTF-8: they become `\\udcff`."""
    return text.encode(errors="backslashreplace").decode()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return in_utf8(super().format(record))


class _LevelledLines(_Formatter):
    """Puts the priority before each line, as sd-daemon(3) has it."""

    def format(self, record: logging.LogRecord) -> str:
        before = f"<{priority(record.levelno)}>"
        return "\n".join(before + line for line in super().format(record).splitlines())


def _with_format(
    handler: logging.Handler, text: str, formatter: Callable[[str], logging.Formatter] = _Formatter
) -> logging.Handler:
    handler.setFormatter(formatter(text))
    return handler


class _Syslog(logging.handlers.SysLogHandler):
    priority_map = logging.handlers.SysLogHandler.priority_map | {"NOTICE": "notice"}


class _LogFile(logging.handlers.WatchedFileHandler):
    """A file that may be renamed or removed: the next line then goes to a new file of its name."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # the folder is gone or the file cannot be made: the mount goes on
            self.handleError(record)
