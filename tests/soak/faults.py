"""What goes wrong with the cluster, by a schedule, and when it is well again."""

import itertools
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.cluster import Ceph
from tests.soak.ledger import Ledger
from tests.soak.probe import Probe
from tests.soak.site import OSDS

SETTLE_SECONDS = 5.0
"""After all placement groups are active and clean: an error may be of a request from before."""
WELL_SECONDS = 300.0
"""A cluster that is not well by then has not come back. Three OSDs that were frozen for 15 s have taken 135 s here."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is done to daemons, and undone after some seconds."""

    name: str
    seconds: float
    excuses_errors: bool
    """Whether readers may get errors: if not enough OSDs are left for longer than --osd-timeout."""
    daemons: Callable[[random.Random], list[str]]
    freezes: bool = False
    """By SIGSTOP, which is latency; else by SIGKILL."""


def one_osd(source: random.Random) -> list[str]:
    """Any."""
    return [f"osd.{source.randrange(OSDS)}"]


def all_osds(_: random.Random) -> list[str]:
    """Of the cluster."""
    return [f"osd.{number}" for number in range(OSDS)]


def monitor(_: random.Random) -> list[str]:
    """The only one."""
    return ["mon.a"]


KILL_ONE = Fault("an OSD killed", 15, excuses_errors=False, daemons=one_osd)
# After 4 s frozen, an OSD under load answers no client for 12 to 19 s more, librados alone included (16.2.15): if its
# lease on a placement group has run out, its next must come first (osd_heartbeat_grace * 0.8 / 2, two of them).
SCHEDULE = (
    KILL_ONE,
    Fault("an OSD frozen for 4 s", 4, excuses_errors=True, daemons=one_osd, freezes=True),
    Fault("all OSDs killed", 20, excuses_errors=True, daemons=all_osds),
    Fault("the monitor killed", 5, excuses_errors=False, daemons=monitor),  # back within --osd-timeout
    Fault("all OSDs frozen for 15 s", 15, excuses_errors=True, daemons=all_osds, freezes=True),
    Fault("an OSD frozen for 25 s", 25, excuses_errors=True, daemons=one_osd, freezes=True),
)


class Faults:
    """One after the other, in a thread, with quiet times between them."""

    def __init__(
        self,
        ceph: Ceph,
        probe: Probe,
        ledger: Ledger,
        schedule: tuple[Fault, ...],
        quiet_seconds: float,
        seed: int,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._ceph = ceph
        self._probe = probe
        self._ledger = ledger
        self._schedule = itertools.cycle(schedule)
        self._quiet_seconds = quiet_seconds
        self._random = random.Random(seed)
        self._excused: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)

    def start(self) -> None:
        """With a quiet time first."""
        self._thread.start()

    def end(self) -> None:
        """End the fault that there is, and wait until the cluster is well."""
        self._stop.set()
        if self._thread.ident:
            self._thread.join()

    def excuse(self, began: float, ended: float) -> bool:
        """Whether there was a fault at any time between these (by time.monotonic) that readers may notice."""
        return any(since <= ended and began <= until for since, until in self._excused)

    def _run(self) -> None:
        while not self._stop.wait(self._quiet_seconds):
            fault = next(self._schedule)
            began = time.monotonic()
            if fault.excuses_errors:
                self._excused.append((began, float("inf")))
            try:
                with self._injected(fault):
                    self._stop.wait(fault.seconds)
                self._wait_until_well()
            except Exception as error:
                self._ledger.fail(f"the cluster did not come back from: {fault.name}: {error!r}")
            self._stop.wait(SETTLE_SECONDS)
            if fault.excuses_errors:
                self._excused[-1] = (began, time.monotonic())
            self.counts[fault.name] += 1
            waited = self._probe.longest(began, time.monotonic())
            print(
                f"{time.strftime('%X')} {fault.name}: over after {time.monotonic() - began:.0f} s; "
                f"librados waited {waited:.1f} s",
                flush=True,
            )

    @contextmanager
    def _injected(self, fault: Fault) -> Iterator[None]:
        daemons = fault.daemons(self._random)
        print(f"{time.strftime('%X')} {fault.name}: {', '.join(daemons)}", flush=True)
        for daemon in daemons:
            if fault.freezes:
                self._signal(daemon, signal.SIGSTOP)
            else:
                self._ceph.devcluster.kill_daemon(daemon)
        try:
            yield
        finally:
            for daemon in daemons:
                if fault.freezes:
                    self._signal(daemon, signal.SIGCONT)
                else:
                    self._ceph.devcluster.start_daemon(daemon)

    def _signal(self, daemon: str, signum: signal.Signals) -> None:
        pid = self._ceph.devcluster.status().pids[daemon]
        assert pid is not None
        os.kill(pid, signum)

    def _wait_until_well(self) -> None:
        deadline = time.monotonic() + WELL_SECONDS
        while not self._is_well():
            if time.monotonic() > deadline:
                raise TimeoutError(self._ceph.tell_mon("pg stat").decode())
            time.sleep(0.5)

    def _is_well(self) -> bool:
        osds = json.loads(self._ceph.tell_mon("osd stat", format="json"))
        states = json.loads(self._ceph.tell_mon("pg stat", format="json"))["pg_summary"]["num_pg_by_state"]
        all_up = osds["num_up_osds"] == OSDS
        return all_up and all(state["name"].startswith("active+clean") for state in states)  # +snaptrim
