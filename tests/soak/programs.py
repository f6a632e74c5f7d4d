"""Other programs, run to their end, to a deadline, or until all is called off."""

import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.soak.ledger import FailedError, errnos_in

PROGRAM_SECONDS = 150.0
"""No program of a reader takes as long, whatever the cluster is like."""


class Programs:
    """Those that run now, so that they can be ended."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.ended = False

    def run(self, *command: object, environment: Mapping[str, str] | None = None, folder: Path | None = None) -> bytes:
        """What it wrote. Raises FailedError if it fails, and subprocess.TimeoutExpired."""
        words = [str(word) for word in command]
        with self._lock:
            if self.ended:
                raise FailedError(["ended"], "all is called off")
            process = subprocess.Popen(
                words,
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is ours
            )
            self._running.add(process)
        try:
            out, error = process.communicate(timeout=PROGRAM_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            with self._lock:
                self._running.discard(process)
        if process.returncode:
            said = error.decode(errors="replace") + out.decode(errors="replace")
            status = f"{words[0]}: status {process.returncode}"
            raise FailedError(errnos_in(said) or [status], f"{status}: {said.strip()[-1500:]}")
        return out

    def end(self) -> None:
        """Kill all, and start no more."""
        with self._lock:
            self.ended = True
            for process in self._running:
                process.kill()
