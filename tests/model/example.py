"""What all rules of the model share: one example's images, open files and history."""

import contextlib
import errno
import functools
import itertools
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import rbd
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests.model.reference import BLOCK_BYTES, Descriptor, Image, Place, Reference, Spec
from tests.model.world import PLACES, World
from tests.truth import Mode, describe

SIZE_MAX = 2 << 20
NAMES = "abcdef"
"""Of the images in a place: few, so that a name is soon another image's."""
IMAGES_MAX = 7
STALE_SECONDS = 1.0 + 0.25
"""How old may be what the kernel knows of names and attributes; the rest is for a busy machine."""
REFUSALS = (
    rbd.ArgumentOutOfRange,
    rbd.FunctionNotSupported,
    rbd.ImageBusy,
    rbd.ImageExists,
    rbd.ImageHasSnapshots,
    rbd.InvalidArgument,
    rbd.OperationNotSupported,
    rbd.ReadOnlyImage,
)
"""librbd says no before it has done anything."""
REFUSED_BY = (errno.EXDEV,)
"""The same by an errno alone: a clone of format 1 in another namespace."""

SHELL = """image() { python3 -c 'import random, rados, rbd, sys
client = rados.Rados(conffile="", conf={"rbd_skip_partial_discard": "false"}); client.connect()
pool, *namespace, name = sys.argv[1].split("/")
ioctx = client.open_ioctx(pool); ioctx.set_namespace("".join(namespace))
image = rbd.Image(ioctx, name); eval("image." + sys.argv[2]); image.close()
ioctx.close(); client.shutdown()' "$@"; }"""

picks = st.integers(0, 15)
"""One of several, whatever they are by then."""
places = st.sampled_from(PLACES)
sizes = st.builds(
    lambda blocks, tail: min(blocks * BLOCK_BYTES + tail, SIZE_MAX),
    st.integers(0, SIZE_MAX // BLOCK_BYTES),
    st.sampled_from([0, 0, 0, 512, 2500]),
)


@dataclass(slots=True)
class OpenFile:
    """A descriptor of ours."""

    number: int
    mode: Mode
    name: str
    image: Image
    descriptor: Descriptor

    @property
    def watches(self) -> bool:
        """Whether it holds off a removal."""
        return self.mode[1] == "watching" and self.descriptor.readable is self.image

    def __str__(self) -> str:
        return f"descriptor {self.number} of {self.name} in mode {', '.join(self.mode)}"


class Example(RuleBasedStateMachine):
    """One random history. A rule does nothing if there is nothing that it can be done to."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.reference = Reference()
        self.files: list[OpenFile] = []
        self.writers: dict[Image, rbd.Image] = {}
        self.history: list[str] = [SHELL]
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(world.example())
        self._seeds = itertools.count(1)

    def teardown(self) -> None:
        """Leave nothing behind."""
        with self.stack:
            for writer in self.writers.values():
                writer.close()
            for file in self.files:
                with contextlib.suppress(OSError):
                    os.close(file.number)

    # What there is

    def one(self, pick: int, *, migrating: bool = False, written: bool = True) -> Image | None:
        """An image that is (not) in the middle of a migration; not `written`: that no writer has open."""
        images = [
            image
            for image in self.reference.images.values()
            if (image.before_migration is not None) == migrating and (written or image not in self.writers)
        ]
        return images[pick % len(images)] if images else None

    def any_one(self, pick: int) -> Image | None:
        """An image, whether it is migrated or not."""
        images = list(self.reference.images.values())
        return images[pick % len(images)] if images else None

    def snapshot(self, image: Image | None, pick: int) -> str | None:
        """One of an image's snapshots."""
        return list(image.snapshots)[pick % len(image.snapshots)] if image and image.snapshots else None

    def free(self, place: Place, pick: int) -> Spec:
        """A name that no image has."""
        names = [f"{name}{self.world.examples}" for name in NAMES]
        free = [Spec(place, name) for name in names if Spec(place, name) not in self.reference.images]
        return free[pick % len(free)]

    @property
    def is_full(self) -> bool:
        """Whether there are images enough."""
        return len(self.reference.images) + len(self.reference.trash) >= IMAGES_MAX

    # Another client

    def do(self, line: str, action: Callable[[], object], *, may_be_refused: bool = True) -> bool:
        """Have another client do something; whether it was done, and not refused."""
        self.history.append(line)
        try:
            action()
        except (*REFUSALS, rbd.OSError) as error:
            if not may_be_refused or (type(error) is rbd.OSError and error.errno not in REFUSED_BY):
                raise
            self.history[-1] += f"  # refused: {error}"
            self.world.steps["(refused)"] += 1
            return False
        return True

    @contextlib.contextmanager
    def opened(self, image: Image, snapshot: str | None = None, *, read_only: bool = False) -> Iterator[rbd.Image]:
        """An image, as another client has it; for writing, as the writer has it that stays, if there is one."""
        if image in self.writers and snapshot is None and not read_only:
            yield self.writers[image]
            return
        spec = self.reference.spec(image)
        with rbd.Image(self.world.at(spec.place), spec.name, snapshot, read_only) as handle:
            yield handle

    def on(self, image: Image, line: str, action: Callable[[rbd.Image], object]) -> bool:
        """As `do`, with an image that is open; the line is a call if it ends so."""
        spec = self.reference.spec(image)
        what = f"image {spec} '{line}'" if line.endswith(")") else line
        writer = "  # by the writer that stays" if image in self.writers else ""

        def call() -> None:
            with self.opened(image) as handle:
                action(handle)

        return self.do(what + writer, call)

    def random_bytes(self, length: int) -> tuple[str, bytes]:
        """Bytes that were nowhere before, and how to make them."""
        seed = next(self._seeds)
        return f"random.Random({seed}).randbytes({length})", random.Random(seed).randbytes(length)

    def librbd_reads(self, image: Image, snapshot: str | None) -> bytes:
        """What `rbd export` reads: the independent reader."""
        with self.opened(image, snapshot, read_only=True) as handle:
            return bytes(handle.read(0, handle.size())) if handle.size() else b""

    def is_watched(self, image: Image) -> bool:
        """Whether we hold off its removal."""
        return any(file.watches and file.image is image for file in self.files)

    # What is wrong

    def compare(self, what: str, file: OpenFile, wrong: str | None, data: bytes = b"", offset: int = 0) -> None:
        """Fail if anything is."""
        if wrong is None:
            return
        lines = [f"{what}: {wrong}"]
        if data:
            contents = self._contents(file.descriptor)
            end = offset + len(data)
            lines.append(describe(data, **{name: content[offset:end] for name, content in contents.items()}))
        with contextlib.suppress(rbd.Error, StopIteration):
            names = [name for name, each in file.image.snapshots.items() if each is file.descriptor.readable]
            exported = self.librbd_reads(file.image, names[0] if names else None)
            same = "as the model has it" if exported == file.descriptor.readable.content else "something else"
            lines.append(f"librbd itself reads {same}")
        raise AssertionError("; ".join(lines))

    @staticmethod
    def _contents(descriptor: Descriptor) -> dict[str, bytes]:
        """What a block can be taken for, by name."""
        right, *since = reversed(descriptor.contents)
        before = {f"since_{number}": content for number, content in enumerate(since, 1)}
        versions = descriptor.readable.versions[: -len(before) - 1]
        before |= {f"before_{number}": version.content for number, version in enumerate(reversed(versions), 1)}
        parent = descriptor.readable.parent if isinstance(descriptor.readable, Image) else None
        of_parent = [] if parent is None else [parent, *parent.snapshots.values()]
        return {"right": right, **before, **{f"parent_{number}": each.content for number, each in enumerate(of_parent)}}


def step(**strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """A rule that is counted, and that fails with the history up to here."""

    def decorate(function: Callable[..., None]) -> Any:
        @functools.wraps(function)
        def counted(self: Example, **arguments: Any) -> None:
            self.world.steps[function.__name__] += 1
            try:
                function(self, **arguments)
            except (AssertionError, OSError, rbd.Error, subprocess.SubprocessError) as error:
                history = "\n".join(self.history)
                raise AssertionError(f"{type(error).__name__}: {error}\n\nThe history:\n\n{history}\n") from error

        decorator: Callable[[Any], Any] = rule(**strategies)
        return decorator(counted)

    return decorate
