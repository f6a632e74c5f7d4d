"""How the cluster has answered lately, without asking it. Pure."""

import errno
from dataclasses import dataclass
from typing import Final

SILENT_SECONDS: Final = 5.0
"""A cluster that owes an answer for so long, and has given no other, does not answer."""


@dataclass(slots=True)
class ConnectionHealth:
    """Kept where answers come over the thread boundary. Times are those of time.monotonic()."""

    last_result: int = 0
    """Of the latest answer; a negative errno if it is an error."""
    last_at: float = 0.0
    """When the cluster has answered last; that librados gave up waiting is no answer."""
    revalidations: int = 0
    """How often an open image was asked whether it is still there, and what it was."""

    def note(self, result: int, now: float) -> None:
        """There is an answer, or librados has given up."""
        self.last_result = result
        if result != -errno.ETIMEDOUT:
            self.last_at = now

    @property
    def is_connected(self) -> bool:
        """Whether the cluster serves this client: False once it has blocklisted it."""
        return self.last_result != -errno.ESHUTDOWN

    def osds_answer(self, waited: float, now: float) -> bool:
        """Whether OSDs answer, as far as they were asked; `waited` is how long the oldest request does, 0 without."""
        if waited > SILENT_SECONDS:
            return now - self.last_at <= SILENT_SECONDS
        return self.last_result != -errno.ETIMEDOUT
