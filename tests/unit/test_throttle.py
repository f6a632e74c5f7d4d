"""What may be in flight, and who goes first."""

from rbdfs.image.throttle import Throttle, Total


class Work:
    """Notes the order in which it is started."""

    def __init__(self, max_ops: int, max_bytes: int) -> None:
        self.throttle = Throttle(max_ops, max_bytes)
        self.started: list[str] = []

    def submit(self, name: str, nbytes: int = 1, *, urgent: bool = False) -> None:
        self.throttle.submit(name, nbytes, self.started.append, urgent=urgent)


def test_what_fits_starts_at_once_and_the_rest_as_others_end() -> None:
    work = Work(max_ops=2, max_bytes=100)
    for name in "abc":
        work.submit(name)
    assert work.started == ["a", "b"]
    assert work.throttle.queued == 1
    work.throttle.done(1)
    assert work.started == ["a", "b", "c"]
    assert work.throttle.queued == 0


def test_bytes_are_limited_as_well() -> None:
    work = Work(max_ops=10, max_bytes=100)
    work.submit("a", 60)
    work.submit("b", 60)
    assert work.started == ["a"]
    assert work.throttle.bytes == 60


def test_more_than_the_limit_at_once_starts_alone() -> None:
    work = Work(max_ops=10, max_bytes=100)
    work.submit("huge", 1000)
    work.submit("small", 1)
    assert work.started == ["huge"]
    work.throttle.done(1000)
    assert work.started == ["huge", "small"]


def test_reads_that_somebody_waits_for_go_before_readahead() -> None:
    work = Work(max_ops=1, max_bytes=100)
    work.submit("first")
    work.submit("ahead")
    work.submit("demand", urgent=True)
    work.throttle.done(1)
    assert work.started == ["first", "demand"]


def test_what_is_hurried_is_waited_for() -> None:
    work = Work(max_ops=1, max_bytes=100)
    for name in ("first", "ahead", "further"):
        work.submit(name)
    work.throttle.promote("further")
    work.throttle.done(1)
    assert work.started == ["first", "further"]


def test_what_is_withdrawn_is_never_started() -> None:
    work = Work(max_ops=1, max_bytes=100)
    work.submit("first")
    work.submit("ahead")
    assert work.throttle.cancel("ahead")
    assert not work.throttle.cancel("first")
    work.throttle.done(1)
    assert work.started == ["first"]


def test_a_throttle_that_is_full_leaves_others_their_room() -> None:
    total = Total(max_bytes=150)
    dead, alive = Throttle(2, 100, total), Throttle(2, 100, total)
    started: list[str] = []
    for name in ("dead 1", "dead 2", "dead 3"):
        dead.submit(name, 50, started.append, urgent=True)
    for name in ("alive 1", "alive 2"):
        alive.submit(name, 50, started.append, urgent=True)
    assert started == ["dead 1", "dead 2", "alive 1"]
    assert total.bytes == 150
    alive.done(50)
    assert started[3:] == ["alive 2"]


def test_a_throttle_with_nothing_in_flight_starts_one_whatever_others_have() -> None:
    total = Total(max_bytes=100)
    dead, alive = Throttle(9, 100, total), Throttle(9, 100, total)
    started: list[str] = []
    dead.submit("dead", 100, started.append, urgent=True)
    for name in ("alive 1", "alive 2"):
        alive.submit(name, 50, started.append, urgent=True)
    assert started == ["dead", "alive 1"]
    alive.done(50)
    assert started == ["dead", "alive 1", "alive 2"]
