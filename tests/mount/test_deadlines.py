"""Each request has its answer in time, however many wait and whatever is silent; what is silent slows nothing else."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from subprocess import PIPE

import pytest
import rbd

from rbdfs.fuse.attributes import ENTRY_SECONDS
from tests.beats import beating
from tests.cluster import MIB, Ceph, Mount, random_bytes, running_ceph, silent, wait_until
from tests.mount.test_device import opened, read_direct, waits_for_a_mount

Mounts = Callable[..., Mount]
Clock = Callable[[], float]
"""Seconds: of tests/beats.py."""

OSD_TIMEOUT = 4
IN_TIME = OSD_TIMEOUT + 2.0
"""What is promised, in seconds."""
NOISE_SECONDS = 1.5
"""How late a busy machine may be. One group of requests after the other would take twice the timeout."""
GONE_SECONDS = 15
"""A process that is killed is gone in 2 s, or, if nobody sees that it was, after --osd-timeout."""
PAGE = 4096
DEAD, ALIVE = "silent", "rbd"


@pytest.fixture(scope="module")
def ceph() -> Iterator[Ceph]:
    """Two OSDs: the pool `silent` is on one, all others are on the other."""
    with running_ceph(osds=2) as ceph:
        ceph.tell_mon("osd crush add-bucket", name="apart", type="root")
        ceph.tell_mon("osd crush set", id=1, weight=1.0, args=["root=apart"])
        ceph.tell_mon("osd crush rule create-simple", name="apart", root="apart", type="osd")
        ceph.tell_mon("osd pool create", pool=DEAD, pg_num=8, pgp_num=8, pool_type="replicated", rule="apart")
        # An OSD that was silent for longer than its lease on a placement group with no other copy is given no new one
        # (https://github.com/ceph/ceph-container/issues/1682), and serves nothing of it for good.
        ceph.tell_mon("osd pool set", pool=DEAD, var="read_lease_interval", val="3600")
        with ceph.ioctx(DEAD) as ioctx:
            rbd.RBD().pool_init(ioctx, True)
        for pool, osd in ((DEAD, 1), (ALIVE, 0)):
            wait_until(lambda pool=pool, osd=osd: acting(ceph, pool) == {osd}, 60)  # type: ignore[misc]
        yield ceph


def acting(ceph: Ceph, pool: str) -> set[int]:
    """The OSDs that have objects of a pool, now that all is where it should be."""
    groups = json.loads(ceph.tell_mon("pg ls-by-pool", poolstr=pool, format="json"))["pg_stats"]
    if any("active+clean" not in group["state"] for group in groups):
        return set()
    return {osd for group in groups for osd in group["acting"]}


WAITER = """
import mmap, os, sys
call, path = sys.argv[1:]
file = os.open(path, os.O_RDONLY | os.O_DIRECT) if call == "read" else -1
print("ready", flush=True)
sys.stdin.readline()
if call == "read":
    os.preadv(file, [mmap.mmap(-1, 4096)], 4 << 20)
elif call == "open":
    os.open(path, os.O_RDONLY)
else:
    os.stat(path)
"""


def failed(clock: Clock, function: Callable[[], object]) -> tuple[int | None, float]:
    """The errno that a call ends with, and after how many seconds."""
    began = clock()
    try:
        function()
    except OSError as error:
        return error.errno, clock() - began
    return None, clock() - began


def all_at_once(clock: Clock, calls: Sequence[Callable[[], object]]) -> list[tuple[int | None, float]]:
    """How each of them has ended."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(partial(failed, clock), calls))


def assert_timed_out(ended: Sequence[tuple[int | None, float]]) -> None:
    """Each with an error, and in time."""
    assert {error for error, _ in ended} <= {errno.ETIMEDOUT, errno.EIO}, ended
    assert max(seconds for _, seconds in ended) < IN_TIME + NOISE_SECONDS, ended


@pytest.fixture
def clock() -> Iterator[Clock]:
    """What waiting is measured by."""
    with beating() as clock:
        yield clock


@pytest.fixture
def mount(mounts: Mounts) -> Mount:
    """One that waits for 4 s."""
    mount = mounts("--osd-timeout", str(OSD_TIMEOUT))
    mount.expect("ERROR", "WARNING")
    return mount


@pytest.mark.parametrize("way", ["page cache", "direct"])
def test_hundreds_of_reads_fail_together_while_those_of_another_pool_are_answered(
    ceph: Ceph, mount: Mount, clock: Clock, way: str
) -> None:
    name, content = ceph.unique("many"), random_bytes(4 * MIB)
    for pool in (DEAD, ALIVE):
        ceph.make_image(name, content, pool=pool)
    with ExitStack() as stack:
        flags = os.O_DIRECT if way == "direct" else 0
        files = [os.open(mount.image(name, pool), os.O_RDONLY | flags) for pool in (DEAD, ALIVE)]
        for file in files:
            stack.callback(close, file)
        read = read_direct if way == "direct" else lambda file, offset: os.pread(file, PAGE, offset)
        with silent(ceph, "osd.1"), ThreadPoolExecutor(1) as threads:
            calls = [partial(read, files[0], at * 2 * PAGE) for at in range(400)]
            dead = threads.submit(all_at_once, clock, calls)
            others: list[float] = []
            while not dead.done():
                at = len(others) % 512 * 2 * PAGE
                began = clock()
                assert read(files[1], at) == content[at : at + PAGE]
                others.append(clock() - began)
            assert_timed_out(dead.result())
    assert max(others) < NOISE_SECONDS, sorted(others)[-5:]


def close(file: int) -> None:
    """Also where the cluster does not say whether the image is still there."""
    with suppress(OSError):
        os.close(file)


def operations(mount: Mount, pool: str, names: Sequence[str], file: int) -> dict[str, Callable[[], object]]:
    """One of each, of which none can be answered from a cache. `names` are of images that nobody has looked up."""
    folder = mount.path / pool
    looked_up = folder / names[0]
    return {
        "lookup": lambda: (folder / names[1]).stat(),
        "open": lambda: os.open(looked_up, os.O_RDONLY),
        "readdir": lambda: os.listdir(folder),
        "seek": lambda: os.lseek(file, 0, os.SEEK_HOLE),
        "getxattr": lambda: os.getxattr(looked_up, "user.rbd.features"),
        "listxattr": lambda: os.listxattr(looked_up),
        "getattr": lambda: looked_up.stat(),
    }


def test_every_operation_fails_in_time_however_many_wait_and_those_of_another_pool_work(
    ceph: Ceph, mount: Mount, clock: Clock
) -> None:
    names = [ceph.unique("each") for _ in range(4)]
    for pool in (DEAD, ALIVE):
        for name in names:
            ceph.make_image(name, random_bytes(MIB), pool=pool)
    with ExitStack() as stack:
        files = {}
        for pool in (DEAD, ALIVE):
            mount.image(names[0], pool).stat()
            files[pool] = os.open(mount.image(names[2], pool), os.O_RDONLY)
            stack.callback(close, files[pool])
        looked_up = time.monotonic()
        wait_until(lambda: time.monotonic() > looked_up + ENTRY_SECONDS)  # what the kernel was told is old by then
        with silent(ceph, "osd.1"), ThreadPoolExecutor(1) as threads:
            calls = [call for _ in range(40) for call in operations(mount, DEAD, names, files[DEAD]).values()]
            waiting: Future[list[tuple[int | None, float]]] = threads.submit(all_at_once, clock, calls)
            rounds = 0
            while not waiting.done():
                for operation, call in operations(mount, ALIVE, names, files[ALIVE]).items():
                    error, seconds = failed(clock, lambda: close_if_open(call()))  # noqa: B023
                    assert error is None, operation
                    assert seconds < NOISE_SECONDS, operation
                rounds += 1
            assert_timed_out(waiting.result())
    assert rounds > 1


def close_if_open(result: object) -> None:
    """What open() gave."""
    if isinstance(result, int) and not isinstance(result, bool) and result > 2:
        with suppress(OSError):
            os.close(result)


@pytest.mark.parametrize("call", ["read", "open", "lookup"])
def test_a_process_that_is_killed_while_it_waits_is_gone_at_once(ceph: Ceph, mounts: Mounts, call: str) -> None:
    mount = mounts("--osd-timeout", "60")
    mount.expect("ERROR", "WARNING")
    name = ceph.unique("killed")
    ceph.make_image(name, random_bytes(8 * MIB), pool=DEAD)
    path = mount.image(name, DEAD)
    if call != "lookup":
        path.stat()
    command = [sys.executable, "-I", "-c", WAITER, call, str(path)]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        with silent(ceph, "osd.1"):
            print(file=process.stdin, flush=True)
            wait_until(lambda: waits_for_a_mount(process.pid))
            process.kill()
            assert process.wait(GONE_SECONDS) == -signal.SIGKILL
    assert path.read_bytes() == random_bytes(8 * MIB)


def test_a_signal_that_does_not_kill_interrupts_no_read(ceph: Ceph, mount: Mount, clock: Clock) -> None:
    name = ceph.unique("timer")
    ceph.make_image(name, random_bytes(8 * MIB), pool=DEAD)
    heard = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.set())
    try:
        with opened(mount.image(name, DEAD), os.O_DIRECT) as file, silent(ceph, "osd.1"):
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            assert_timed_out([failed(clock, lambda: read_direct(file, 4 * MIB))])
        assert heard.wait(1)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_without_monitors_and_osds_each_operation_fails_in_time(ceph: Ceph, mount: Mount, clock: Clock) -> None:
    names = [ceph.unique("all") for _ in range(3)]
    for name in names:
        ceph.make_image(name, random_bytes(MIB))
    mount.image(names[0]).stat()
    with opened(mount.image(names[2])) as file:
        looked_up = time.monotonic()
        wait_until(lambda: time.monotonic() > looked_up + ENTRY_SECONDS)
        daemons = [daemon for daemon, pid in ceph.devcluster.status().pids.items() if pid]
        with silent(ceph, *daemons):
            calls = [*operations(mount, "rbd", names, file).values(), lambda: os.statvfs(mount.path)]
            calls += [lambda: os.listdir(mount.path), (mount.path / "no-such-pool").stat]
            assert_timed_out(all_at_once(clock, calls))
