"""What a read in doubt waits for while others write, shrink or remove: with a fake header, and a clock that jumps."""

import errno
from functools import partial

import pytest
import rbd
import trio

from rbdfs.catalog import ImageRef, Namespace, Pool
from rbdfs.ceph.image.ceph_image import REVALIDATE_SECONDS, CephImage
from rbdfs.ceph.image.image_state import Locker
from rbdfs.ceph.image.revalidate import CHECK_AGAIN_SECONDS, NEW_WRITER_SECONDS, Checked, Revalidator
from rbdfs.ceph.metadata.header import Parent
from rbdfs.errors import BeyondEndError, RbdfsError, ReadError, StaleError
from tests.fake_image import NOBODY, ROUND_TRIP, SIZE, FakeHeader, Site
from tests.in_trio import read, with_a_clock

AT_MOST = CHECK_AGAIN_SECONDS + 2 * ROUND_TRIP
"""Seconds, from what others do until a check that is asked again and again has seen it."""
VM, OTHER = Locker(4711, "auto 1"), Locker(4712, "auto 2")
Result = int | RbdfsError


class Revalidated:
    """A revalidator of that header, and what those were told who asked it."""

    def __init__(self, header: FakeHeader) -> None:
        self.stales = 0
        self.revalidator = Revalidator(header.check, header.writers, self._on_stale)
        self.told: dict[str, Result] = {}
        self.at: dict[str, float] = {}

    def _on_stale(self) -> None:
        self.stales += 1

    def ask(self, *names: str) -> None:
        """Several, in order."""
        for name in names:
            self.revalidator.ask(partial(self._tell, name))

    def _tell(self, name: str, result: Result) -> None:
        assert name not in self.told, "told twice"
        self.told[name], self.at[name] = result, trio.current_time()

    async def seconds_of_one(self) -> float:
        """How long one waits who asks now; it must be told the size."""
        began = trio.current_time()
        assert await self.revalidator.stable_size() == SIZE
        return trio.current_time() - began


@with_a_clock
async def test_all_callers_that_ask_during_a_revalidation_share_the_next() -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    revalidated.ask("first", "at once")
    await trio.sleep(ROUND_TRIP / 2)
    revalidated.ask("later", "later, too")
    assert revalidated.told == {}
    await trio.sleep(1)
    assert len(header.asked) == 2
    assert list(revalidated.told.values()) == [SIZE] * 4
    assert (
        revalidated.at["first"] == revalidated.at["at once"] < revalidated.at["later"] == revalidated.at["later, too"]
    )


@with_a_clock
async def test_a_caller_learns_what_was_done_before_it_asked_even_if_the_running_revalidation_missed_it() -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    revalidated.ask("before")
    await trio.sleep(ROUND_TRIP / 2)
    header.size = SIZE // 2
    revalidated.ask("after")
    await trio.sleep(1)
    assert revalidated.told == {"before": SIZE, "after": SIZE // 2}


@with_a_clock
async def test_a_caller_that_asks_from_its_callback_gets_a_revalidation_of_its_own() -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    revalidated.revalidator.ask(lambda _: revalidated.ask("again"))
    await trio.sleep(1)
    assert revalidated.told == {"again": SIZE}
    assert len(header.asked) == 2


@with_a_clock
async def test_of_two_in_a_row_each_asks_the_cluster() -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    for number in range(1, 4):
        assert await revalidated.seconds_of_one() == pytest.approx(ROUND_TRIP)
        assert len(header.asked) == number
        await trio.sleep(number)


@with_a_clock
async def test_a_client_that_wrote_before_our_open_is_not_waited_for() -> None:
    revalidated = Revalidated(FakeHeader(VM, OTHER))
    assert await revalidated.seconds_of_one() == pytest.approx(ROUND_TRIP)


@with_a_clock
async def test_a_client_that_began_to_write_after_our_open_is_waited_for_once() -> None:
    header = FakeHeader(VM)
    revalidated = Revalidated(header)
    header.writers = frozenset([VM, OTHER])
    assert NEW_WRITER_SECONDS < await revalidated.seconds_of_one() <= NEW_WRITER_SECONDS + 2 * AT_MOST
    assert await revalidated.seconds_of_one() == pytest.approx(ROUND_TRIP)


@with_a_clock
async def test_a_writer_that_began_during_a_slow_question_is_waited_for_from_its_answer_on() -> None:
    round_trips = iter([2 * NEW_WRITER_SECONDS])

    async def check() -> Checked:
        """The first answer is slow, and tells of a client that has begun to write just before it."""
        await trio.sleep(next(round_trips, ROUND_TRIP))
        return Checked(SIZE, frozenset([VM]))

    began = trio.current_time()
    assert await Revalidator(check, NOBODY, lambda: None).stable_size() == SIZE
    waited = trio.current_time() - began
    assert 3 * NEW_WRITER_SECONDS < waited <= 3 * NEW_WRITER_SECONDS + 2 * AT_MOST


@with_a_clock
async def test_each_new_writer_has_its_own_grace_period() -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    header.writers = frozenset([VM])
    revalidated.ask("reader")
    await trio.sleep(3)
    header.writers = frozenset([VM, OTHER])
    await trio.sleep(NEW_WRITER_SECONDS)
    assert revalidated.told == {}
    await trio.sleep(2 * AT_MOST)
    assert revalidated.told == {"reader": SIZE}


@with_a_clock
async def test_a_writer_that_is_gone_is_not_waited_for_any_more() -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    header.writers = frozenset([VM])
    revalidated.ask("reader")
    await trio.sleep(1)
    assert revalidated.told == {}
    header.writers = NOBODY
    await trio.sleep(AT_MOST)
    assert revalidated.told == {"reader": SIZE}


@with_a_clock
async def test_a_writer_that_comes_back_is_new() -> None:
    header = FakeHeader(VM)
    revalidated = Revalidated(header)
    header.writers = NOBODY
    assert await revalidated.seconds_of_one() == pytest.approx(ROUND_TRIP)
    header.writers = frozenset([VM])
    assert await revalidated.seconds_of_one() > NEW_WRITER_SECONDS


@with_a_clock
async def test_a_writer_that_was_waited_for_left_and_comes_back_is_new() -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    header.writers = frozenset([VM])
    revalidated.ask("reader")
    await trio.sleep(1)
    header.writers = NOBODY
    await trio.sleep(2 * NEW_WRITER_SECONDS)
    assert revalidated.told == {"reader": SIZE}
    header.writers = frozenset([VM])
    assert await revalidated.seconds_of_one() > NEW_WRITER_SECONDS


@with_a_clock
async def test_the_grace_period_of_a_writer_that_leaves_and_comes_back_starts_again() -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    header.writers = frozenset([VM, OTHER])
    revalidated.ask("reader")
    await trio.sleep(4)
    header.writers = frozenset([VM])
    await trio.sleep(AT_MOST)
    header.writers = frozenset([VM, OTHER])
    await trio.sleep(4)
    assert revalidated.told == {}
    await trio.sleep(1 + 2 * AT_MOST)
    assert revalidated.told == {"reader": SIZE}


@with_a_clock
async def test_an_image_that_is_shrunk_while_its_writer_is_waited_for_has_its_new_size_at_once() -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    header.writers = frozenset([VM])
    revalidated.ask("reader")
    await trio.sleep(1)
    header.size = SIZE // 2
    await trio.sleep(AT_MOST)
    assert revalidated.told == {"reader": SIZE // 2}


@with_a_clock
async def test_an_image_that_is_grown_while_its_writer_is_waited_for_may_still_be_shrunk() -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    header.writers = frozenset([VM])
    revalidated.ask("reader")
    await trio.sleep(1)
    header.size = 2 * SIZE
    await trio.sleep(2)
    assert revalidated.told == {}
    header.size = SIZE + 1  # less than a moment ago
    await trio.sleep(AT_MOST)
    assert revalidated.told == {"reader": SIZE + 1}


@with_a_clock
async def test_a_writer_is_waited_for_no_longer_because_a_question_in_between_has_failed() -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    header.writers = frozenset([VM])
    revalidated.ask("first")
    await trio.sleep(2)
    header.error = RbdfsError("no answer", errno.ETIMEDOUT)
    await trio.sleep(AT_MOST)
    assert revalidated.told == {"first": header.error}
    header.error = None
    assert await revalidated.seconds_of_one() <= NEW_WRITER_SECONDS - 2 + AT_MOST


@with_a_clock
async def test_a_question_that_fails_is_an_error_for_all_waiting_callers_and_for_no_later_one() -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    failure = header.error = RbdfsError("no answer", errno.ETIMEDOUT)
    revalidated.ask("one", "two")
    await trio.sleep(ROUND_TRIP / 2)
    header.error = None
    revalidated.ask("three")
    await trio.sleep(1)
    assert revalidated.told == {"one": failure, "two": failure, "three": SIZE}
    assert (revalidated.revalidator.stale, revalidated.stales) == (None, 0)


@with_a_clock
async def test_a_removed_image_is_marked_stale_before_the_waiting_callers_get_their_error() -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    removed = header.error = StaleError("rbd/vm1 was removed while it was open")
    known: list[object] = []
    revalidated.revalidator.ask(lambda _: known.append((revalidated.revalidator.stale, revalidated.stales)))
    revalidated.ask("one", "two")
    await trio.sleep(1)
    assert revalidated.told == {"one": removed, "two": removed}
    assert known == [(removed, 1)]
    with pytest.raises(StaleError):
        await revalidated.revalidator.stable_size()


@with_a_clock
async def test_an_image_that_is_removed_while_its_writer_is_waited_for_is_stale_at_once() -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    header.writers = frozenset([VM])
    revalidated.ask("reader")
    await trio.sleep(1)
    removed = header.error = StaleError("rbd/vm1 was removed while it was open")
    await trio.sleep(AT_MOST)
    assert revalidated.told == {"reader": removed}


@with_a_clock
async def test_an_error_that_nobody_expects_ends_neither_the_loop_nor_the_next_revalidation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    header.error = ZeroDivisionError("nobody expects this")
    with pytest.raises(RbdfsError, match="unexpected ZeroDivisionError: nobody expects this"):
        await revalidated.revalidator.stable_size()
    assert "Traceback" in caplog.text
    header.error = None
    assert await revalidated.seconds_of_one() == pytest.approx(ROUND_TRIP)


@with_a_clock
async def test_a_callback_with_a_fault_in_it_keeps_nobody_else_waiting(caplog: pytest.LogCaptureFixture) -> None:
    def explode(_: Result) -> None:
        raise ZeroDivisionError("nobody expects this")

    revalidated = Revalidated(FakeHeader())
    revalidated.ask("one")
    revalidated.revalidator.ask(explode)
    revalidated.ask("two")
    await trio.sleep(1)
    assert revalidated.told == {"one": SIZE, "two": SIZE}
    assert "ZeroDivisionError" in caplog.text
    assert await revalidated.seconds_of_one() == pytest.approx(ROUND_TRIP)


@with_a_clock
async def test_a_caller_that_gives_up_leaves_the_others_their_answer() -> None:
    header = FakeHeader()
    revalidated = Revalidated(header)
    sizes: list[int] = []

    async def wait() -> None:
        sizes.append(await revalidated.revalidator.stable_size())

    async with trio.open_nursery() as nursery:
        with trio.move_on_after(ROUND_TRIP / 2) as impatient:
            nursery.start_soon(wait)
            await revalidated.revalidator.stable_size()
        assert impatient.cancelled_caught
        nursery.start_soon(wait)
    assert sizes == [SIZE, SIZE]
    assert len(header.asked) == 2


# What an open image makes of it


PARENT = Parent(ImageRef(Namespace(Pool(1, "rbd")), "parent", 1), SIZE)
DATA = b"\x01" * SIZE
ZEROS = bytes(SIZE)


async def read_for(image: CephImage, offset: int = 0, length: int = 4096) -> tuple[bytes, float]:
    """What is read, and how many seconds that took."""
    began = trio.current_time()
    return bytes(await read(image, offset, length)), round(trio.current_time() - began, 6)


@with_a_clock
async def test_bytes_that_nothing_removed_can_have_left_wait_for_nothing() -> None:
    site = Site(DATA)
    image = await site.opened()
    site.header.writers = frozenset([VM])
    assert await read_for(image) == (DATA[:4096], 0)
    assert site.header.asked == []


@pytest.mark.parametrize("features", [rbd.RBD_FEATURE_EXCLUSIVE_LOCK, 0], ids=["locks", "no locks"])
@with_a_clock
async def test_zeros_wait_for_one_round_trip_or_until_a_new_writer_cannot_be_shrinking_the_image(features: int) -> None:
    site = Site(ZEROS, features)
    image = await site.opened()
    assert await read_for(image) == (bytes(4096), ROUND_TRIP)
    site.header.writers = frozenset([VM])
    data, seconds = await read_for(image)
    assert data == bytes(4096)
    assert NEW_WRITER_SECONDS < seconds < NEW_WRITER_SECONDS + 2 * AT_MOST
    assert await read_for(image) == (bytes(4096), ROUND_TRIP)
    assert [handle.uses for handle in site.handles] == [0]


@pytest.mark.parametrize("features", [rbd.RBD_FEATURE_EXCLUSIVE_LOCK, 0], ids=["locks", "no locks"])
@with_a_clock
async def test_zeros_do_not_wait_for_a_client_that_had_the_image_open_before(features: int) -> None:
    site = Site(ZEROS, features)
    site.header.writers = frozenset([VM])
    image = await site.opened()
    assert await read_for(image) == (bytes(4096), ROUND_TRIP)


@pytest.mark.parametrize("place", [4095, 65535], ids=["the last byte", "the last of an object in the middle"])
@with_a_clock
async def test_a_zero_where_an_object_may_have_been_cut_is_in_doubt(place: int) -> None:
    site = Site(DATA[:place] + b"\0" + DATA[place + 1 :])
    image = await site.opened()
    length = 4096 if place == 4095 else 3 << 16
    assert await read_for(image, 0, length) == (site.content[:length], ROUND_TRIP)


@pytest.mark.parametrize("is_snapshot", [True, False], ids=["snapshot", "clone"])
@with_a_clock
async def test_all_bytes_of_a_snapshot_and_of_a_clone_are_in_doubt(is_snapshot: bool) -> None:
    site = Site(DATA, is_snapshot=is_snapshot)
    site.header.parent = None if is_snapshot else PARENT
    image = await site.opened()
    assert await read_for(image) == (DATA[:4096], ROUND_TRIP)


@with_a_clock
async def test_zeros_that_arrive_during_a_revalidation_wait_for_the_next_which_finds_the_image_gone() -> None:
    site = Site(ZEROS)
    image = await site.opened()
    image.revalidate_soon()
    await trio.sleep(ROUND_TRIP / 2)
    site.header.error = RbdfsError("no such file", errno.ENOENT)
    results: list[object] = []
    for offset in (0, 8192):
        image.start_read(offset, 4096, results.append)
    await trio.sleep(1)
    assert [type(result) for result in results] == [StaleError] * 2
    assert len(site.header.asked) == 2
    assert "rbd/vm1 was removed while it was open" in str(image.stale)
    assert [handle.uses for handle in site.handles] == [0]


@with_a_clock
async def test_zeros_beyond_the_end_of_an_image_that_was_shrunk_are_beyond_its_end_and_those_before_it_are_zeros() -> (
    None
):
    site = Site(ZEROS)
    image = await site.opened()
    site.header.size = 8192
    assert await read_for(image, 4096) == (bytes(4096), ROUND_TRIP)
    with pytest.raises(BeyondEndError):
        await read(image, 4097, 4096)


@with_a_clock
async def test_zeros_of_which_the_cluster_does_not_say_what_they_are_are_an_error_once() -> None:
    site = Site(ZEROS)
    image = await site.opened()
    site.header.error = RbdfsError("no answer", errno.ETIMEDOUT)
    with pytest.raises(ReadError, match="cannot tell zeros from what was removed: no answer") as raised:
        await read(image, 0, 4096)
    assert raised.value.errno == errno.ETIMEDOUT
    site.header.error = None
    assert await read_for(image) == (bytes(4096), ROUND_TRIP)
    assert image.stale is None


@with_a_clock
async def test_a_read_of_a_clone_is_repeated_if_the_clone_was_flattened_during_it() -> None:
    site = Site(DATA)
    site.header.parent = PARENT
    image = await site.opened()
    site.header.parent, site.content = None, ZEROS
    assert (await read_for(image))[0] == bytes(4096)
    assert len(site.handles) == 2
    assert [handle.uses for handle in site.handles] == [0, 0]


@with_a_clock
async def test_a_revalidation_is_due_a_second_after_the_open_and_after_each_that_has_ended() -> None:
    site = Site(DATA)
    image = await site.opened()
    for number in range(1, 4):
        await trio.sleep(REVALIDATE_SECONDS - ROUND_TRIP / 2)
        assert not image.revalidate_due
        await trio.sleep(ROUND_TRIP)
        assert image.revalidate_due
        image.revalidate_soon()
        assert not image.revalidate_due
        await trio.sleep(ROUND_TRIP)
        assert len(site.header.asked) == number


@with_a_clock
async def test_a_revalidation_that_fails_is_due_again_as_any_other() -> None:
    site = Site(DATA)
    image = await site.opened()
    site.header.error = RbdfsError("no answer", errno.ETIMEDOUT)
    for number in range(1, 4):
        await trio.sleep(REVALIDATE_SECONDS + ROUND_TRIP)
        assert image.revalidate_due
        image.revalidate_soon()
        await trio.sleep(2 * ROUND_TRIP)
        assert len(site.header.asked) == number
    assert [handle.uses for handle in site.handles] == [0]


@with_a_clock
async def test_every_reader_of_an_image_that_is_gone_gets_an_error_at_once_and_nobody_is_asked() -> None:
    site = Site(DATA)
    image = await site.opened()
    site.header.error = RbdfsError("no such file", errno.ENOENT)
    image.revalidate_soon()
    await trio.sleep(2 * ROUND_TRIP)
    asked = len(site.header.asked)
    for _ in range(3):
        assert image.revalidate_due
        with pytest.raises(StaleError, match="rbd/vm1 was removed while it was open"):
            image.revalidate_soon()
        await trio.sleep(REVALIDATE_SECONDS)
    assert len(site.header.asked) == asked
