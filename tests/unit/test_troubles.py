"""One line for each new trouble and one when it is over: which errors are told, and which are only counted."""

import errno
import logging

from hypothesis import given
from hypothesis import strategies as st

from rbdfs.errors import NOTICE
from rbdfs.fuse.troubles import FILES_MAX, REPEAT_SECONDS, SETTLE_SECONDS, SILENT_SECONDS, Line, Troubles

TIMEOUT = errno.ETIMEDOUT
VM1, VM2 = 101, 102


def test_the_first_error_is_logged_at_once_and_the_next_thousands_are_counted() -> None:
    troubles = Troubles()
    assert troubles.fail(errno.EIO, VM1, "read", "cannot read vm1 at 0", 0.0) == "cannot read vm1 at 0"
    assert [troubles.fail(errno.EIO, VM1, "read", f"at {n}", n / 1000) for n in range(1, 10_000)] == [None] * 9_999
    assert troubles.due(10.0) == []
    assert troubles.summary() == "at 9999 (10,000 errors)"


def test_a_trouble_that_goes_on_is_logged_once_a_minute() -> None:
    troubles = Troubles()
    lines = []
    for second in range(1000):
        troubles.fail(errno.EIO, VM1, "read", f"at {second}", float(second))
        lines += troubles.due(second + 0.5)
    assert len(lines) == 1000 // REPEAT_SECONDS
    assert lines[0] == Line(logging.ERROR, "60 more in the last 60 s: at 60", VM1)


def test_it_is_over_when_what_has_failed_works_again_and_the_log_says_how_long_it_took() -> None:
    troubles = Troubles()
    for second in range(3):
        troubles.fail(errno.EIO, VM1, "read", "cannot read vm1", float(second))
    troubles.work(VM1, "read", 5.0)
    troubles.work(VM1, "read", 9.0)
    assert troubles.due(2.0 + SETTLE_SECONDS - 0.1) == []
    told = [Line(NOTICE, "over after 5 s and 3 errors: cannot read vm1", VM1)]
    assert troubles.due(2.0 + SETTLE_SECONDS) == told
    assert not troubles.are_open
    assert troubles.summary() == ""
    assert troubles.fail(errno.EIO, VM1, "read", "again", 100.0) == "again"


def test_another_file_or_another_operation_that_works_does_not_end_it() -> None:
    troubles = Troubles()
    troubles.fail(errno.EIO, VM1, "read", "cannot read vm1", 0.0)
    troubles.fail(errno.EIO, VM1, "open", "cannot open vm1", 1.0)
    troubles.work(VM2, "read", 2.0)
    troubles.work(VM1, "getattr", 2.0)
    troubles.work(VM1, "open", 2.0)
    assert troubles.due(50.0) == []
    troubles.work(VM1, "read", 50.0)
    assert [line.text for line in troubles.due(51.0)] == ["over after 50 s and 2 errors: cannot read vm1"]


def test_an_error_after_a_success_means_that_it_goes_on() -> None:
    troubles = Troubles()
    lines = []
    for second in range(0, 600, 2):  # one placement group is dead, the others answer
        if new := troubles.fail(errno.EIO, VM1, "read", "cannot read vm1", float(second)):
            lines.append(new)
        troubles.work(VM1, "read", second + 1.0)
        lines += [line.text for line in troubles.due(second + 1.5)]
    assert len(lines) == 1 + 600 // REPEAT_SECONDS - 1
    assert not any("over" in line for line in lines)


def test_what_timed_out_is_over_when_all_that_waited_can_have_ended() -> None:
    troubles = Troubles(osd_timeout=120.0)
    troubles.fail(TIMEOUT, VM1, "read", "cannot read vm1", 0.0)
    troubles.work(VM1, "read", 1.0)
    assert troubles.due(119.0 + SETTLE_SECONDS) == []
    assert len(troubles.due(120.0 + SETTLE_SECONDS)) == 1


def test_a_trouble_that_nobody_tries_again_is_let_go_of() -> None:
    troubles = Troubles()
    troubles.fail(errno.EIO, VM1, "read", "vm1 was removed", 0.0)
    assert troubles.due(SILENT_SECONDS - 1) == []
    told = [Line(NOTICE, "no error for 300 s, after 1 error: vm1 was removed", VM1)]
    assert troubles.due(SILENT_SECONDS) == told
    assert not troubles.are_open


def test_of_thousands_of_files_with_one_trouble_a_few_are_logged_and_the_others_counted() -> None:
    troubles = Troubles()
    files = range(1, 10_001)
    told = [text for inode in files if (text := troubles.fail(TIMEOUT, inode, "open", f"cannot open {inode}", 0.0))]
    last = f"cannot open {FILES_MAX + 1}; further files with this trouble are counted only"
    assert told == [f"cannot open {inode}" for inode in range(1, FILES_MAX + 1)] + [last]
    assert troubles.fail(errno.EIO, 1, "open", "another trouble", 0.0) == "another trouble"
    assert troubles.fail(TIMEOUT, 1, "open", "cannot open 1", 1.0) is None
    assert troubles.summary() == f"cannot open 1 (2 errors, and {FILES_MAX + 1} more troubles)"
    for inode in files:
        troubles.work(inode, "open", 50.0)
    ended = [line.text for line in troubles.due(60.0) if line.level == NOTICE]  # but for those that are counted only
    assert len(ended) == FILES_MAX + 1
    assert "over after 50 s and 2 errors: cannot open 1" in ended
    [others] = troubles.due(SILENT_SECONDS)
    assert others == Line(NOTICE, f"no error for 300 s, after 9,992 errors: cannot open {FILES_MAX + 1}", None)


@given(
    st.lists(
        st.tuples(st.sampled_from([errno.EIO, TIMEOUT]), st.integers(1, 30), st.booleans(), st.floats(0, 20)),
        max_size=300,
    )
)
def test_memory_and_lines_are_bounded_and_every_trouble_ends(events: list[tuple[int, int, bool, float]]) -> None:
    troubles = Troubles(osd_timeout=5.0)
    now, begun, ended = 0.0, 0, 0
    for kind, inode, works, seconds in events:
        now += seconds
        if works:
            troubles.work(inode, "read", now)
        else:
            begun += troubles.fail(kind, inode, "read", f"{inode}", now) is not None
        assert begun - ended <= 2 * (FILES_MAX + 1)
        ended += sum(line.level == NOTICE for line in troubles.due(now))
        assert troubles.are_open == bool(troubles.summary())
    long_after = now + SILENT_SECONDS + 5.0 + 1.0  # which is more than a rounding error
    ended += sum(line.level == NOTICE for line in troubles.due(long_after))
    assert ended == begun
    assert not troubles.are_open
