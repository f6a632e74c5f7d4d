"""Figures for people, and lists for scripts. Pure."""

import json
from collections.abc import Iterator, Mapping, Sequence


def format_seconds(seconds: float) -> str:
    """A duration in its largest units: 5.2 s, 3 min, 1 h 20 min, 2 d 3 h."""
    if seconds < 60:
        return f"{round(seconds, 1):g} s"
    minutes = int(seconds) // 60
    hours, days = minutes // 60, minutes // 1440
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days < 1 else f"{days} d {hours % 24} h"


def format_bytes(count: float) -> str:
    """A number of bytes in its largest unit: 33 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{round(count, 1):g} {unit}"
        count /= 1024
    return f"{round(count, 1):g} TiB"


def json_lines(fields: Mapping[str, object], name: str, rows: Sequence[object]) -> Iterator[str]:
    """A JSON object with these fields and the list `name`, one row of it a line."""
    yield f"{json.dumps(fields)[:-1]}, {json.dumps(name)}: ["
    for number, row in enumerate(rows, 1):
        yield json.dumps(row) + ("," if number < len(rows) else "")
    yield "]}"
