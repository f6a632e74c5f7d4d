"""However many requests fail, a trouble is a handful of lines in the log, and one says when it is over."""

import errno
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import trio
import trio.testing

from rbdfs.errors import NOTICE, ReadError
from rbdfs.fuse.trouble_log import TELL_SECONDS, TroubleLog
from rbdfs.fuse.troubles import REPEAT_SECONDS, SETTLE_SECONDS, Troubles
from rbdfs.spec import ImageSpec
from tests.cluster import MIB, READ_ONLY_CAPS, Ceph, Mount, random_bytes, wait_until

Mounts = Callable[..., Mount]
READS = 10_000
FILE = 7
VM1 = ImageSpec("rbd", "vm1")


def lines(mount: Mount) -> list[str]:
    """What the log has of troubles."""
    return [line for line in mount.log.splitlines() if " rbdfs.fuse.trouble_log: " in line]


def test_ten_thousand_reads_of_a_removed_image_are_a_handful_of_lines(ceph: Ceph, mounts: Mounts) -> None:
    name = ceph.unique("removed")
    ceph.make_image(name, random_bytes(4 * MIB))
    mount = mounts("--direct-io", *ceph.credentials(READ_ONLY_CAPS))  # its key may not watch, so the image can go
    mount.expect("ERROR")
    file = os.open(mount.image(name), os.O_RDONLY)
    try:
        assert os.pread(file, MIB, 0) == random_bytes(4 * MIB)[:MIB]
        ceph.remove_image(name)

        def fails(number: int) -> bool:
            try:
                os.pread(file, 4096, number % 1024 * 4096)
            except OSError as error:
                return error.errno == errno.EIO
            return False

        wait_until(lambda: fails(0))
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(fails, range(READS)))
    finally:
        with pytest.raises(OSError, match="Input/output"):
            os.close(file)
    assert len(lines(mount)) <= 2
    assert f"rbd/{name}" in lines(mount)[0]


def test_reads_that_no_osd_answers_are_one_line_in_the_log_and_their_end_is_another(ceph: Ceph, mounts: Mounts) -> None:
    name = ceph.unique("silent")
    content = random_bytes(16 * MIB)
    ceph.make_image(name, content)
    mount = mounts("--osd-timeout", "5", "--direct-io", "--cache-size", "0", module="tests.patient_mount")
    mount.expect("ERROR", "WARNING")
    with mount.image(name).open("rb", buffering=0) as file:
        descriptor = file.fileno()

        def fails(number: int) -> bool:
            try:
                return os.pread(descriptor, 4096, number * 4096) != content[number * 4096 :][:4096]
            except TimeoutError:
                return True

        assert not fails(1)
        ceph.devcluster.kill_daemon("osd.0")
        try:
            with ThreadPoolExecutor(100) as threads:
                assert all(threads.map(fails, range(200)))
            assert len([line for line in lines(mount) if "cannot read rbd/" in line]) == 1
        finally:
            ceph.devcluster.start_daemon("osd.0")
        wait_until(lambda: not any(fails(number) for number in range(0, 4096, 512)), 150)
        wait_until(lambda: " over after " in mount.log, 60)
    over = [line for line in lines(mount) if "cannot read rbd/" in line and " over " in line]
    assert re.search(rf" NOTICE .*: over after \d+ s and \d\d\d errors: cannot read rbd/{name} at ", over[0])


def test_ten_thousand_errors_with_a_clock(caplog: pytest.LogCaptureFixture) -> None:
    told = TroubleLog(Troubles(), {FILE: VM1}.get)

    async def fail_for_two_minutes_and_work_again() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(told.tell)
            for number in range(READS):
                told.failed(FILE, "read", ReadError(f"cannot read rbd/vm1 at {number}: timed out"))
                await trio.sleep(2 * REPEAT_SECONDS / READS)
            assert told.are_open
            told.worked(FILE, "read")
            await trio.sleep(SETTLE_SECONDS + TELL_SECONDS)
            assert not told.are_open
            nursery.cancel_scope.cancel()

    with caplog.at_level(logging.INFO):
        trio.run(fail_for_two_minutes_and_work_again, clock=trio.testing.MockClock(autojump_threshold=0))
    first, *more, over = caplog.records
    assert (first.levelname, first.getMessage()) == ("ERROR", "cannot read rbd/vm1 at 0: timed out")
    assert 1 <= len(more) <= 2
    assert all(re.match(r"[\d,]+ more in the last 6\d s: cannot read rbd/vm1 at ", each.getMessage()) for each in more)
    assert over.levelno == NOTICE
    assert over.getMessage() == "over after 120 s and 10,000 errors: cannot read rbd/vm1 at 0: timed out"
    assert {vars(record)["image"] for record in caplog.records} == {VM1}


def test_an_unexpected_error_has_its_traceback_once(caplog: pytest.LogCaptureFixture) -> None:
    told = TroubleLog(Troubles(), {FILE: VM1}.get)

    async def fail() -> None:
        told.failed(FILE, "read", ReadError("cannot read rbd/vm1 at 0: timed out"))
        for _ in range(READS):
            told.failed(FILE, "getattr", ZeroDivisionError("nobody expects this"))

    trio.run(fail)
    expected, unexpected = caplog.records
    assert expected.exc_info is None
    assert unexpected.exc_info is not None
    assert isinstance(unexpected.exc_info[1], ZeroDivisionError)
