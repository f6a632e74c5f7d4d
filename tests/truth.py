"""What the tests of the truth share: a mount in every mode, and readers who say how wrong something is."""

import contextlib
import itertools
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import rados
import rbd

from tests.cluster import MIB, READ_ONLY_CAPS, Ceph, Mount

OBJECT = MIB // 4
"""Of the images here: small, so that a few MiB are many objects."""
FEATURES = 61
CACHING = {
    "default": (),
    "no cache": ("--cache-size", "0"),
    "direct": ("--direct-io",),
    "bare": ("--direct-io", "--cache-size", "0"),
    "small cache": ("--cache-size", "4M"),
}
CAPS = {"watching": ("mon", "profile rbd", "osd", "profile rbd"), "read-only": READ_ONLY_CAPS}
Mode = tuple[str, str]
ALL_MODES: tuple[Mode, ...] = tuple(itertools.product(CACHING, CAPS))
MODES = tuple(mode for mode in ALL_MODES if mode[0] != "small cache")
"""Without what is between two others: only the model has it as well."""


def in_modes(*modes: Mode) -> pytest.MarkDecorator:
    """Run a test in these modes, not in all."""
    return pytest.mark.parametrize("mode_mount", modes, ids=map(", ".join, modes), indirect=True)


TWO_MODES = in_modes(("default", "watching"), ("bare", "read-only"))
READ_ONLY_MODES = in_modes(("default", "read-only"), ("bare", "read-only"))
"""In which nothing holds off a migration or the trash."""


class ModeMounts:
    """One mount a mode, made when it is first needed; one that died is made again, for the next test."""

    def __init__(self, ceph: Ceph, make_folder: Callable[[], Path], module: str = "rbdfs") -> None:
        self._ceph = ceph
        self._make_folder = make_folder
        self._module = module
        self._mounts: dict[Mode, Mount] = {}

    def get(self, mode: Mode) -> Mount:
        """The mount of a mode, alive."""
        if mode not in self._mounts or not self._mounts[mode].is_running:
            self._end(mode)
            caching, caps = mode
            arguments = (*CACHING[caching], *self._ceph.credentials(CAPS[caps]))
            self._mounts[mode] = Mount(self._ceph, self._make_folder(), arguments, self._module)
            self._mounts[mode].expect("ERROR", "WARNING")
        return self._mounts[mode]

    def _end(self, mode: Mode) -> None:
        if mode in self._mounts:
            self._mounts.pop(mode).end()

    def end(self) -> None:
        """Unmount all."""
        for mode in list(self._mounts):
            self._end(mode)


def blocks_of(data: bytes, **contents: bytes) -> list[str]:
    """What each 4 KiB of data is: the name of the first content that has it there, "zeros" or "garbage"."""
    blocks = []
    for start in range(0, len(data), 4096):
        block = data[start : start + 4096]
        names = [name for name, content in contents.items() if content[start : start + len(block)] == block]
        blocks.append(names[0] if names else "garbage" if any(block) else "zeros")
    return blocks


def describe(data: bytes, **contents: bytes) -> str:
    """The same in runs, for a person."""
    runs, start = [], 0
    for name, run in itertools.groupby(blocks_of(data, **contents)):
        end = min(start + 4096 * len(list(run)), len(data))
        runs.append(f"{name} [{start / MIB:g}M, {end / MIB:g}M)")
        start = end
    return ", ".join(runs) or "nothing"


def assert_same(data: bytes, expected: bytes, **others: bytes) -> None:
    """Fail with what the data is instead, in a line; `others` are what it may have been taken for."""
    if data != expected:
        was = describe(data, right=expected, **others)
        raise AssertionError(f"{len(data)} bytes instead of {len(expected)}: {was}")


def assert_reads_right(ceph: Ceph, path: Path, name: str, tmp_path: Path, **others: bytes) -> None:
    """An open() now, by `cp` and by `cat`, has what `rbd export` has."""
    expected = ceph.exported(name)
    reads: dict[str, Callable[[], bytes]] = {"cp": partial(copied, path, tmp_path), "cat": partial(cat, path)}
    for how, read in reads.items():
        try:
            assert_same(read(), expected, **others)
        except AssertionError as error:
            raise AssertionError(f"{how}: {error}") from None


def cat(path: Path) -> bytes:
    """What `cat` gets: an open(), and reads until the end."""
    return subprocess.run(["cat", path], check=True, capture_output=True, timeout=30).stdout


def read_all(file: int, length: int, offset: int) -> bytes:
    """As pread(2), until there is no more: a read that ends early for the kernel's sake is no end of the file."""
    parts = []
    while length and (part := os.pread(file, length, offset)):
        parts.append(part)
        length, offset = length - len(part), offset + len(part)
    return b"".join(parts)


def copied(path: Path, folder: Path) -> bytes:
    """What `cp` makes of a file; it leaves holes out."""
    copy = folder / "copy"
    subprocess.run(["cp", path, copy], check=True, capture_output=True, timeout=30)
    return copy.read_bytes()


@contextlib.contextmanager
def idle(path: Path) -> Iterator[int]:
    """A descriptor that is open, and of which a byte was read."""
    file = os.open(path, os.O_RDONLY)
    try:
        assert len(os.pread(file, 1, 0)) == 1
        yield file
    finally:
        with contextlib.suppress(OSError):
            os.close(file)


@contextlib.contextmanager
def opened(ceph: Ceph, name: str, pool: str = "rbd") -> Iterator[rbd.Image]:
    """An image, as another client has it that may write."""
    with ceph.ioctx(pool) as ioctx, rbd.Image(ioctx, name) as image:
        yield image


def image_id(ceph: Ceph, name: str) -> str:
    """What an image's objects are named by."""
    with opened(ceph, name) as image:
        return str(image.id())


def make_clone(ceph: Ceph, parent: str) -> str:
    """A clone of a new snapshot of an image, of format 2: it relies on no protected snapshot."""
    child = ceph.unique("child")
    with opened(ceph, parent) as image:
        image.create_snap("base")
    ceph.run("rbd", "clone", "--rbd-default-clone-format", "2", f"rbd/{parent}@base", f"rbd/{child}")
    return child


def write_object(ioctx: rados.Ioctx, image: str, number: int, data: bytes) -> None:
    """Write a data object as a client does that knows of no lock and of no snapshot."""
    ioctx.write_full(f"rbd_data.{image}.{number:016x}", data)


@contextlib.contextmanager
def watching(ceph: Ceph, image: str) -> Iterator[rados.Ioctx]:
    """A client that has the image open, for all that others can see, and asks for no lock."""
    client = rados.Rados(conffile=os.fspath(ceph.conf))
    client.connect()
    try:
        ioctx = client.open_ioctx("rbd")
        watch = ioctx.watch(f"rbd_header.{image}", lambda *_: None, lambda *_: None)
        try:
            yield ioctx
        finally:
            watch.close()
            ioctx.close()
    finally:
        client.shutdown()


@contextlib.contextmanager
def migrating(ceph: Ceph, source: str, target: str) -> Iterator[Callable[[str], None]]:
    """A migration that was prepared; the function takes the next steps. Left undone, it is aborted."""
    ceph.run("rbd", "migration", "prepare", f"rbd/{source}", f"rbd/{target}")
    steps = ["prepare"]

    def step(name: str) -> None:
        options = ["--force"] if name == "commit" else []
        ceph.run("rbd", "migration", name, "--no-progress", *options, f"rbd/{target}")
        steps.append(name)

    try:
        yield step
    finally:
        if not {"commit", "abort"} & set(steps):
            step("abort")


def migrate(ceph: Ceph, source: str, target: str) -> None:
    """All of a migration."""
    with migrating(ceph, source, target) as step:
        step("execute")
        step("commit")


@contextlib.contextmanager
def looping(*functions: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Call each function again and again, in a thread each, until the end; the list takes what they raise."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def loop(function: Callable[[], object]) -> None:
        while not stop.is_set():
            try:
                function()
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=loop, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    try:
        yield errors
    finally:
        stop.set()
        deadline = time.monotonic() + 30
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in threads), "a reader waits for ever"
