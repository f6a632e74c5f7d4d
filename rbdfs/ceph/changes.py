"""What others do to an image while it is open here, and how to tell before a reader is told wrong bytes.

librbd reads an object that is gone as zeros, without an error: it cannot tell a hole from what was just removed. And
what holds off a removal (a watch) some keys may not have. So bytes that may be wrong are answered only after a look at
the image that began when they had arrived. What a look relies on is the order in which librbd does things (src/librbd;
seen to happen so with 16.2):

- `rbd rm` moves an image to the trash first, out of the pool's directory, and then removes its objects
  (`api/Image.cc`).
- `rbd resize` removes what is beyond the new end *first*, and says so in the header last (`ResizeRequest`). But whoever
  removes objects holds the exclusive lock or, of an image without that feature, has it open, and so watches it.
- `rbd snap rm` puts the snapshot into its trash first, then removes its data (`SnapshotRemoveRequest`). Reads of a
  snapshot that is gone find zeros, or what was written since.

Format 1 has no trash: of its removal only the remover's watch shows, and of a snapshot's nothing does until it is done.
"""

import errno
import logging
import math
import struct
from collections.abc import Awaitable, Callable, Hashable
from typing import NamedTuple, Protocol

import rbd
import trio

from rbdfs.catalog import ImageRef
from rbdfs.ceph import header, librados
from rbdfs.ceph.aio import Answer
from rbdfs.ceph.directory import DIRECTORY
from rbdfs.ceph.encoding import encode_string
from rbdfs.ceph.read_op import Call, ReadOperations, Request
from rbdfs.errors import RbdfsError, StaleError
from rbdfs.spec import ImageSpec

log = logging.getLogger(__name__)

STRANGER_SECONDS = 5.0
"""How long one who began to write after the image was opened here may be shrinking it, for all that can be seen: until
then zeros wait. `rbd resize` takes milliseconds for each hundred objects; a VM that was started stays."""

LOOK_AGAIN_SECONDS = 0.1

SNAPSHOT_SECONDS = 0.02
"""How long after a look at a snapshot its data is surely there: after `rbd snap rm` has marked it, the monitors gather
for 50 ms (paxos_min_wait) before they tell the OSDs to remove anything."""

# Of librbd's managed lock. The argument of cls_lock's get_info: version 1, compatible with 1, length, the lock's name.
GET_LOCK = Call(b"get_info", struct.pack("<BBI", 1, 1, 4 + len("rbd_lock")) + encode_string("rbd_lock"), b"lock")


class Seen(NamedTuple):
    """An image as it was at one look."""

    size: int
    writers: frozenset[Hashable] = frozenset()
    """Who may write to it, or shrink it."""


class Look(Protocol):
    """Looks at an image. Raises StaleError where it is gone, RbdfsError where that cannot be known."""

    async def __call__(self) -> Seen: ...


Watchers = Callable[[], Awaitable[frozenset[int]]]
"""The clients that watch the image's header."""


def locked_by(info: bytes) -> frozenset[Hashable]:
    """Who holds the lock of an answer of cls_lock's get_info: nobody, or somebody who is no other."""
    (lockers,) = struct.unpack_from("<I", info, 6)
    return frozenset([info]) if lockers else frozenset()


class HeadLook:
    """Looks at the HEAD of an image of format 2."""

    def __init__(
        self,
        spec: ImageSpec,
        image: ImageRef,
        operations: ReadOperations,
        ioctx: librados.Ioctx,
        watchers: Watchers,
        *,
        features: int,
    ) -> None:
        self._spec = spec
        self._operations = operations
        self._watchers = watchers
        self._features = features
        head = struct.pack("<Q", header.HEAD)
        calls = (
            Call(b"get_size", head),
            header.GET_FEATURES,
            GET_LOCK,
        )
        name = Call(b"dir_get_name", encode_string(image.id))
        self._requests = (Request(ioctx, header.object_of(image), calls), Request(ioctx, DIRECTORY, (name,)))

    async def __call__(self) -> Seen:
        """One round trip; two for an image without an exclusive lock."""
        has_lock = bool(self._features & rbd.RBD_FEATURE_EXCLUSIVE_LOCK)
        # Who watches comes before the size: who has shrunk it and is gone has said so.
        what = f"look at {self._spec}"
        try:
            writers: frozenset[Hashable] = frozenset() if has_lock else await self._watchers()
            of_header, of_directory = await self._operations.operate(self._requests)
            (size,) = struct.unpack_from("<Q", of_header.answer(0, what), 1)
            (features,) = struct.unpack_from("<Q", of_header.answer(1, what))
            lockers = locked_by(of_header.answer(2, what))
            of_directory.answer(0, what)
        except RbdfsError as error:
            raise _stale(self._spec) if error.errno == errno.ENOENT else error from error
        if (features ^ self._features) & rbd.RBD_FEATURE_MIGRATING:
            raise StaleError(f"{self._spec} was migrated while it was open: open it again")
        self._features = features
        return Seen(size, lockers if has_lock else writers)


class SnapshotLook:
    """Looks at a snapshot of an image of format 2."""

    def __init__(
        self,
        spec: ImageSpec,
        image: ImageRef,
        operations: ReadOperations,
        ioctx: librados.Ioctx,
        *,
        size: int,
        features: int,
    ) -> None:
        self._spec = spec
        self._operations = operations
        self._size = size
        self._is_migrating = features & rbd.RBD_FEATURE_MIGRATING
        calls = (
            Call(b"snapshot_get", struct.pack("<Q", header.snapshot_id_of(image))),
            header.GET_FEATURES,
        )
        self._request = Request(ioctx, header.object_of(image), calls)

    async def __call__(self) -> Seen:
        """One round trip."""
        reply = await self._operations.ask(self._request)
        what = f"look at {self._spec}"
        try:
            snapshot = header.decode_snapshot(reply.answer(0, what))
            (features,) = struct.unpack_from("<Q", reply.answer(1, what))
        except RbdfsError as error:
            raise _stale(self._spec) if error.errno == errno.ENOENT else error from error
        if not snapshot.is_users:
            raise _stale(self._spec)
        if features & rbd.RBD_FEATURE_MIGRATING != self._is_migrating:
            raise StaleError(f"{self._spec} was migrated while it was open: open it again")
        return Seen(self._size)


class Format1Look:
    """Looks at an image of format 1, or at a snapshot of one."""

    def __init__(
        self,
        spec: ImageSpec,
        image: ImageRef,
        operations: ReadOperations,
        ioctx: librados.Ioctx,
        watchers: Watchers,
    ) -> None:
        self._spec = spec
        self._image = image
        self._operations = operations
        self._request = header.request(ioctx, image)
        self._watchers = watchers

    async def __call__(self) -> Seen:
        """Two round trips."""
        try:
            writers = frozenset() if self._image.snapshot_id is not None else await self._watchers()
            reply = await self._operations.ask(self._request)
            return Seen(header.decode(self._image, reply).size, frozenset(writers))
        except RbdfsError as error:
            raise _stale(self._spec) if error.errno == errno.ENOENT else error from error


def _stale(spec: ImageSpec) -> StaleError:
    return StaleError(f"{spec} was removed while it was open")


OnLooked = Callable[[int | RbdfsError], None]
"""Takes the size in bytes, or why it is not known."""


class Looks:
    """Looks at an image, one at a time: all who ask while one is under way share the next."""

    def __init__(self, look: Look, on_stale: Callable[[], None]) -> None:
        """`on_stale` is called as soon as the image is known to be gone."""
        self.look = look
        self._on_stale = on_stale
        self.in_place = -math.inf
        """When the last one began that found the image in its place."""
        self.stale: StaleError | None = None
        """That the image is gone. It does not come back."""
        self._waiting: list[OnLooked] = []
        self._is_looking = False
        self._known: frozenset[Hashable] | None = None
        self._first_seen: dict[Hashable, float] = {}

    async def begin(self) -> None:
        """Who writes to the image now writes to it as well when it is read. Raises what a look raises."""
        self._known = (await self.look()).writers

    def mark_stale(self, error: StaleError) -> None:
        """The image was found to be gone."""
        self.stale = error
        self._on_stale()

    def ask(self, oncomplete: OnLooked) -> None:
        """Look at the image, and call `oncomplete` later, in the trio thread."""
        self._waiting.append(oncomplete)
        if not self._is_looking:
            self._is_looking = True
            trio.lowlevel.spawn_system_task(self._run)

    async def settled_size(self) -> int:
        """As `ask`, for a task that waits."""
        answer: Answer[int | RbdfsError] = Answer()
        self.ask(answer.give)
        looked = await answer.get()
        if isinstance(looked, RbdfsError):
            raise looked
        return looked

    async def _run(self) -> None:
        while self._waiting:
            asked, self._waiting = self._waiting, []
            answer: int | RbdfsError
            try:
                answer = await self._settled_size()
            except RbdfsError as error:
                answer = error
            except Exception as error:
                log.exception("a look at an image failed")
                answer = RbdfsError(f"cannot look at an image: {error}")
            if isinstance(answer, StaleError):
                self.mark_stale(answer)
            for oncomplete in asked:
                oncomplete(answer)
        self._is_looking = False

    async def _settled_size(self) -> int:
        """The size, once nobody who came after us can be about to change it."""
        size = None
        while True:
            began = trio.current_time()
            seen = await self.look()
            self.in_place = began
            if self._known is None:
                self._known = seen.writers
            strangers = seen.writers - self._known
            if not strangers or (size is not None and seen.size < size):
                return seen.size
            size = seen.size
            if all(began - self._first_seen.setdefault(writer, began) > STRANGER_SECONDS for writer in strangers):
                self._known |= strangers
                return size
            await trio.sleep(LOOK_AGAIN_SECONDS)
