"""An update that ends after any of its writes, by a power cut that keeps some of them, is never taken for whole."""

import errno
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from rbdfs.errors import LabelError
from rbdfs.export import label, syscalls
from rbdfs.export.copy import Changes, Copy, CopyOptions
from rbdfs.export.journal import Origin
from rbdfs.export.label import Copied, Label
from rbdfs.export.updated_file import UpdatedFile
from tests.cluster import random_bytes
from tests.fake_backend import FakeBackend

PAGE = 4096
SUBSETS = 12
"""Of the operations that a power cut may keep or lose, each time."""


class Op(NamedTuple):
    """Something that was done to the file, or a point at which all before it is on the disk."""

    name: str
    arguments: tuple[Any, ...] = ()

    def apply(self, descriptor: int, path: Path) -> None:
        """Do it to a file."""
        if self.name == "write":
            data, offset = self.arguments
            os.pwrite(descriptor, data, offset)
        elif self.name == "punch":
            syscalls.punch_hole(descriptor, *self.arguments)
        elif self.name == "truncate":
            os.ftruncate(descriptor, *self.arguments)
        elif self.name == "label":
            os.setxattr(descriptor, label.ATTRIBUTE, *self.arguments)
        elif self.name == "beside":
            label.path_beside(path).write_bytes(*self.arguments)
        elif self.name == "removed":
            os.removexattr(descriptor, label.ATTRIBUTE)


class Recorder:
    """Notes what is done to one file."""

    def __init__(self, patch: pytest.MonkeyPatch, path: Path, *, has_attributes: bool) -> None:
        self.ops: list[Op] = []
        self._path = path
        self._has_attributes = has_attributes
        real_rename = Path.rename

        def pwrite(descriptor: int, data: bytes, offset: int, real: Callable[..., int] = os.pwrite) -> int:
            self._note(descriptor, "write", bytes(data), offset)
            return real(descriptor, data, offset)

        def ftruncate(descriptor: int, length: int, real: Callable[..., None] = os.ftruncate) -> None:
            self._note(descriptor, "truncate", length)
            real(descriptor, length)

        def fsync(descriptor: int, real: Callable[..., None] = os.fsync) -> None:
            real(descriptor)
            self._note(descriptor, "sync")

        def setxattr(descriptor: int, name: str, value: bytes, real: Callable[..., None] = os.setxattr) -> None:
            if not self._has_attributes:
                raise OSError(errno.ENOTSUP, "not supported")
            self._note(descriptor, "label", value)
            real(descriptor, name, value)

        def punch_hole(
            descriptor: int, offset: int, length: int, real: Callable[..., None] = syscalls.punch_hole
        ) -> None:
            self._note(descriptor, "punch", offset, length)
            real(descriptor, offset, length)

        def rename(old: Path, new: Path) -> Path:
            text = old.read_bytes()
            renamed = real_rename(old, new)
            self.ops.append(Op("beside", (text,)))
            self.ops.append(Op("sync"))  # its directory follows at once
            return renamed

        for module, function in (
            *((os, each) for each in (pwrite, ftruncate, fsync, setxattr)),
            (syscalls, punch_hole),
            (Path, rename),
        ):
            patch.setattr(module, function.__name__, function)

    def _note(self, descriptor: int, name: str, *arguments: object) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink() == self._path:
            self.ops.append(Op(name, arguments))


@dataclass
class FakeChanges(Changes):
    """Where two contents differ, by pages, and what one has beyond the other."""

    before: Sequence[bytes]
    after: bytes
    window: int = 64 * PAGE

    async def within(self, offset: int, length: int) -> list[tuple[int, int]]:
        pages = range(offset, offset + length, PAGE)
        return [
            (at, min(at + PAGE, offset + length))
            for at in pages
            if any(self._differs(each, at) for each in self.before)
        ]

    def _differs(self, content: bytes, at: int) -> bool:
        return content[at : at + PAGE] != self.after[at : at + PAGE]


@dataclass
class Snapshot:
    """One of a chain, by number."""

    number: int
    content: bytes

    @property
    def copied(self) -> Copied:
        """What a label says of it."""
        origin = Origin("fsid", 1, "", "image", self.number, len(self.content))
        return Copied(origin, "rbd/vm1", f"s{self.number}", self.number)


def chain(sizes: Sequence[int]) -> list[Snapshot]:
    """Snapshots of which each has some pages changed, and some emptied."""
    source = random.Random(1)
    content = bytearray(random_bytes(sizes[0]))
    found = []
    for number, size in enumerate(sizes, 1):
        del content[size:]
        content += bytes(size - len(content))
        for _ in range(6):
            at = source.randrange(0, size, PAGE)
            count = min(source.randrange(1, 3) * PAGE, size - at)
            content[at : at + count] = bytes(count) if source.random() < 0.4 else source.randbytes(count)
        found.append(Snapshot(number, bytes(content)))
    return found


def update(path: Path, new: Snapshot, snapshots: Sequence[Snapshot], *, compare: bool = False) -> None:
    """As the command does."""
    target = UpdatedFile(path)
    said = None if compare else target.read_label()
    contents = {each.copied: each.content for each in snapshots}
    changes = None
    if said is None:
        target.begin(None, (new.copied,), compare=True)
    else:
        assert said.of is not None
        changes = FakeChanges([contents[each] for each in (said.of, *said.towards)], new.content)
        target.begin(said.of, (*said.towards, new.copied), compare=False)

    async def copy() -> None:
        await Copy(FakeBackend(bytearray(new.content)), target, CopyOptions(4), changes=changes).run()

    trio.run(copy)
    target.finish()


class CrashedFile:
    """One file in every state that a power cut may leave it in. It stays the same inode."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = path.read_bytes()
        self._label = os.getxattr(path, label.ATTRIBUTE) if label.ATTRIBUTE in os.listxattr(path) else None
        beside = label.path_beside(path)
        self._beside = beside.read_bytes() if beside.exists() else None
        self.mtime_ns = path.stat().st_mtime_ns

    def after(self, ops: Sequence[Op]) -> None:
        """Make it what it was, and do these to it."""
        label.path_beside(self._path).unlink(missing_ok=True)
        if self._beside is not None:
            label.path_beside(self._path).write_bytes(self._beside)
        with self._path.open("r+b", buffering=0) as file:
            file.truncate(0)
            file.write(self._content)
            if self._label is not None:
                os.setxattr(file.fileno(), label.ATTRIBUTE, self._label)
            elif label.ATTRIBUTE in os.listxattr(file.fileno()):
                os.removexattr(file.fileno(), label.ATTRIBUTE)
            for op in ops:
                op.apply(file.fileno(), self._path)


def crashes(ops: Sequence[Op]) -> Iterator[list[Op]]:
    """What may be left of a series: all before a sync, and any of what comes after it."""
    source = random.Random(2)
    synced = 0
    for end, op in enumerate(ops, 1):
        if op.name == "sync":
            synced = end
            yield list(ops[:end])
            continue
        yield list(ops[:end])
        for _ in range(SUBSETS):
            unsynced = [each for each in ops[synced:end] if source.random() < 0.5]
            source.shuffle(unsynced)
            yield [*ops[:synced], *unsynced]


@pytest.mark.parametrize("has_attributes", [True, False], ids=["attribute", "file beside"])
@pytest.mark.parametrize("compare", [False, True], ids=["changes", "all compared"])
@pytest.mark.parametrize("sizes", [(40, 40, 40), (40, 25, 40), (30, 40, 20)], ids=str)
def test_whatever_a_power_cut_leaves_is_known_for_what_it_is_and_an_update_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], compare: bool, has_attributes: bool
) -> None:
    path = tmp_path / "copy"
    snapshots = chain([pages * PAGE - 100 for pages in sizes])
    old, new, newer = snapshots
    path.write_bytes(old.content)
    recorder = Recorder(monkeypatch, path, has_attributes=has_attributes)
    with path.open("r+b") as file:
        label.write(file.fileno(), path, Label(old.copied))
    crashed = CrashedFile(path)
    recorder.ops.clear()
    update(path, new, snapshots, compare=compare)
    assert path.read_bytes() == new.content
    ops = list(recorder.ops)
    mtime_ns = path.stat().st_mtime_ns
    writing = {"write", "punch", "truncate"}
    begun = next(index for index, op in enumerate(ops) if op.name in writing)
    assert any(op.name == "sync" for op in ops[:begun])
    seen = set()
    for number, left in enumerate(crashes(ops)):
        crashed.after(left)
        # The last label has the time of the last write, the first one that of before.
        is_ended = any(op.name in ("label", "beside") for op in left[begun:])
        os.utime(path, ns=(0, mtime_ns if is_ended else crashed.mtime_ns))
        said = read_label(path)
        assert said is not None
        whole = said.whole
        seen.add(None if whole is None else whole.snapshot)
        content = path.read_bytes()
        if whole is not None:
            assert content == next(each.content for each in snapshots if each.copied == whole), left
        then = (new, newer)[number % 2]
        if whole != then.copied:
            update(path, then, snapshots, compare=said.of is None)
            assert path.read_bytes() == then.content, left
    assert seen == {"s1", None, "s2"}


def read_label(path: Path) -> Label | None:
    """As an update begins, which then leaves the file alone."""
    target = UpdatedFile(path)
    try:
        return target.read_label()
    finally:
        assert target.abandon() == f"{path} is as it was"


def write_later(path: Path) -> None:
    """Others write what was there."""
    status = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # the clock of files has ticks of milliseconds


def put_another_there(path: Path) -> None:
    """A copy with all its attributes, as `cp --archive` makes one."""
    copied = path.with_name("another")
    shutil.copy2(path, copied)
    copied.rename(path)


def grow(path: Path) -> None:
    """By a hole, which nothing is written to."""
    os.truncate(path, path.stat().st_size + PAGE)


@pytest.mark.parametrize(
    ("change", "why"), [(write_later, "written to"), (put_another_there, "but a copy of it"), (grow, "163840")]
)
def test_what_others_change_is_noticed(tmp_path: Path, change: Callable[[Path], None], why: str) -> None:
    path = tmp_path / "copy"
    (old,) = chain([40 * PAGE])
    path.write_bytes(old.content)
    with path.open("r+b") as file:
        label.write(file.fileno(), path, Label(old.copied))
    assert read_label(path) == Label(old.copied)
    change(path)
    with pytest.raises(LabelError, match=why):
        read_label(path)
