"""`rbdfs status`: the mounts of this host, and what each does. It touches no file of a mount, and no cluster."""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from rbdfs.commands.formatting import format_bytes, format_seconds
from rbdfs.commands.status_socket import name_of, peer_of
from rbdfs.errors import MountError
from rbdfs.fuse.mountinfo import MountInfo, mount_id, mountinfo
from rbdfs.fuse.mounting import TYPE, printable

ANSWER_SECONDS: Final = 2.0
"""How long a mount may take to answer; it takes milliseconds."""

ANSWER_BYTES_MAX: Final = 16 << 20
"""The longest answer that we accept; a mount needs 300 bytes for each open file."""

ROWS: Final = 20
"""Open files, and waiting requests, to print; there may be thousands."""


@dataclass(frozen=True, slots=True)
class StatusOptions:
    """The options of `rbdfs status`."""

    mountpoint: Path | None
    as_json: bool


class Found(NamedTuple):
    """A mount and its answer."""

    mount: MountInfo
    pid: int | None
    """The process that serves it, as the kernel reports it to us."""
    report: Mapping[str, Any] | None
    """This and `pid` are None if it does not answer."""
    reason: str
    """Why it does not answer."""


def status(options: StatusOptions) -> int:
    """Print them. Returns 1 if one does not answer, else 0. Raises MountError if the path is no rbdfs mount."""
    found = [_ask(mount) for mount in _mounts(options.mountpoint)]
    if options.as_json:
        print(json.dumps([_as_json(each) for each in found], indent=2))
    elif not found:
        print("there is no rbdfs mount on this host")
    else:
        print("\n\n".join("\n".join(printable(line) for line in _as_text(each)) for each in found))
    return int(any(each.report is None for each in found))


def _mounts(mountpoint: Path | None) -> list[MountInfo]:
    """The mounts to show: each file system once, even if it is bind-mounted elsewhere."""
    ours = [mount for mount in mountinfo() if mount.type == TYPE]
    if mountpoint is None:
        return list({mount.device_number: mount for mount in reversed(ours)}.values())[::-1]
    try:
        number = mount_id(mountpoint)
    except OSError as error:
        raise MountError(f"cannot look at {printable(mountpoint)}: {error.strerror}", error.errno) from None
    named = [mount for mount in ours if mount.id == number]
    if not named:
        raise MountError(f"{printable(mountpoint)} is no rbdfs mount; rbdfs status shows all mounts of this host")
    return named


def _ask(mount: MountInfo) -> Found:
    try:
        return Found(mount, *_answer_of(mount), "")
    except MountError as error:
        reason = str(error)
    except (TimeoutError, BlockingIOError):
        reason = f"no answer within {ANSWER_SECONDS:g} s"
    except ConnectionRefusedError:
        reason = "nobody listens: its process is gone, starting or ending, or in another network namespace"
    except OSError as error:
        reason = error.strerror or str(error)
    return Found(mount, None, None, reason)


def _answer_of(mount: MountInfo) -> tuple[int, Mapping[str, Any]]:
    """The process that serves a mount, and its report. Raises MountError, OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(name_of(mount.device_number))
        pid, uid = peer_of(connection)
        if uid not in (0, mount.owner):
            raise MountError(f"process {pid} of user {uid} answers in its place, and has not mounted it")
        try:
            answer = _receive(connection)
        except TimeoutError:
            raise MountError(f"no answer within {ANSWER_SECONDS:g} s by process {pid}") from None
    if not answer:
        may_ask = os.geteuid() in (0, uid)
        others = f" and user {uid}" if uid else ""
        raise MountError(f"process {pid} " + ("has hung up" if may_ask else f"answers only root{others}"))
    try:
        report = json.loads(answer)
        _text_of(report, pid)
    except Exception:  # another user or another version may send anything
        raise MountError(f"process {pid} is not understood; it may run another version of rbdfs") from None
    return pid, report


def _receive(connection: socket.socket) -> bytes:
    """The whole answer. Raises TimeoutError if it takes too long."""
    deadline = time.monotonic() + ANSWER_SECONDS
    answer = bytearray()
    while part := connection.recv(1 << 16):
        answer += part
        left = deadline - time.monotonic()
        if left <= 0 or len(answer) > ANSWER_BYTES_MAX:
            raise TimeoutError
        connection.settimeout(left)
    return bytes(answer)


def _as_json(found: Found) -> dict[str, object]:
    major, minor = found.mount.device_number
    path = found.mount.path.decode(errors="surrogateescape")
    head = {"mountpoint": path, "device": f"{major}:{minor}", "answers": found.report is not None, "pid": found.pid}
    return {**head, "reason": found.reason} if found.report is None else {**head, **found.report, **head}


def _as_text(found: Found) -> Iterator[str]:
    yield found.mount.path.decode(errors="surrogateescape")
    if found.report is None:
        yield f"  does not answer: {found.reason}"
    else:
        yield from _text_of(found.report, found.pid)


def _text_of(report: Mapping[str, Any], pid: int | None) -> list[str]:
    """The lines about a mount, each with its title."""
    cache, flight = report["cache"], report["in_flight"]
    fill = f"{format_bytes(cache['bytes'])} of {format_bytes(cache['budget_bytes'])}"
    rows = [
        ("cluster", f"{report['fsid']} as {report['client']}: {_state_of(report)}"),
        ("process", f"{pid}, up {format_seconds(time.time() - report['started'])}, rbdfs {report['version']}"),
        ("cache", f"{fill}, hits {cache['hits']:,}, misses {cache['misses']:,}"),
        ("in flight", f"{flight['reads']:,} reads, {format_bytes(flight['bytes'])}; {flight['queued']:,} queued"),
        *_rows("open", report["open_files"], [_opened(each) for each in report["open"][:ROWS]]),
        *_rows("waiting", report["requests_waiting"], [_waiting(each) for each in report["waiting"][:ROWS]]),
        *_rows("last errors", len(report["errors"]), [_error(each) for each in report["errors"]]),
    ]
    if report["trouble"]:
        rows.insert(1, ("trouble", report["trouble"]))
    return [f"  {title:13}{text}" for title, text in rows]


def _state_of(report: Mapping[str, Any]) -> str:
    if not report["connected"]:
        return "it has blocklisted this client"
    return "OSDs answer" if report["osds_answer"] else "no OSD answers"


def _rows(title: str, count: int, shown: list[str]) -> list[tuple[str, str]]:
    """Rows of which the first has the title; the last counts those that are not shown."""
    more = [f"and {count - len(shown):,} more: rbdfs status --json"] if count > len(shown) else []
    lines = [*shown, *more] or ["none"]
    return list(zip([title, *[""] * (len(lines) - 1)], lines, strict=True))


def _opened(opened: Mapping[str, Any]) -> str:
    who = f"{opened['command'] or 'a process that is gone'} ({opened['pid']})"
    return f"{opened['image']} by {who}, for {format_seconds(opened['seconds'])}"


def _waiting(request: Mapping[str, Any]) -> str:
    image = f" of {request['image']}" if request["image"] is not None else ""
    at = f" at {request['offset']}" if request["offset"] is not None else ""
    return f"{request['operation']}{image}{at}, for {format_seconds(request['seconds'])}"


def _error(error: Mapping[str, Any]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(error["at"]))
    return f"{when} {error['operation']}: {error['message']}"
