"""Where a mount logs to: a file, the journal, syslog or stderr, each with its levels."""

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
"""As syslog(3) sends it, so that who receives it finds program and process."""
MESSAGE_ALONE = "%(message)s"
"""The journal knows the rest."""

STDERR = 2
SYSLOG = Path("/dev/log")
JOURNAL = Path("/run/systemd/journal/socket")

DEBUG, INFO, NOTICE_, WARNING, ERROR, CRITICAL = 7, 6, 5, 4, 3, 2
"""Priorities of syslog(3) and sd-daemon(3)."""


def log_to(log_file: Path | None, level: int, *, foreground: bool) -> None:
    """Log to a file if one is given, else to where a process in the foreground, or in the background, logs to."""
    logging.addLevelName(NOTICE, "NOTICE")
    logging.basicConfig(level=level, handlers=[_handler(log_file, foreground=foreground)])


def stderr_is_journal() -> bool:
    """Whether what is written to stderr comes to the journal, line by line (systemd.exec(5), JOURNAL_STREAM)."""
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

    def send(message: str, /, **fields: Any) -> None:  # a record has a field `message`, too
        journal.send(message, **journal_fields(fields))

    handler: logging.Handler = journal.JournalHandler(sender_function=send, SYSLOG_IDENTIFIER=IDENTIFIER)
    return _with_format(handler, MESSAGE_ALONE)


def journal_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """What the journal should have beside the message, of what JournalHandler sends: its own fields, and the record's.

    A record has its image as `extra={"image": ...}`, or as an argument of its message.
    """
    sent = {name: value for name, value in fields.items() if name.isupper()} | {"PRIORITY": priority(fields["levelno"])}
    arguments = fields["args"] if isinstance(fields.get("args"), tuple) else ()
    image = fields.get("image") or next((each for each in arguments if isinstance(each, ImageSpec)), None)
    if image is not None:
        sent |= {"RBDFS_IMAGE": in_utf8(str(image)), "RBDFS_POOL": in_utf8(image.pool)}
    return sent


def priority(level: int) -> int:
    """A level of Python's as a priority of syslog's."""
    bounds = {
        logging.CRITICAL: CRITICAL,
        logging.ERROR: ERROR,
        logging.WARNING: WARNING,
        NOTICE: NOTICE_,
        logging.INFO: INFO,
    }
    return next((found for bound, found in bounds.items() if level >= bound), DEBUG)


def _syslog() -> logging.Handler:
    """The system's log, if there is one."""
    if not SYSLOG.exists():
        return logging.NullHandler()
    handler = _Syslog(os.fspath(SYSLOG), _Syslog.LOG_DAEMON)
    return _with_format(handler, TAGGED)


def in_utf8(text: str) -> str:
    """Names in Ceph need not be UTF-8; what is not is written as `\\udcff`."""
    return text.encode(errors="backslashreplace").decode()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return in_utf8(super().format(record))


class _LevelledLines(_Formatter):
    """Each line with its priority, as sd-daemon(3) has it."""

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
    """A file that may be renamed or removed: the next line then goes to a new one of its name."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # the folder is gone, the new file cannot be made: no reason for the mount to end
            self.handleError(record)
