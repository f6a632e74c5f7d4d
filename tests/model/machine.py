"""The rules of the model: what another client does, and what we do in each mode."""

import errno
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import precondition

from tests.model.example import SIZE_MAX, STALE_SECONDS, OpenFile, picks, places, step
from tests.model.others import Others, ranges, within
from tests.model.reference import Descriptor, Image, Place, Readable, Spec, blocks, is_zeros
from tests.model.world import NAMESPACE, POOL
from tests.truth import Mode, read_all

FILES_MAX = 8
CP_SECONDS = 30
GONE = (errno.ENOENT, errno.ESTALE)

modes = st.integers(0, 63)
snapshots = st.none() | picks


class Machine(Others):
    """What another client does, and what we do."""

    # What there is

    def mode(self, number: int) -> Mode:
        """One of the modes of this run."""
        return self.world.modes[number % len(self.world.modes)]

    def some_modes(self, number: int) -> set[Mode]:
        """Up to three of them."""
        return {self.mode(number + step) for step in (0, 1, 5)}

    def count(self, mode: Mode, **counts: int) -> None:
        """For the summary."""
        self.world.by_mode[mode].update(counts)

    def target(self, which: int, snapshot: int | None) -> tuple[Image, str | None] | None:
        """An image, or a snapshot of it."""
        image = self.any_one(which)
        return None if image is None else (image, None if snapshot is None else self.snapshot(image, snapshot))

    def path(self, mode: Mode, spec: Spec, snapshot: str | None) -> Path:
        """Where it is in a mount."""
        return self.world.path(mode, spec.place) / (f"{spec.name}@{snapshot}" if snapshot else spec.name)

    def is_named_anew(self, spec: Spec) -> bool:
        """Whether the kernel may know the name as another image's."""
        return len(self.reference.bound(spec, time.monotonic() - STALE_SECONDS)) > 1

    def say(self, mode: Mode, line: str) -> None:
        """Into the history."""
        self.history.append(f"{line}  # in mode {', '.join(mode)}")

    # Opening

    def open(self, mode: Mode, image: Image, snapshot: str | None) -> OpenFile:
        """An open() sees what is there now. A name that was another image's a moment ago shows within a second."""
        spec = self.reference.spec(image)
        path = self.path(mode, spec, snapshot)
        if self.is_named_anew(spec):
            self.history.append(f"sleep {STALE_SECONDS}")
            time.sleep(STALE_SECONDS)
        readable: Readable = image.snapshots[snapshot] if snapshot else image
        descriptor = Descriptor(readable)
        number = os.open(path, os.O_RDONLY)
        file = OpenFile(number, mode, f"{spec}{'@' + snapshot if snapshot else ''}", image, descriptor)
        self.count(mode, opens=1)
        size = os.fstat(number).st_size
        if size != len(readable.content):
            self.close_file(file)
            raise AssertionError(f"{file} is {size} bytes long, not {len(readable.content)}")
        return file

    @contextmanager
    def opened_here(self, mode: Mode, image: Image, snapshot: str | None) -> Iterator[OpenFile]:
        """An open() and its close()."""
        file = self.open(mode, image, snapshot)
        try:
            yield file
        finally:
            os.close(file.number)

    def close_file(self, file: OpenFile) -> None:
        """An error is right if the image is gone."""
        try:
            os.close(file.number)
        except OSError:
            assert file.descriptor.may_fail, f"{file} could not be closed"

    def check_read(self, file: OpenFile, offset: int, length: int) -> None:
        """Read to the end of the range or of the file, and compare."""
        try:
            data = read_all(file.number, length, offset)
        except OSError as error:
            self.count(file.mode, errors=1)
            if not file.descriptor.may_fail:
                raise AssertionError(f"a read of {file} at {offset} (+{length}) fails: {error}") from error
            return
        self.count(file.mode, reads=1, bytes=len(data))
        wrong = file.descriptor.wrong_read(offset, length, data)
        self.compare(f"a read of {file} at {offset} (+{length})", file, wrong, data, offset)

    def check_holes(self, file: OpenFile) -> None:
        """Walk over data and holes: what is called a hole never held anything else since the open()."""
        try:
            holes = list(_holes(file.number))
        except OSError as error:
            self.count(file.mode, errors=1)
            if not file.descriptor.may_fail:
                raise AssertionError(f"a seek in {file} fails: {error}") from error
            return
        self.count(file.mode, seeks=1)
        self.compare(f"the holes of {file}, {holes[:8]}", file, file.descriptor.wrong_holes(holes))

    # Rules of ours: new open()s

    @precondition(lambda self: len(self.files) < FILES_MAX)
    @step(mode=modes, which=picks, snapshot=snapshots)
    def open_and_keep(self, mode: int, which: int, snapshot: int | None) -> None:
        if target := self.target(which, snapshot):
            in_mode = self.mode(mode)
            self.say(in_mode, f"exec {len(self.files) + 10}<MOUNT/{self._name(*target)}")
            self.files.append(self.open(in_mode, *target))

    @step(mode=modes, which=picks, snapshot=snapshots)
    def cat(self, mode: int, which: int, snapshot: int | None) -> None:
        if target := self.target(which, snapshot):
            for in_mode in self.some_modes(mode):
                self.say(in_mode, f"cat MOUNT/{self._name(*target)}")
                with self.opened_here(in_mode, *target) as file:
                    self.check_read(file, 0, SIZE_MAX + 1)

    @step(mode=modes, which=picks, snapshot=snapshots, wanted=ranges)
    def open_and_read(self, mode: int, which: int, snapshot: int | None, wanted: tuple[int, int, int, int]) -> None:
        if target := self.target(which, snapshot):
            for in_mode in self.some_modes(mode):
                with self.opened_here(in_mode, *target) as file:
                    size = len(file.descriptor.readable.content)
                    if size:
                        offset, length = within(size, wanted)
                        self.say(in_mode, f"tail -c +{offset + 1} MOUNT/{file.name} | head -c {length}")
                        self.check_read(file, offset, length)

    @step(mode=modes, which=picks, snapshot=snapshots)
    def seek(self, mode: int, which: int, snapshot: int | None) -> None:
        if target := self.target(which, snapshot):
            for in_mode in self.some_modes(mode):
                self.say(in_mode, f"# SEEK_DATA and SEEK_HOLE through MOUNT/{self._name(*target)}")
                with self.opened_here(in_mode, *target) as file:
                    self.check_holes(file)

    @step(mode=modes, which=picks, snapshot=snapshots)
    def cp(self, mode: int, which: int, snapshot: int | None) -> None:
        if target := self.target(which, snapshot):
            with self.opened_here(self.mode(mode), *target) as file:
                pass
            self.say(file.mode, f"cp MOUNT/{file.name} COPY")
            copy = self.world.folder / "copy"
            path = self.path(file.mode, self.reference.spec(target[0]), target[1])
            subprocess.run(["cp", path, copy], check=True, capture_output=True, timeout=CP_SECONDS)
            data = copy.read_bytes()
            self.count(file.mode, reads=1, bytes=len(data))
            self.compare(f"cp of {file}", file, file.descriptor.wrong_read(0, SIZE_MAX + 1, data), data)

    # Rules of ours: older descriptors

    @precondition(lambda self: self.files)
    @step(which=picks, wanted=ranges)
    def read(self, which: int, wanted: tuple[int, int, int, int]) -> None:
        number = which % len(self.files)
        file = self.files[number]
        size = max(len(content) for content in file.descriptor.contents)
        if size:
            offset, length = within(size, wanted)
            self.say(file.mode, f"# read {length} bytes at {offset} of <&{number + 10} ({file.name})")
            self.check_read(file, offset, length)

    @precondition(lambda self: self.files)
    @step(which=picks)
    def seek_in_older(self, which: int) -> None:
        number = which % len(self.files)
        self.say(self.files[number].mode, f"# SEEK_DATA and SEEK_HOLE through <&{number + 10}")
        self.check_holes(self.files[number])

    @precondition(lambda self: self.files)
    @step(which=picks)
    def close(self, which: int) -> None:
        file = self.files.pop(which % len(self.files))
        self.say(file.mode, f"# close the descriptor of {file.name}")
        self.close_file(file)

    # Rules of ours: names and attributes

    @step(mode=modes, which=picks, snapshot=snapshots)
    def stat(self, mode: int, which: int, snapshot: int | None) -> None:
        if target := self.target(which, snapshot):
            spec = self.reference.spec(target[0])
            self.say(self.mode(mode), f"stat MOUNT/{self._name(*target)}")
            path = self.path(self.mode(mode), spec, target[1])
            try:
                told = path.stat()
            except OSError as error:
                if error.errno not in GONE or not self.is_named_anew(spec):
                    raise
                return
            if not self.is_named_anew(spec):
                self.check_attributes(str(path), told, target[0].snapshots[target[1]] if target[1] else target[0])

    @step(mode=modes, place=places)
    def ls(self, mode: int, place: Place) -> None:
        self.say(self.mode(mode), f"ls -l MOUNT/{place}")
        images = self.reference.in_place(place)
        with os.scandir(self.world.path(self.mode(mode), place)) as listing:
            entries = {entry.name: entry for entry in listing}
        expected = {*images, *([NAMESPACE] if place == Place(POOL) else [])}
        assert set(entries) == expected, f"{place} has {sorted(expected)}, and {sorted(entries)} are listed"
        for name, image in images.items():
            if not self.is_named_anew(Spec(place, name)):
                with suppress(FileNotFoundError):
                    self.check_attributes(f"{place}/{name}", entries[name].stat(), image)

    def check_attributes(self, name: str, told: os.stat_result, readable: Readable) -> None:
        """They may be a second old."""
        recent = readable.since(time.monotonic() - STALE_SECONDS)
        assert told.st_size in {len(content) for content in recent}, f"{name} is told to have {told.st_size} bytes"
        held = min(_held_bytes(content) for content in recent)
        assert told.st_blocks * 512 >= held, f"{name} is told to hold {told.st_blocks * 512} bytes, and holds {held}"

    def _name(self, image: Image, snapshot: str | None) -> str:
        return f"{self.reference.spec(image)}{'@' + snapshot if snapshot else ''}"


def _holes(file: int) -> Iterator[tuple[int, int]]:
    """The holes (start, end) of an open file, by SEEK_DATA and SEEK_HOLE."""
    position, size = 0, os.fstat(file).st_size
    while position < size:
        try:
            data = os.lseek(file, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            yield position, size
            return
        if data > position:
            yield position, data
        end = os.lseek(file, data, os.SEEK_HOLE)
        assert end > data, f"after data at {data} a hole begins at {end}"
        position = end


def _held_bytes(content: bytes) -> int:
    """What is no zeros, in blocks: an image holds at least that."""
    return sum(_lengths(content))


def _lengths(content: bytes) -> Iterable[int]:
    return (end - start for start, end in blocks(0, len(content)) if not is_zeros(content[start:end]))
