"""Whether the cluster works, by its latest answers, without asking it. Pure."""

import errno
from dataclasses import dataclass
from typing import Final

SILENT_SECONDS: Final = 5.0
"""After this time without any answer, while a question waits, the cluster counts as silent."""


@dataclass(slots=True)
class ConnectionHealth:
    """Updated where answers come over the thread boundary. Times are of time.monotonic()."""

    last_result: int = 0
    """The result of the latest answer; a negative errno if it is an error."""
    last_at: float = 0.0
    """When the cluster last answered. A timeout of librados is no answer."""
    revalidations: int = 0
    """How many revalidations of open images there were."""

    def note(self, result: int, now: float) -> None:
        """Record an answer, or that librados has timed out."""
        self.last_result = result
        if result != -errno.ETIMEDOUT:
            self.last_at = now

    @property
    def is_connected(self) -> bool:
        """Whether the cluster serves this client: False once it has blocklisted it."""
        return self.last_result != -errno.ESHUTDOWN

    def osds_answer(self, waited: float, now: float) -> bool:
        """Whether OSDs answer, as far as they were asked. `waited` is the age of the oldest open request, 0 if none."""
        if waited > SILENT_SECONDS:
            return now - self.last_at <= SILENT_SECONDS
        return self.last_result != -errno.ETIMEDOUT
