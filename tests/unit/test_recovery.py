"""When a new connection is tried, how often, and what those wait for who were refused. Without Ceph."""

import errno
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import trio
import trio.testing

from rbdfs.catalog import Pool
from rbdfs.ceph.bindings.health import ConnectionHealth
from rbdfs.ceph.bindings.lifetime import ATTEMPTS, Lifetime, by_the_newest
from rbdfs.ceph.connection.probe import PROBE_SECONDS, Probe
from rbdfs.ceph.connection.recovery import CALM_SECONDS, FIRST_SECONDS, LONGEST_SECONDS, PATIENT_SECONDS, Recovery
from rbdfs.errors import NOTICE, RbdfsError
from tests.in_trio import with_a_clock

OUT = "rbdfs.ceph.connection.recovery"


class FakeConnection:
    """One that works or not; and a new one can be had or not."""

    def __init__(self, *, works: bool = False, failures: int = 0) -> None:
        self.works = works
        self.failures = failures
        """How many attempts fail."""
        self.fault: Exception | None = None
        """What an attempt raises that nobody expects."""
        self.seconds = 0.0
        """How long an attempt takes."""
        self.probes: list[float] = []
        self.attempts: list[float] = []
        self.health = ConnectionHealth()
        self.recovery = Recovery(self.health, self.ask, self.connect)
        self.recovery.is_on = True
        self.lifetime = Lifetime(self.recovery)

    async def ask(self) -> bool:
        """Whether the present one works."""
        self.probes.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        return self.works

    async def connect(self) -> None:
        """Put a new one in its place."""
        self.attempts.append(trio.current_time())
        await trio.sleep(self.seconds)
        if self.fault is not None:
            raise self.fault
        if len(self.attempts) <= self.failures:
            raise RbdfsError("the monitors refuse client.backup", errno.ENOTCONN)
        lifetime, self.lifetime = self.lifetime, Lifetime(self.recovery)
        lifetime.end()


def with_a_clock_and_log(
    test: Callable[[pytest.LogCaptureFixture], Coroutine[Any, Any, None]],
) -> Callable[[pytest.LogCaptureFixture], None]:
    """As `with_a_clock`."""

    def run(caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.DEBUG, OUT):
            trio.run(test, caplog, clock=trio.testing.MockClock(autojump_threshold=0))

    return run


@with_a_clock_and_log
async def test_a_client_that_is_blocklisted_gets_a_new_connection_at_once(caplog: pytest.LogCaptureFixture) -> None:
    cluster = FakeConnection()
    began, lifetime = trio.current_time(), cluster.lifetime
    lifetime.note(-errno.ESHUTDOWN)
    await trio.sleep(LONGEST_SECONDS)
    assert cluster.attempts == [began]
    assert cluster.probes == [], "it is known to be refused"
    assert lifetime.is_over
    assert [record.levelno for record in caplog.records] == [logging.WARNING, NOTICE]


@with_a_clock_and_log
async def test_the_next_attempts_come_more_and_more_seldom_and_each_failure_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = FakeConnection(failures=8)
    cluster.lifetime.note(-errno.ESHUTDOWN)
    await trio.sleep(1000)
    waits = [later - earlier for earlier, later in zip(cluster.attempts, cluster.attempts[1:], strict=False)]
    assert waits == [FIRST_SECONDS * 2**number for number in range(5)] + [LONGEST_SECONDS] * 3
    assert len(cluster.probes) == 8, "perhaps it is let in again"
    assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.WARNING, NOTICE]


@with_a_clock_and_log
async def test_a_client_that_is_let_in_again_keeps_its_connection(caplog: pytest.LogCaptureFixture) -> None:
    cluster = FakeConnection(failures=100)
    lifetime = cluster.lifetime
    lifetime.note(-errno.ESHUTDOWN)
    await trio.sleep(20)
    cluster.works = True
    await trio.sleep(LONGEST_SECONDS)
    attempts = len(cluster.attempts)
    await trio.sleep(1000)
    assert len(cluster.attempts) == attempts
    assert not lifetime.is_over
    assert "serves this client again" in caplog.text


@with_a_clock
async def test_a_cluster_that_is_silent_for_everybody_keeps_its_connection_and_is_asked_seldom() -> None:
    cluster = FakeConnection(failures=10_000)
    lifetime = cluster.lifetime
    for _ in range(3600):
        lifetime.note(-errno.ETIMEDOUT)
        await trio.sleep(1)
    assert len(cluster.attempts) < 3600 / LONGEST_SECONDS + 10
    cluster.works = True
    await trio.sleep(LONGEST_SECONDS)
    assert not lifetime.is_over


@pytest.mark.parametrize("sign", [errno.ETIMEDOUT, errno.EACCES, errno.EPERM])
def test_an_error_after_which_others_were_answered_is_none_of_the_connection(sign: int) -> None:
    async def test() -> None:
        cluster = FakeConnection()
        for _ in range(100):
            cluster.lifetime.note(-sign)
            cluster.lifetime.note(0)
            await trio.sleep(1)
        assert cluster.probes == []
        assert cluster.attempts == []

    with_a_clock(test)()


@pytest.mark.parametrize("sign", [errno.ETIMEDOUT, errno.EACCES, errno.EPERM])
def test_after_an_error_and_nothing_else_the_connection_is_probed_and_replaced_if_it_does_not_work(sign: int) -> None:
    async def test() -> None:
        cluster = FakeConnection()
        began, lifetime = trio.current_time(), cluster.lifetime
        lifetime.note(-sign)
        await trio.sleep(LONGEST_SECONDS)
        assert cluster.probes == cluster.attempts == [began + FIRST_SECONDS]
        assert lifetime.is_over

    with_a_clock(test)()


@with_a_clock
async def test_one_that_works_is_kept() -> None:
    cluster = FakeConnection(works=True)
    cluster.lifetime.note(-errno.ETIMEDOUT)
    await trio.sleep(1000)
    assert len(cluster.probes) == 1
    assert cluster.attempts == []


@with_a_clock
async def test_what_takes_long_is_suspected_though_others_are_answered() -> None:
    cluster = FakeConnection()
    lifetime = cluster.lifetime
    with cluster.recovery.patience():
        await trio.sleep(PATIENT_SECONDS / 2)
    await trio.sleep(100)
    assert cluster.probes == []
    with cluster.recovery.patience():
        for _ in range(100):
            await trio.sleep(0.1)
            lifetime.note(0)
        assert lifetime.is_over
    assert len(cluster.attempts) == 1


@with_a_clock
async def test_a_connection_that_works_is_not_probed_all_the_time_for_a_pool_that_is_dead() -> None:
    cluster = FakeConnection(works=True)

    async def ask() -> None:
        while True:
            with cluster.recovery.patience():
                await trio.sleep(5)
            cluster.lifetime.note(-errno.ETIMEDOUT)
            cluster.lifetime.note(0)

    with trio.move_on_after(1000):
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(ask)
    assert 10 < len(cluster.probes) <= 1000 / CALM_SECONDS
    assert cluster.attempts == []


@with_a_clock
async def test_what_came_late_by_a_connection_that_was_replaced_does_not_count() -> None:
    cluster = FakeConnection()
    old = cluster.lifetime
    old.note(-errno.ESHUTDOWN)
    await trio.sleep(10)
    cluster.health.note(0, 0.0)
    old.note(-errno.ESHUTDOWN)
    await trio.sleep(100)
    assert len(cluster.attempts) == 1
    assert cluster.health.is_connected


@with_a_clock
async def test_a_question_that_was_refused_waits_for_the_attempt_and_is_asked_again() -> None:
    cluster = FakeConnection()
    cluster.seconds = 0.5
    asked: list[Lifetime] = []

    async def current() -> FakeUser:
        return FakeUser(cluster.lifetime)

    async def ask(user: FakeUser) -> str:
        asked.append(user.lifetime)
        if len(asked) <= 10:
            raise RbdfsError("blocklisted", errno.ESHUTDOWN)
        return "answer"

    answers: list[str] = []

    async def by_one() -> None:
        answers.append(await by_the_newest(current, ask))

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(by_one)
    assert answers == ["answer"] * 10
    assert trio.current_time() == began + 0.5
    assert len(cluster.attempts) == 1, "they have shared it"
    assert len(set(asked)) == 2


@with_a_clock
async def test_a_question_that_is_refused_while_no_attempt_is_due_fails_at_once() -> None:
    cluster = FakeConnection(failures=100)
    cluster.seconds = 0.5
    began = trio.current_time()
    assert not await cluster.lifetime.is_over_after(errno.ESHUTDOWN)
    assert trio.current_time() == began + 0.5
    for _ in range(100):
        assert not await cluster.lifetime.is_over_after(errno.ESHUTDOWN)
    assert trio.current_time() == began + 0.5
    assert not await cluster.lifetime.is_over_after(errno.EIO)


@with_a_clock
async def test_a_question_that_hangs_by_a_replaced_connection_is_asked_again_by_the_new_one() -> None:
    cluster = FakeConnection()
    old = cluster.lifetime

    async def current() -> FakeUser:
        return FakeUser(cluster.lifetime)

    async def ask(user: FakeUser) -> str:
        if user.lifetime is old:
            await trio.sleep_forever()
        return "answer"

    old.note(-errno.ESHUTDOWN)
    assert await by_the_newest(current, ask) == "answer"


@with_a_clock
async def test_a_connection_that_is_replaced_again_and_again_ends_in_an_error() -> None:
    cluster = FakeConnection()
    asked = 0

    async def current() -> FakeUser:
        return FakeUser(cluster.lifetime)

    async def ask(_: FakeUser) -> str:
        nonlocal asked
        asked += 1
        raise RbdfsError("blocklisted", errno.ESHUTDOWN)

    with pytest.raises(RbdfsError, match="blocklisted"):
        await by_the_newest(current, ask)
    assert asked == ATTEMPTS


@with_a_clock
async def test_a_connection_is_unused_when_it_is_over_and_all_have_let_go_of_it() -> None:
    lifetime = FakeConnection().lifetime
    lifetime.hold()
    lifetime.hold()
    lifetime.release()
    ended: list[str] = []
    lifetime.follow(lambda: ended.append("told"))
    with trio.move_on_after(1) as waiting:
        await lifetime.unused()
    assert waiting.cancelled_caught
    lifetime.end()
    assert ended == ["told"]
    with trio.move_on_after(1) as waiting:
        await lifetime.unused()
    assert waiting.cancelled_caught
    lifetime.release()
    await lifetime.unused()
    lifetime.follow(lambda: ended.append("late"))
    assert ended == ["told", "late"]


@with_a_clock_and_log
async def test_no_exception_of_an_attempt_ends_the_mount(caplog: pytest.LogCaptureFixture) -> None:
    cluster = FakeConnection()
    cluster.fault = ZeroDivisionError("nobody expects this")
    assert not await cluster.lifetime.is_over_after(errno.ESHUTDOWN)
    assert "ZeroDivisionError" in caplog.text
    cluster.fault = None
    assert await cluster.lifetime.is_over_after(errno.ESHUTDOWN)


@with_a_clock
async def test_after_the_end_nothing_is_tried_and_nobody_waits() -> None:
    cluster = FakeConnection(failures=100)
    cluster.lifetime.note(-errno.ESHUTDOWN)
    await trio.sleep(5)
    await cluster.recovery.aclose()
    attempts = len(cluster.attempts)
    assert not await cluster.lifetime.is_over_after(errno.ESHUTDOWN)
    await trio.sleep(1000)
    assert len(cluster.attempts) == attempts


class FakeUser:
    """What belongs to a connection."""

    def __init__(self, lifetime: Lifetime) -> None:
        self.lifetime = lifetime


# Whether a connection works.


class FakeCluster:
    """Pools that are readable, refused, or silent."""

    def __init__(self, **pools: str) -> None:
        self.pools = {Pool(number, name): state for number, (name, state) in enumerate(pools.items())}
        self.is_silent = False
        self.hanging = 0
        self.probe = Probe(self.list_pools, self.may_read)

    async def list_pools(self) -> list[Pool]:
        """As the monitors."""
        await self.answered(is_silent=self.is_silent)
        return list(self.pools)

    async def may_read(self, pool: Pool) -> bool:
        """As an OSD."""
        state = self.pools[pool]
        await self.answered(is_silent=state == "silent")
        if state == "barred":
            raise RbdfsError("blocklisted", errno.ESHUTDOWN)
        return state == "readable"

    async def answered(self, *, is_silent: bool) -> None:
        """Or never."""
        await trio.lowlevel.checkpoint()
        if is_silent:
            self.hanging += 1
            await trio.sleep_forever()


@pytest.mark.parametrize(
    ("pools", "why"),
    [
        ({"a": "readable"}, None),
        ({"a": "refused", "b": "readable", "c": "silent"}, None),
        ({}, None),
        ({"a": "refused"}, errno.EACCES),
        ({"a": "barred", "b": "barred"}, errno.ESHUTDOWN),
        ({"a": "silent"}, errno.ETIMEDOUT),
    ],
)
def test_a_connection_works_if_something_may_be_read_by_it(pools: dict[str, str], why: int | None) -> None:
    async def test() -> None:
        reason = await FakeCluster(**pools).probe.why_not()
        assert (reason.errno if reason else None) == why

    with_a_clock(test)()


@with_a_clock
async def test_a_probe_takes_no_longer_than_it_says_and_what_hangs_is_not_asked_again() -> None:
    cluster = FakeCluster(a="silent", b="silent", c="readable")
    for _ in range(20):
        assert await cluster.probe.why_not() is None
    assert cluster.hanging == 2
    cluster.is_silent = True
    began = trio.current_time()
    for _ in range(20):
        reason = await cluster.probe.why_not()
        assert reason is not None
        assert reason.errno == errno.ETIMEDOUT
    assert trio.current_time() - began == 20 * PROBE_SECONDS
    assert cluster.hanging == 3


@with_a_clock_and_log
async def test_no_exception_of_a_probe_ends_the_mount(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(*_: object) -> Any:
        raise ZeroDivisionError("nobody expects this")

    async def one_pool() -> list[Pool]:
        return [Pool(1, "rbd")]

    for probe in (Probe(fail, fail), Probe(one_pool, fail)):
        assert await probe.why_not() is not None
    assert caplog.text.count("Traceback") == 2
