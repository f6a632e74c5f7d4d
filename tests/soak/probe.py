"""An independent client that asks OSDs all the time: how long the cluster itself keeps clients waiting."""

import os
import threading
import time
from collections.abc import Iterable

import rados

from tests.cluster import SOON_BACK, Ceph

EACH_SECONDS = 0.25
SLOW_SECONDS = 1.0


class Probe:
    """One question to each object at a time, without a timeout, by librados alone."""

    def __init__(self, ceph: Ceph, pool: str, objects: Iterable[str]) -> None:
        self._rados = rados.Rados(conffile=os.fspath(ceph.conf), conf=SOON_BACK)
        self._rados.connect()
        self._ioctx = self._rados.open_ioctx(pool)
        self._asked: dict[str, float] = dict.fromkeys(objects, 0.0)
        """Since when an answer is due; 0 if none is."""
        self._waited: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="probe", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for the last answers. No OSD may be down for good."""
        self._stop.set()
        self._thread.join()
        while any(self._asked.values()):
            time.sleep(0.01)
        self._ioctx.close()
        self._rados.shutdown()

    def longest(self, began: float, ended: float) -> float:
        """The longest that one question waited that was waiting at any time between these; 0 if under a second."""
        now = time.monotonic()
        waits = [*self._waited, *((since, now) for since in self._asked.copy().values() if since)]
        longest = max((until - since for since, until in waits if since <= ended and began <= until), default=0.0)
        return longest if longest > SLOW_SECONDS else 0.0

    def _run(self) -> None:
        while not self._stop.wait(EACH_SECONDS):
            for name, since in self._asked.items():
                if not since:
                    self._asked[name] = time.monotonic()
                    self._ioctx.aio_stat(name, lambda *_, name=name: self._answered(name))

    def _answered(self, name: str) -> None:
        """In a thread of librados'."""
        since, self._asked[name] = self._asked[name], 0.0
        if time.monotonic() - since > SLOW_SECONDS:
            self._waited.append((since, time.monotonic()))
