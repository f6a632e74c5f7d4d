"""Notifications to the service manager: sd_notify(3) and sd_watchdog_enabled(3).

Each is one datagram. We send it ourselves, because python3-systemd may be missing, and systemd stops a unit of
Type=notify that sends none.
"""

import logging
import os
import socket
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

import trio

from rbdfs.errors import MountError
from rbdfs.threads import run_in_thread

log = logging.getLogger(__name__)

STATUS_SECONDS = 5.0
"""How often we check whether the status has changed."""

ASKED_IN_TIME = 3
"""How often the mount is asked within the watchdog's time, so that one late answer does no harm."""

SEND_SECONDS = 1.0
"""How long to wait for a manager that takes no message; then the message is lost."""


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """systemd, or another program that has set NOTIFY_SOCKET; none by default."""

    address: str = ""
    """A path, or `@` and an abstract name."""
    watchdog_seconds: float = 0.0
    """The longest time between two pings of the watchdog; 0 without a watchdog."""

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str], pid: int) -> "ServiceManager":
        """The manager that started the process `pid`. Removes the variables: they are not for our children."""
        address = environment.pop("NOTIFY_SOCKET", "")
        microseconds = environment.pop("WATCHDOG_USEC", "")
        watched = environment.pop("WATCHDOG_PID", str(pid))
        if not address.startswith(("/", "@")):
            return cls()
        is_watched = microseconds.isdecimal() and watched == str(pid)
        return cls(address, int(microseconds) / 1e6 if is_watched else 0.0)

    def notify(self, *assignments: str) -> None:
        """Send assignments such as `READY=1`. Never raises."""
        if not self.address:
            return
        address = os.fsencode(self.address)
        message = "\n".join(" ".join(each.splitlines()) for each in assignments)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(SEND_SECONDS)
                sender.sendto(
                    message.encode(errors="backslashreplace"), b"\0" + address[1:] if address[:1] == b"@" else address
                )
        except OSError as error:
            log.warning("cannot notify the service manager of %s: %s", assignments[0], error)


async def keep_informed(manager: ServiceManager, status: Callable[[], str], ask: Callable[[], None]) -> None:
    """Send each new status, and ping the watchdog while the mount works, until cancelled.

    `ask` makes a request to the mount. It blocks, is called in a worker thread, and raises MountError.
    """
    if not manager.address:
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tell_status, manager, status)
        if manager.watchdog_seconds:
            nursery.start_soon(_tell_watchdog, manager, ask)


async def _tell_status(manager: ServiceManager, status: Callable[[], str]) -> None:
    told = ""
    while True:
        if (now := status()) != told:
            manager.notify(f"STATUS={now}")
            told = now
        await trio.sleep(STATUS_SECONDS)


async def _tell_watchdog(manager: ServiceManager, ask: Callable[[], None]) -> None:
    # Its own limiter gives it a thread even if all others wait for a dead cluster.
    limiter = trio.CapacityLimiter(1)
    while True:
        try:
            await run_in_thread(ask, abandon_on_cancel=True, limiter=limiter)
            manager.notify("WATCHDOG=1")
        except MountError as error:
            log.warning("no ping to the watchdog: %s", error)
        await trio.sleep(manager.watchdog_seconds / ASKED_IN_TIME)
