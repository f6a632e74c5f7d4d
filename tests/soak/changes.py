"""What another client does: it makes, writes, snapshots, clones, flattens, resizes, renames and removes images."""

import contextlib
import itertools
import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import rados
import rbd

from tests.cluster import Ceph
from tests.soak.blocks import BLOCK_BYTES, UNWRITTEN, content, wrong_blocks
from tests.soak.ledger import WrongError

POOL = "changing"
OBJECT_ORDER = 20
IMAGES_MAX = 6
SNAPSHOTS_MAX = 3
BLOCKS_MIN, BLOCKS_MAX = 256, 4096
RUN_BLOCKS = 256
"""The most that is written at once."""
CLIENT = {"rbd_default_clone_format": "2"}
"""Without timeouts: a change waits until its OSDs are back, so it is never half done."""


@dataclass(slots=True, eq=False)
class Image:
    """An image that changes. All of it belongs to the lock of `Changes`."""

    name: str
    done: list[int]
    """The generation of each block that an open() must see."""
    latest: list[int]
    """The newest that a read may see: of a write that has begun."""
    snapshots: dict[str, Sequence[int]] = field(default_factory=dict)
    parent: tuple["Image", str] | None = None
    """Of a clone: the image and its snapshot."""
    disturbed: int = 0
    """Odd while something other than a write is done to it. A reader that sees it change can expect less."""


@dataclass(frozen=True, slots=True)
class View:
    """What a reader may expect of what it is about to open."""

    image: Image
    name: str
    snapshot: str | None
    generations: Sequence[int]
    disturbed: int


class Changes:
    """One change after the other, and all that is known of the images by then."""

    def __init__(self, ceph: Ceph, seed: int) -> None:
        ceph.make_pool(POOL)
        self.counts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self._random = random.Random(seed)
        self._rados = rados.Rados(conffile=os.fspath(ceph.conf), conf=CLIENT)
        self._rados.connect()
        self._ioctx = self._rados.open_ioctx(POOL)
        self._images: list[Image] = []
        self._numbers = itertools.count(1)
        self._generations = itertools.count(1)
        self._steps: dict[Callable[[], str | None], int] = {  # and how often
            self._write: 12,
            self._create: 3,
            self._snapshot: 4,
            self._remove_snapshot: 2,
            self._clone: 2,
            self._flatten: 1,
            self._resize: 2,
            self._rename: 1,
            self._trash: 1,
            self._remove: 2,
        }
        while len(self._images) < 3:
            self._create()
        self._snapshot()

    def close(self) -> None:
        """Disconnect."""
        self._ioctx.close()
        self._rados.shutdown()

    def step(self) -> None:
        """One change, or none if there is nothing to do it to or somebody watches the image."""
        (change,) = self._random.choices(list(self._steps), list(self._steps.values()))
        try:
            what = change()
        except (rbd.ImageBusy, rbd.ImageHasSnapshots):
            what = "(refused)"
        if what:
            self.counts[what] += 1

    # For readers

    def view(self, source: random.Random) -> View:
        """An image, or one of its snapshots, that only writes are done to now."""
        with self.lock:
            image = source.choice([image for image in self._images if image.disturbed % 2 == 0] or self._images)
            snapshot = source.choice([None, *image.snapshots])
            generations = image.snapshots[snapshot] if snapshot else tuple(image.done)
            return View(image, image.name, snapshot, generations, image.disturbed)

    def newest(self, view: View) -> Sequence[int] | None:
        """What a read that has ended now may have seen at most; None if not only writes were done to the image."""
        with self.lock:
            if view.image.disturbed != view.disturbed or view.disturbed % 2:
                return None
            return view.generations if view.snapshot else tuple(view.image.latest)

    def verify(self) -> int:
        """Compare all images with what librbd reads. How many there are. Raises WrongError."""
        count = 0
        for image in self._images:
            for snapshot, generations in [(None, image.done), *image.snapshots.items()]:
                if wrong := wrong_blocks(self.librbd_reads(image.name, snapshot), generations, generations):
                    raise WrongError(f"librbd, {image.name}@{snapshot}: {len(wrong)} blocks: {wrong[:3]}")
                count += 1
        return count

    def librbd_reads(self, name: str, snapshot: str | None) -> bytes:
        """The independent reader."""
        with rbd.Image(self._ioctx, name, snapshot, read_only=True) as image:
            return bytes(image.read(0, image.size()))

    # Changes

    def _one(self, *, without_children: bool = False) -> Image:
        parents = {image.parent[0] for image in self._images if image.parent} if without_children else ()
        return self._random.choice([image for image in self._images if image not in parents] or self._images)

    def _name(self) -> str:
        """Never one that another image had: the kernel may know it as that for a second."""
        return f"image{next(self._numbers)}"

    @contextlib.contextmanager
    def _disturbing(self, *images: Image) -> Iterator[None]:
        with self.lock:
            for image in images:
                image.disturbed += 1
        try:
            yield
        finally:
            with self.lock:
                for image in images:
                    image.disturbed += 1

    @contextlib.contextmanager
    def _opened(self, image: Image, snapshot: str | None = None) -> Iterator[rbd.Image]:
        with rbd.Image(self._ioctx, image.name, snapshot) as handle:
            yield handle

    def _create(self) -> str | None:
        if len(self._images) >= IMAGES_MAX:
            return None
        blocks = self._random.randrange(BLOCKS_MIN, BLOCKS_MAX)
        generation = next(self._generations)
        image = Image(self._name(), [UNWRITTEN] * blocks, [UNWRITTEN] * blocks)
        rbd.RBD().create(self._ioctx, image.name, blocks * BLOCK_BYTES, order=OBJECT_ORDER, old_format=False)
        image.done[: blocks // 2] = image.latest[: blocks // 2] = [generation] * (blocks // 2)
        with self._opened(image) as handle:
            handle.write(content(image.done[: blocks // 2]), 0)
        with self.lock:
            self._images.append(image)
        return "create"

    def _write(self) -> str:
        image = self._one()
        with self._opened(image) as handle:
            for _ in range(self._random.randrange(1, 8)):
                first = self._random.randrange(len(image.done))
                numbers = range(first, min(first + self._random.randrange(1, RUN_BLOCKS), len(image.done)))
                written = [next(self._generations)] * len(numbers)
                with self.lock:
                    image.latest[first : numbers.stop] = written
                handle.write(content(written, first), first * BLOCK_BYTES)
                handle.flush()  # librbd keeps a write to itself, else
                with self.lock:
                    image.done[first : numbers.stop] = written
        return "write"

    def _snapshot(self) -> str | None:
        image = self._one()
        if len(image.snapshots) >= SNAPSHOTS_MAX:
            return None
        name = f"snapshot{next(self._numbers)}"
        with self._opened(image) as handle:
            handle.create_snap(name)
        with self.lock:
            image.snapshots[name] = tuple(image.done)
        return "snapshot"

    def _remove_snapshot(self) -> str | None:
        image = self._one()
        cloned = {each.parent for each in self._images}
        names = [name for name in image.snapshots if (image, name) not in cloned]
        if not names:
            return None
        with self._disturbing(image), self._opened(image) as handle:
            with self.lock:
                del image.snapshots[names[0]]
            handle.remove_snap(names[0])
        return "remove a snapshot"

    def _clone(self) -> str | None:
        image = self._one()
        if len(self._images) >= IMAGES_MAX or not image.snapshots:
            return None
        snapshot = self._random.choice(list(image.snapshots))
        generations = list(image.snapshots[snapshot])
        clone = Image(self._name(), generations, generations.copy(), parent=(image, snapshot))
        rbd.RBD().clone(self._ioctx, image.name, snapshot, self._ioctx, clone.name, order=OBJECT_ORDER)
        with self.lock:
            self._images.append(clone)
        return "clone"

    def _flatten(self) -> str | None:
        clones = [image for image in self._images if image.parent and not image.snapshots]  # snapshots keep the parent
        if not clones:
            return None
        image = self._random.choice(clones)
        with self._opened(image) as handle:  # no reader can tell
            handle.flatten()
        image.parent = None
        return "flatten"

    def _resize(self) -> str:
        image = self._one()
        blocks = self._random.randrange(BLOCKS_MIN, BLOCKS_MAX)
        with self._disturbing(image):
            with self._opened(image) as handle:
                handle.resize(blocks * BLOCK_BYTES)
            with self.lock:
                kept = image.done[:blocks]
                image.done = kept + [UNWRITTEN] * (blocks - len(kept))
                image.latest = image.done.copy()
        return "resize"

    def _rename(self) -> str:
        image, name = self._one(), self._name()
        with self._disturbing(image):
            rbd.RBD().rename(self._ioctx, image.name, name)
            with self.lock:
                image.name = name
        return "rename"

    def _trash(self) -> str:
        """To the trash and back."""
        image, name = self._one(), self._name()
        with self._opened(image) as handle:
            ident = handle.id()
        with self._disturbing(image):
            rbd.RBD().trash_move(self._ioctx, image.name, 0)
            rbd.RBD().trash_restore(self._ioctx, ident, name)
            with self.lock:
                image.name = name
        return "trash and restore"

    def _remove(self) -> str | None:
        image = self._one(without_children=True)
        if len(self._images) < 3 or any(each.parent and each.parent[0] is image for each in self._images):
            return None
        with self._disturbing(image):
            with self._opened(image) as handle:
                for name in list(image.snapshots):
                    with self.lock:
                        del image.snapshots[name]
                    handle.remove_snap(name)
            rbd.RBD().remove(self._ioctx, image.name)
            with self.lock:
                self._images.remove(image)
        return "remove"
