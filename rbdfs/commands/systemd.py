"""What a mount tells the service manager, as sd_notify(3) and sd_watchdog_enabled(3) have it.

It is one datagram, sent by a few lines of our own: python3-systemd may be missing, and a unit of Type=notify whose
service does not speak is ended.
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
"""How often is looked whether the status has changed."""

ASKED_IN_TIME = 3
"""How often the mount is asked within the watchdog's time: one late answer costs nothing."""

SEND_SECONDS = 1.0
"""How long a manager that takes no message is waited for; then the message is lost."""


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """systemd, or whoever else has set NOTIFY_SOCKET; nobody, by default."""

    address: str = ""
    """A path, or `@` and an abstract name."""
    watchdog_seconds: float = 0.0
    """Within which it wants to hear that the mount works; 0 if it does not."""

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str], pid: int) -> "ServiceManager":
        """Who waits to hear from the process `pid`. The variables are taken out: they are not for our own children."""
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
            log.warning("the service manager could not be told %s: %s", assignments[0], error)


async def keep_informed(manager: ServiceManager, status: Callable[[], str], ask: Callable[[], None]) -> None:
    """Tell the status as it changes, and the watchdog that the mount works, until cancelled.

    `ask` asks the mount itself. It blocks, is called in a worker thread, and raises MountError.
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
    # A thread of its own, since all others may be waiting for a dead cluster.
    limiter = trio.CapacityLimiter(1)
    while True:
        try:
            await run_in_thread(ask, abandon_on_cancel=True, limiter=limiter)
            manager.notify("WATCHDOG=1")
        except MountError as error:
            log.warning("the watchdog hears nothing: %s", error)
        await trio.sleep(manager.watchdog_seconds / ASKED_IN_TIME)
