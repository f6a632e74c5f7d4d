"""What a read costs: Python calls from the kernel's request to the answer, without a task and without a coroutine.

All that takes part is real but librbd's C functions, the header's answers, and the kernel.
"""

import ctypes
import inspect
import os
import random
import struct
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import rbd
import trio
import trio.testing

import rbdfs
from rbdfs.catalog import ImageRef, Namespace, Pool
from rbdfs.ceph.bindings import librados, librbd
from rbdfs.ceph.bindings.aio import LibrbdImage, Portal
from rbdfs.ceph.bindings.read_op import ReadOperations, Reply, Request
from rbdfs.ceph.bindings.watch import Watch
from rbdfs.ceph.image.ceph_image import CephImage
from rbdfs.ceph.image.handle_cache import HandleCache
from rbdfs.ceph.image.image_state import HeaderClient
from rbdfs.fuse.device import Device
from rbdfs.image import open_image
from rbdfs.image.cache import ObjectCache
from rbdfs.image.open_images import OpenImages
from rbdfs.spec import ImageSpec
from tests.fake_kernel import Kernel, Op, reading, serving, settled
from tests.fake_recovery import lifetime

KIB, MIB = 1 << 10, 1 << 20
OBJECT_BYTES = 4 * MIB
IMAGE_BYTES = 1 << 30
PATTERN = bytes(random.Random(1).choices(range(1, 256), k=64 * KIB))
"""What the image repeats: no byte of it is in doubt."""

PACKAGE = f"{Path(rbdfs.__file__).parent}/"
IMAGE = ImageRef(Namespace(Pool(1, "rbd")), "abc")

HIT_CALLS_MAX = 8
MISS_CALLS_MAX = 14
"""From the device's `_receive` to the writev that answers, of a miss both ways together (ARCHITECTURE: Walks)."""

KEPT_MISS_CALLS_MAX = 18
"""A piece that stays is an object more, and is listed."""

PARTLY_CACHED_MISS_CALLS_MAX = 24
"""What the cache has of the object already is gone through."""


def content(offset: int, length: int) -> bytes:
    """A range of the image."""
    start = offset % len(PATTERN)
    return (PATTERN * (length // len(PATTERN) + 2))[start : start + length]


class StubLibrbd:
    """librbd's C functions over an image without holes. Its reads complete when `complete` says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put it in librbd's place."""
        self.aios = 0
        self._event = -1
        self._lengths: dict[int, int] = {}  # by completion
        self._in_flight: list[int] = []
        self._complete: list[int] = []
        numbers = {"stripe_unit": OBJECT_BYTES, "stripe_count": 1}
        functions: dict[str, Callable[..., int]] = {f"get_{name}": partial(put, numbers[name]) for name in numbers}
        functions |= {name: getattr(self, name) for name in vars(StubLibrbd) if name.startswith(("aio", "set", "poll"))}
        functions |= {"open_by_id_read_only": self.open, "stat": self.stat, "close": lambda *_: 0}
        functions |= {"aio_release": lambda *_: 0, "invalidate_cache": lambda _: 0}
        functions |= {
            "watchers_list": lambda image, _, count: put(0, image, count),
            "watchers_list_cleanup": lambda *_: 0,
        }
        for name, function in functions.items():
            monkeypatch.setattr(librbd, f"_rbd_{name}", function)

    def complete(self) -> None:
        """End all reads that are in flight."""
        if self._in_flight:
            self._complete += self._in_flight
            os.eventfd_write(self._event, len(self._in_flight))
            self._in_flight = []

    def open(self, _ioctx: object, _image_id: bytes, handle: Any, _options: None) -> int:
        """Any image."""
        return put(1, None, handle)

    def stat(self, _handle: int, stat: Any, _size: int) -> int:
        """What of it is used."""
        pointed_at(stat).size, pointed_at(stat).order = IMAGE_BYTES, OBJECT_BYTES.bit_length() - 1
        return 0

    def set_image_notification(self, _handle: int, event: int, _kind: int) -> int:
        """Where completions are counted."""
        self._event = event
        return 0

    def aio_create_completion(self, _argument: None, _callback: None, completion: Any) -> int:
        """A number that is no address."""
        return put(len(self._lengths) + 1, None, completion)

    def aio_read(self, _handle: int, offset: int, length: int, buffer: bytes, completion: int) -> int:
        """The bytes are there at once, the completion is not."""
        ctypes.memmove(ctypes.c_char_p(buffer), content(offset, length), length)
        self.aios += 1
        self._lengths[completion] = length
        self._in_flight.append(completion)
        return 0

    def poll_io_events(self, _handle: int, completions: Any, count: int) -> int:
        """What has ended."""
        found, self._complete = self._complete[:count], self._complete[count:]
        completions[: len(found)] = found
        return len(found)

    def aio_get_return_value(self, completion: int) -> int:
        """Each read was whole."""
        return self._lengths[completion]


def put(value: int, _handle: object, place: Any) -> int:
    """A C function that answers by a pointer."""
    pointed_at(place).value = value
    return 0


def pointed_at(place: Any) -> Any:
    """What ctypes's byref() was given."""
    return place._obj  # noqa: SLF001


class StubOperations:
    """What the image's header answers: there it is, with an exclusive lock that nobody holds."""

    ANSWERS: ClassVar = {b"get_info": struct.pack("<BBII", 1, 1, 4, 0), b"dir_get_name": b""}
    VALUES: ClassVar = {
        b"order": b"\x16",
        b"size": struct.pack("<Q", IMAGE_BYTES),
        b"features": struct.pack("<Q", rbd.RBD_FEATURE_EXCLUSIVE_LOCK),
    }

    async def operate(self, requests: Sequence[Request]) -> Sequence[Reply]:
        return [
            Reply(0, [(0, self.ANSWERS[call.method]) for call in each.calls], self.VALUES, version=1)
            for each in requests
        ]

    async def ask(self, request: Request) -> Reply:
        return (await self.operate((request,)))[0]


@dataclass
class Cost:
    """What was done between a request and its answer."""

    calls: list[str] = field(default_factory=list)
    """Functions of the package; a coroutine each time that it goes on."""
    coroutines: set[str] = field(default_factory=set)
    """Those among them."""
    tasks: int = 0
    """That began."""
    aios: int = 0
    """That were started."""


class Tasks(trio.abc.Instrument):
    """Counts the tasks that begin."""

    def __init__(self) -> None:
        self.count = 0

    def task_spawned(self, task: object) -> None:  # noqa: ARG002  (trio's)
        self.count += 1


@contextmanager
def costed() -> Iterator[Cost]:
    """Count in the block, from the device's first call to the writev that answers."""
    cost, tasks = Cost(), Tasks()
    is_under_way = False

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal is_under_way
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            is_under_way |= code is Device._receive.__code__  # noqa: SLF001  (where trio comes in)
            if is_under_way:
                cost.calls.append(code.co_qualname)
                if code.co_flags & inspect.CO_COROUTINE:
                    cost.coroutines.add(code.co_qualname)
        elif event == "c_call" and getattr(argument, "__name__", "") == "writev":
            is_under_way = False

    trio.lowlevel.add_instrument(tasks)
    sys.setprofile(profile)
    try:
        yield cost
    finally:
        sys.setprofile(None)
        trio.lowlevel.remove_instrument(tasks)
        cost.tasks = tasks.count


@dataclass
class Mount:
    """An open image behind a device."""

    kernel: Kernel
    librbd: StubLibrbd

    async def read(self, offset: int, length: int) -> Cost:
        """One READ, and what it cost."""
        aios = self.librbd.aios
        with costed() as cost:
            unique = self.kernel.ask(Op.READ, reading(offset, length))
            await settled()
            if unique not in self.kernel.answers:
                self.librbd.complete()
                await settled()
        cost.aios = self.librbd.aios - aios
        assert self.kernel.answers.pop(unique) == (0, content(offset, length))
        self.librbd.complete()
        await settled()
        return cost

    async def read_in_order(self, start: int, end: int) -> list[Cost]:
        """Reads of 128 KiB, as `cp` has them."""
        return [await self.read(offset, 128 * KIB) for offset in range(start, end, 128 * KIB)]

    async def read_objects(self, first: int, last: int) -> list[Cost]:
        """A read of 4 KiB in each of these objects, all of them far apart."""
        offsets = [number * OBJECT_BYTES + number % 1000 * 4 * KIB for number in range(first, last)]
        return [await self.read(offset, 4 * KIB) for offset in offsets]


async def no_map(_: ImageRef) -> None:
    """What is known of an image without an object map."""


class StubWatch:
    """A watch that nobody takes away."""

    @classmethod
    async def take(cls, *_: object) -> "StubWatch":
        """As `Watch.take`."""
        return cls()

    async def give_back(self) -> None:
        """As `Watch.give_back`."""


@asynccontextmanager
async def mounted(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mount]:
    """A HEAD, open with the handle 1. The time stands still: no read is slow, and nobody revalidates."""
    stub = StubLibrbd(monkeypatch)
    monkeypatch.setattr(open_image, "monotonic", lambda: 0.0)
    ioctx = cast(librados.Ioctx, SimpleNamespace(pointer=None, lifetime=lifetime(), lane=None))
    client = HeaderClient(cast(ReadOperations, StubOperations()), lambda _: ioctx, {1})
    portal, handles = Portal(), HandleCache(lambda _: ioctx, LibrbdImage)
    monkeypatch.setattr(Watch, "take", StubWatch.take)
    images = OpenImages(ObjectCache(256 * MIB, 64, 128 * MIB))

    async def open_backend() -> CephImage:
        return await CephImage.open(ImageSpec.parse("rbd/vm1"), IMAGE, client, portal, handles, no_map)

    image, _ = await images.open(IMAGE, open_backend)
    async with serving({1: image}) as setup:
        await settled()
        yield Mount(setup.kernel, stub)
    await images.close(image)
    await handles.aclose()


def with_a_mount(test: Callable[[Mount], Coroutine[Any, Any, None]]) -> Callable[[pytest.MonkeyPatch], None]:
    """Run an async test."""

    def run(monkeypatch: pytest.MonkeyPatch) -> None:
        async def mount_and_test() -> None:
            async with mounted(monkeypatch) as mount:
                await test(mount)

        trio.run(mount_and_test, clock=trio.testing.MockClock())

    return run


def check(costs: list[Cost], calls_max: int, *, aios: int, at_least: int) -> None:
    """Those reads that have started as many aios: no more calls than that, nor a task, nor a coroutine of their own."""
    costs = [cost for cost in costs if cost.aios == aios]
    assert len(costs) >= at_least
    dearest = max(costs, key=lambda cost: len(cost.calls))
    assert len(dearest.calls) <= calls_max, dearest.calls
    for cost in costs:
        assert not cost.tasks
        assert cost.coroutines <= ({"LibrbdImage._dispatch"} if aios else set())  # the task that waits for librbd


@with_a_mount
async def test_a_hit_of_a_sequential_reader_takes_few_calls(mount: Mount) -> None:
    await mount.read_in_order(0, 16 * MIB)
    check(await mount.read_in_order(16 * MIB, 24 * MIB), HIT_CALLS_MAX, aios=0, at_least=60)


@with_a_mount
async def test_so_does_one_while_the_readahead_window_grows(mount: Mount) -> None:
    check(await mount.read_in_order(0, 12 * MIB), HIT_CALLS_MAX, aios=0, at_least=60)


@with_a_mount
async def test_so_does_one_near_the_end_of_the_image(mount: Mount) -> None:
    check(await mount.read_in_order(IMAGE_BYTES - 16 * MIB, IMAGE_BYTES), HIT_CALLS_MAX, aios=0, at_least=60)


@with_a_mount
async def test_so_does_one_of_a_random_reader(mount: Mount) -> None:
    await mount.read_objects(0, 16)
    check(await mount.read_objects(0, 15), HIT_CALLS_MAX, aios=0, at_least=15)


@with_a_mount
async def test_a_miss_of_a_random_reader_takes_few_calls(mount: Mount) -> None:
    await mount.read_objects(0, 16)
    check(await mount.read_objects(16, 80), MISS_CALLS_MAX, aios=1, at_least=64)


@with_a_mount
async def test_a_miss_that_is_kept_takes_few_more(mount: Mount) -> None:
    check(await mount.read_objects(0, 15), KEPT_MISS_CALLS_MAX, aios=1, at_least=15)


@with_a_mount
async def test_a_miss_in_an_object_that_is_partly_cached_takes_some_more(mount: Mount) -> None:
    await mount.read_objects(0, 7)
    costs = [await mount.read(number * OBJECT_BYTES + 2 * MIB, 4 * KIB) for number in range(7)]
    check(costs, PARTLY_CACHED_MISS_CALLS_MAX, aios=1, at_least=7)
