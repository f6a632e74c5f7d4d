"""A soak: all readers, the changes and the faults, until the time is over, and what came of it."""

import errno
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.cluster import MIB
from tests.soak.descriptors import Changing, LongOpen, Mmap, Pressure, Random
from tests.soak.faults import SCHEDULE, Fault, Faults
from tests.soak.fixed import POOL, compare
from tests.soak.gauge import Sample, idle_sample, sample
from tests.soak.ledger import FailedError, Ledger, WrongError
from tests.soak.loop import LoopMount
from tests.soak.reader import Reader
from tests.soak.site import OSD_TIMEOUT_SECONDS, Site, site
from tests.soak.whole import Cp, DirectDd, Ls, Restic, Rsync, Tar

READERS: tuple[type[Reader], ...] = (
    *(Cp, DirectDd, Tar, Rsync, Restic, Ls),
    *(LoopMount, Random, LongOpen, Mmap, Changing, Pressure),
)
PAUSE_MIN_SECONDS = 1.0
"""Between two rounds of a reader; at least as long as the last round: two cores have Ceph to serve, too."""
ROUND_SECONDS = 300.0
"""A round that has not ended by then hangs: no program may take half as long, and no round has many."""
LATE_SECONDS = 2.0
"""A read is answered within --osd-timeout and this."""
CHANGE_PAUSE_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Options:
    """Of a run."""

    minutes: float = 30.0
    seed: int = 1
    scale: int = 64
    """MiB of an image."""
    schedule: tuple[Fault, ...] = SCHEDULE
    quiet_seconds: float = 20.0
    """Between two faults."""
    log_file: Path | None = None
    """Where to keep what the mount has logged."""


class Soak:
    """The threads of a run: one for each reader, one for the changes, one for the faults."""

    def __init__(self, there: Site, options: Options) -> None:
        self.ledger = Ledger()
        self.site = there
        self.options = options
        self.faults = Faults(
            there.ceph, there.probe, self.ledger, options.schedule, options.quiet_seconds, options.seed
        )
        self.readers = [kind(there, self.ledger, options.seed) for kind in READERS]
        self.begin: Sample | None = None
        self.end: Sample | None = None
        self._stop = threading.Event()
        self._busy: dict[str, float] = {}
        """Since when each thread is at its present round."""
        self._hung = False

    def run(self) -> None:
        """All of it. What went wrong is in the ledger."""
        try:
            self._one_round("before")
            self.begin = idle_sample(self.site.mount.pid)
            print(f"begin: {self.begin}", flush=True)
            with suppress(_HungError):
                self._all_at_once()
                self._one_round("after the last fault")
                self.end = idle_sample(self.site.mount.pid, self.begin)
                print(f"end: {self.end}", flush=True)
                for what in self.end.grown_since(self.begin):
                    self.ledger.fail(f"the mount has grown: {what}")
                self._verify()
        except BaseException:
            self.site.programs.end()
            raise
        finally:
            for reader in self.readers:
                with suppress(OSError):
                    reader.close()

    # Phases

    def _one_round(self, when: str) -> None:
        """Each reader alone, without any fault: no error is excused."""
        for reader in self.readers:
            self._guarded(reader.name, partial(self._round, reader, f" ({when})"))
            reader.close()

    def _all_at_once(self) -> None:
        threads = [
            threading.Thread(
                target=self._repeat, args=(reader.name, partial(self._round, reader)), name=reader.name, daemon=True
            )
            for reader in self.readers
        ]
        threads.append(
            threading.Thread(target=self._repeat, args=("changes", self.site.changes.step), name="changes", daemon=True)
        )
        print(f"{'minute':>6}{'RSS MiB':>9}{'fds':>5}{'threads':>9}{'rounds':>8}{'MiB':>9}{'errors':>8}", flush=True)
        began = time.monotonic()
        self.faults.start()
        for thread in threads:
            thread.start()
        try:
            self._watch(began, began + self.options.minutes * 60)
        finally:
            self._stop.set()
            if sys.exc_info()[0] is not None:
                self.site.programs.end()
            self.faults.end()
            self._await(threads)

    def _watch(self, began: float, until: float) -> None:
        """Print a line each minute."""
        minute = 0
        while time.monotonic() < until:
            time.sleep(1)
            self._raise_if_hung()
            if time.monotonic() - began >= minute * 60:
                now = sample(self.site.mount.pid)
                rounds, bytes_read, errors = self.ledger.totals
                row = f"{minute:6}{now.rss_bytes // MIB:9}{now.fds:5}{now.threads:9}"
                print(f"{row}{rounds:8}{bytes_read // MIB:9}{errors:8}", flush=True)
                minute += 1

    def _await(self, threads: Sequence[threading.Thread]) -> None:
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.1)
            self._raise_if_hung()

    def _verify(self) -> None:
        """That the soak itself knew what is right: by librbd alone."""
        try:
            print(f"librbd reads {self.site.changes.verify()} changed images and snapshots as they were written")
            with self.site.room("exports") as room:
                for fixed in self.site.fixed.values():
                    self.site.ceph.run("rbd", "export", "--no-progress", f"{POOL}/{fixed.name}", str(room / fixed.name))
                    compare(f"rbd export of {fixed.name}", room / fixed.name, fixed.reference)
        except WrongError as error:
            self.ledger.fail(f"the soak itself was wrong: {error}")

    # Rounds

    def _repeat(self, name: str, round_: Callable[[], None]) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            self._guarded(name, round_)
            least = CHANGE_PAUSE_SECONDS if name == "changes" else PAUSE_MIN_SECONDS
            self._stop.wait(max(least, time.monotonic() - began))

    def _guarded(self, name: str, round_: Callable[[], None]) -> None:
        self._busy[name] = time.monotonic()
        try:
            round_()
        except Exception:
            self.ledger.fail(f"{name}: {traceback.format_exc()}")
        finally:
            del self._busy[name]

    def _round(self, reader: Reader, when: str = "") -> None:
        began = time.monotonic()
        bytes_read, errors = 0, frozenset[str]()
        try:
            bytes_read = reader.round()
        except WrongError as error:
            errors = frozenset({"wrong bytes"})
            self.ledger.fail(f"{reader.name}{when}: wrong bytes: {error}")
        except FailedError as error:
            errors = error.names
            self._judge(reader, began, errors, f"{when}: {error}")
        except OSError as error:
            errors = frozenset({errno.errorcode.get(error.errno or 0, repr(error))})
            self._judge(reader, began, errors, f"{when}: {error}")
        self.ledger.count(reader.name, seconds=time.monotonic() - began, bytes_read=bytes_read, errors=errors)

    def _judge(self, reader: Reader, began: float, errors: frozenset[str], message: str) -> None:
        """An error without a fault, and one that a fault does not excuse, must not be."""
        if self.site.programs.ended or self._hung:
            return
        now = time.monotonic()
        waited = f"in {now - began:.1f} s, while librados waited {self.site.probe.longest(began, now):.1f} s"
        if not self.faults.excuse(began, now):
            self.ledger.fail(f"{reader.name}: an error without a fault, {waited}{message}")
        elif not errors <= reader.may_see:
            self.ledger.fail(f"{reader.name}: not an error of a fault: {sorted(errors)}{message}")

    # The watchdog

    def _raise_if_hung(self) -> None:
        now = time.monotonic()
        hung = {name: now - since for name, since in self._busy.copy().items() if now - since > ROUND_SECONDS}
        if not self.site.mount.is_running:
            self.ledger.fail("the mount has died")
        elif hung:
            frames = sys._current_frames()  # noqa: SLF001  (Python's own)
            stacks = "".join(
                f"\n{thread.name}:\n{''.join(traceback.format_stack(frame))}"
                for thread in threading.enumerate()
                if thread.ident and thread.name in hung and (frame := frames.get(thread.ident))
            )
            self.ledger.fail(
                f"rounds hang (seconds): {hung}; the mount's threads wait in {self.site.mount.waits}{stacks}"
            )
            os.kill(self.site.mount.pid, signal.SIGKILL)  # who waits for a mount cannot be killed: the mount can
        else:
            return
        self._hung = True
        self._stop.set()
        self.site.programs.end()
        raise _HungError

    # What came of it

    def summary(self) -> str:
        """For a person."""
        late = [seconds for seconds in self.ledger.answers if seconds > OSD_TIMEOUT_SECONDS + LATE_SECONDS]
        lines = [
            self.ledger.summary(),
            f"{len(late)} of them more than --osd-timeout ({OSD_TIMEOUT_SECONDS} s) and {LATE_SECONDS:.0f} s",
            f"changes: {_counts(self.site.changes.counts)}",
            f"faults: {_counts(self.faults.counts)}",
            f"the mount at the begin: {self.begin}; at the end: {self.end}",
            f"{len(self.ledger.failures)} failures",
        ]
        return "\n".join(lines)


class _HungError(Exception):
    """There is no point in going on."""


def run(options: Options) -> list[str]:
    """What must not have been. Prints what happens, and a summary."""
    with site(options.seed, options.scale) as there:
        soak = Soak(there, options)
        try:
            soak.run()
        finally:
            print(soak.summary(), flush=True)
            if options.log_file:
                shutil.copyfile(there.mount.log_file, options.log_file)
    return soak.ledger.failures


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "none"
