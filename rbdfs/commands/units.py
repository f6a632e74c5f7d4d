"""Figures for people. Pure."""


def in_time(seconds: float) -> str:
    """A duration, for people."""
    if seconds < 60:
        return f"{round(seconds, 1):g} s"
    minutes = int(seconds) // 60
    hours, days = minutes // 60, minutes // 1440
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days < 1 else f"{days} d {hours % 24} h"


def in_units(count: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{round(count, 1):g} {unit}"
        count /= 1024
    return f"{round(count, 1):g} TiB"
