"""What the images of a cluster hold, in memory: what a mount shows is compared with it. Pure: no Ceph, no clock."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

BLOCK_BYTES = 4096
"""What an older descriptor may see of different times. No object and no stripe unit is smaller."""


class Place(NamedTuple):
    """A pool or a namespace."""

    pool: str
    namespace: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, self))


class Spec(NamedTuple):
    """Where an image is."""

    place: Place
    name: str

    def __str__(self) -> str:
        return f"{self.place}/{self.name}"


class Version(NamedTuple):
    """What was there from some time on."""

    content: bytes
    since: float


class Readable:
    """HEAD of an image, or a snapshot: what it holds, and what it held before."""

    def __init__(self, content: bytes, now: float) -> None:
        self.versions = [Version(content, now)]
        self.disturbed = 0
        """How often something was done to it after which older descriptors may get errors for good."""

    @property
    def content(self) -> bytes:
        """What it holds now."""
        return self.versions[-1].content

    def become(self, content: bytes, now: float) -> None:
        """It holds something else from now on."""
        if content != self.content:
            self.versions.append(Version(content, now))

    def write(self, offset: int, data: bytes, now: float) -> None:
        """Within its size."""
        self.become(self.content[:offset] + data + self.content[offset + len(data) :], now)

    def since(self, time: float) -> list[bytes]:
        """All that it held at some time since then."""
        first = len(self.versions) - 1
        while first and self.versions[first].since >= time:
            first -= 1
        return [version.content for version in self.versions[first:]]


class Image(Readable):
    """An image and its snapshots."""

    def __init__(self, content: bytes, now: float, parent: "Image | None" = None) -> None:
        super().__init__(content, now)
        self.ids: list[str] = []
        """All that it had; a migration gives it another."""
        self.snapshots: dict[str, Readable] = {}
        self.parent: Image | None = None
        self.children: list[Image] = []
        self.before_migration: Before | None = None
        """Not None in the middle of a migration."""
        self.link(parent)

    @property
    def id(self) -> str:
        """The present one."""
        return self.ids[-1]

    @property
    def depth(self) -> int:
        """How many ancestors it has."""
        return self.parent.depth + 1 if self.parent else 0

    def link(self, parent: "Image | None") -> None:
        """It is a clone of this image from now on."""
        if self.parent:
            self.parent.children.remove(self)
        if parent:
            parent.children.append(self)
        self.parent = parent

    def disturb(self, *, descendants: bool = False) -> None:
        """What was done to the image may be an error to its readers."""
        self.disturbed += 1
        for snapshot in self.snapshots.values():
            snapshot.disturbed += 1
        if descendants:
            for child in self.children:
                child.disturb(descendants=True)


class Before(NamedTuple):
    """An image before its migration: what it is again if that is aborted."""

    spec: Spec
    content: bytes
    snapshots: dict[str, Readable]


@dataclass(slots=True)
class Reference:
    """All images, by name, and those that had a name a moment ago."""

    images: dict[Spec, Image] = field(default_factory=dict)
    trash: dict[Image, Spec] = field(default_factory=dict)
    _left: dict[Spec, list[tuple[float, Image | None]]] = field(default_factory=dict)

    def bind(self, spec: Spec, image: Image | None, now: float) -> None:
        """The name is this image's from now on, or nobody's."""
        self._left.setdefault(spec, []).append((now, self.images.pop(spec, None)))
        if image is not None:
            self.images[spec] = image

    def bound(self, spec: Spec, since: float) -> set[Image | None]:
        """What had this name at some time since then; None stands for nothing."""
        return {self.images.get(spec), *(image for until, image in self._left.get(spec, ()) if until >= since)}

    def spec(self, image: Image) -> Spec:
        """Where an image is. Raises StopIteration if it has no name."""
        return next(spec for spec, each in self.images.items() if each is image)

    def in_place(self, place: Place) -> dict[str, Image]:
        """The images of a pool or namespace, by name."""
        return {spec.name: image for spec, image in self.images.items() if spec.place == place}


class Descriptor:
    """What one open() may see: what was there then, or at any time since."""

    def __init__(self, readable: Readable) -> None:
        self.readable = readable
        self._first = len(readable.versions) - 1
        self._disturbed = readable.disturbed

    @property
    def contents(self) -> list[bytes]:
        """All that was there, the newest last."""
        return [version.content for version in self.readable.versions[self._first :]]

    @property
    def may_fail(self) -> bool:
        """Whether a read may be an error."""
        return self.readable.disturbed > self._disturbed

    def wrong_read(self, offset: int, length: int, data: bytes) -> str | None:
        """What is wrong with this answer to a read; None if nothing is."""
        contents = self.contents
        if any(data == content[offset : offset + length] for content in contents):
            return None
        lengths = {len(content[offset : offset + length]) for content in contents}
        if len(data) not in lengths:
            return f"{len(data)} bytes instead of {sorted(lengths)}"
        wrong = differing(data, *contents, offset=offset)
        return f"what never was there, in {len(wrong)} blocks: {_short(wrong)}" if wrong else None

    def wrong_holes(self, holes: Iterable[tuple[int, int]]) -> str | None:
        """What is wrong with these holes (start, end); None if nothing is."""
        contents = self.contents
        wrong = [
            start
            for hole, hole_end in holes
            for start, end in blocks(hole, hole_end - hole)
            if not any(is_zeros(content[start:end]) for content in contents)
        ]
        return f"data is taken for a hole, in {len(wrong)} blocks: {_short(wrong)}" if wrong else None


def differing(data: bytes, *contents: bytes, offset: int = 0) -> list[int]:
    """Where the blocks begin that none of the contents has there; the data is theirs from `offset` on."""
    return [
        start
        for start, end in blocks(offset, len(data))
        if not any(data[start - offset : end - offset] == content[start:end] for content in contents)
    ]


def is_zeros(data: bytes) -> bool:
    """Whether there is nothing else."""
    return data.count(0) == len(data)


def blocks(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The blocks of a range, as (start, end), cut to it."""
    end = offset + length
    while offset < end:
        stop = min(end, (offset // BLOCK_BYTES + 1) * BLOCK_BYTES)
        yield offset, stop
        offset = stop


def _short(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
