"""The part of librbd that Ceph's Python binding lacks, through ctypes: reads without callbacks.

The binding reports each finished read by a callback in a librbd thread, which must take the GIL to run it. librbd's
event API needs no foreign thread: it counts completions on an eventfd that the trio thread waits for, and returns
them when polled.

There are two kinds of calls:

- **Blocking** (`open_image`, `close`, `info`, `diff`, everything that can wait for the cluster): they
  release the GIL. Call them in a worker thread.
- **Short** (`Image.start_read`, `Image.complete_reads`): they never wait for the cluster, and keep the GIL
  (`ctypes.PyDLL`). In an idle interpreter that is no faster. Beside a busy Python thread, releasing the GIL in each
  call made reads 1.3 to 5 times slower. Call them in one thread, the one that waits for the eventfd.

Close an image before its ioctx and its connection (librados.py): after `shutdown` its close hangs for ever.
"""

import ctypes
import errno
import logging
import os
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_ssize_t, c_uint8, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any, NamedTuple

from rbdfs.ceph.bindings.librados import HANDLE, Ioctx, bind, check, load
from rbdfs.ceph.bindings.malloc import new_buffer
from rbdfs.errors import RbdfsError

log = logging.getLogger(__name__)

OnComplete = Callable[[int, bytes], None]
"""Takes a read's result, a count of bytes or a negative errno, and the buffer. Ignore the buffer if the read was short
or failed."""

_EVENT_TYPE_EVENTFD = 2
_COMPLETIONS_PER_POLL = 64
"""Enough for a burst; librbd keeps an array of this size on its stack."""
_WATCHERS_AT_FIRST = 16


class _ImageInfo(ctypes.Structure):
    """`rbd_image_info_t`."""

    _fields_ = (
        ("size", c_uint64),
        ("obj_size", c_uint64),
        ("num_objs", c_uint64),
        ("order", c_int),
        ("block_name_prefix", ctypes.c_char * 24),
        ("parent_pool", c_int64),
        ("parent_name", ctypes.c_char * 96),
    )


class _Watcher(ctypes.Structure):
    """`rbd_image_watcher_t`."""

    _fields_ = (("address", c_char_p), ("id", c_int64), ("cookie", c_uint64))


_DiffCallback = ctypes.CFUNCTYPE(c_int, c_uint64, c_size_t, c_int, c_void_p)
_Completion = c_size_t  # a rbd_completion_t by its address: ctypes reads it as an int, never as None

_librbd = load("librbd.so.1")
_librbd_short = load("librbd.so.1", ctypes.PyDLL)

_OPEN = (c_void_p, c_char_p, HANDLE, c_char_p)
_rbd_open_by_id_read_only = bind(_librbd, "rbd_open_by_id_read_only", c_int, *_OPEN)
_rbd_open_read_only = bind(_librbd, "rbd_open_read_only", c_int, *_OPEN)
_rbd_snap_set_by_id = bind(_librbd, "rbd_snap_set_by_id", c_int, c_void_p, c_uint64)
_rbd_close = bind(_librbd, "rbd_close", c_int, c_void_p)
_rbd_stat = bind(_librbd, "rbd_stat", c_int, c_void_p, POINTER(_ImageInfo), c_size_t)
_rbd_get_stripe_unit = bind(_librbd, "rbd_get_stripe_unit", c_int, c_void_p, POINTER(c_uint64))
_rbd_get_stripe_count = bind(_librbd, "rbd_get_stripe_count", c_int, c_void_p, POINTER(c_uint64))
_rbd_watchers_list = bind(_librbd, "rbd_watchers_list", c_int, c_void_p, POINTER(_Watcher), POINTER(c_size_t))
_rbd_watchers_list_cleanup = bind(_librbd, "rbd_watchers_list_cleanup", c_int, POINTER(_Watcher), c_size_t)
_rbd_diff_iterate2 = bind(
    _librbd,
    "rbd_diff_iterate2",
    c_int,
    *(c_void_p, c_char_p, c_uint64, c_uint64, c_uint8, c_uint8, _DiffCallback, c_void_p),
)
_rbd_invalidate_cache = bind(_librbd, "rbd_invalidate_cache", c_int, c_void_p)
_rbd_set_image_notification = bind(_librbd, "rbd_set_image_notification", c_int, c_void_p, c_int, c_int)

# Short calls. The buffer is a void pointer here, so that ctypes takes a bytes object as well as an address.
_rbd_aio_create_completion = bind(
    _librbd_short, "rbd_aio_create_completion", c_int, c_void_p, c_void_p, POINTER(_Completion)
)
_rbd_aio_read = bind(_librbd_short, "rbd_aio_read", c_int, c_void_p, c_uint64, c_size_t, c_void_p, c_void_p)
_rbd_poll_io_events = bind(_librbd_short, "rbd_poll_io_events", c_int, c_void_p, POINTER(_Completion), c_int)
_rbd_aio_get_return_value = bind(_librbd_short, "rbd_aio_get_return_value", c_ssize_t, c_void_p)
_rbd_aio_release = bind(_librbd_short, "rbd_aio_release", None, c_void_p)


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """Size and layout of an open image, as librbd knows them. Sizes in bytes."""

    size: int
    object_size: int
    stripe_unit: int
    stripe_count: int


class Diff(NamedTuple):
    """A range of an image that holds data, or that was zeroed (`exists` is False). `offset` is an image offset."""

    offset: int
    length: int
    exists: bool


def _drop(_result: int, _data: bytes) -> None:
    """The callback of a read whose result nobody wants any more."""


class Image:
    """An open image: a `rbd_image_t`."""

    def __init__(self, handle: c_void_p, name: str) -> None:
        self._name = name
        self._handle = handle.value
        # By the address of the completion. Keeps the buffer alive: librbd writes into it until the read completes.
        self._in_flight: dict[int, tuple[OnComplete, bytes]] = {}
        self._new = _Completion()
        self._new_ref = byref(self._new)
        self._polled = (_Completion * _COMPLETIONS_PER_POLL)()

    @property
    def reads_in_flight(self) -> int:
        """The count of reads that were started and have not completed."""
        return len(self._in_flight)

    def start_read(self, offset: int, length: int, callback: OnComplete) -> None:
        """Start a read of `length` bytes at image `offset`; short, keeps the GIL.

        `callback` is called by `complete_reads`. A started read cannot be cancelled. An error of the cluster is its
        result, never an exception here. Raises ValueError if the image is closed.
        """
        if self._handle is None:
            raise ValueError(f"image {self._name} is closed")
        _rbd_aio_create_completion(None, None, self._new_ref)
        completion = self._new.value
        buffer = new_buffer(length)
        self._in_flight[completion] = (callback, buffer)
        _rbd_aio_read(self._handle, offset, length, buffer, completion)

    def complete_reads(self) -> None:
        """Call the callbacks of reads that have completed since the last call; short, keeps the GIL.

        A result is the count of bytes read, or a negative errno. A read across the end of the image is short; one that
        starts at or past the end is -EINVAL. Call it after reading the eventfd, not before, or a completion may be left
        behind unannounced. It may find nothing: a completion is announced just after it can be found. Never raises.
        """
        polled = self._polled
        count = _COMPLETIONS_PER_POLL
        while count == _COMPLETIONS_PER_POLL and self._handle is not None:
            count = _rbd_poll_io_events(self._handle, polled, _COMPLETIONS_PER_POLL)
            for completion in polled[:count]:
                callback, buffer = self._in_flight.pop(completion)
                result = _rbd_aio_get_return_value(completion)
                _rbd_aio_release(completion)
                try:
                    callback(result, buffer)
                except Exception:
                    log.exception("a completion could not be delivered")

    def refuse_reads(self) -> None:
        """End the reads in flight with ESHUTDOWN now. Later answers of the cluster are dropped. Never raises."""
        for completion, (callback, buffer) in list(self._in_flight.items()):
            self._in_flight[completion] = (_drop, buffer)
            try:
                callback(-errno.ESHUTDOWN, b"")
            except Exception:
                log.exception("a completion could not be delivered")

    def close(self) -> None:
        """Wait for the reads in flight, then close; blocking. Reads that `complete_reads` did not see are dropped.

        An interpreter that exits with reads in flight frees their buffers while librbd writes to them, and crashes.
        Nothing else may use the image at the same time. Closing twice does nothing.
        """
        handle, self._handle = self._handle, None
        if handle is None:
            return
        result = _rbd_close(handle)  # unregisters the watch, too
        for completion in self._in_flight:
            _rbd_aio_release(completion)
        self._in_flight.clear()
        check(result, f"cannot close image {self._name}")

    def info(self) -> ImageInfo:
        """Size and layout; blocking: librbd asks the cluster if the header has changed."""
        stat = _ImageInfo()
        result = _rbd_stat(self._handle, byref(stat), ctypes.sizeof(stat))
        check(result, f"cannot stat image {self._name}")
        return ImageInfo(
            size=stat.size,
            object_size=1 << stat.order,
            stripe_unit=self._get(_rbd_get_stripe_unit, "the stripe unit"),
            stripe_count=self._get(_rbd_get_stripe_count, "the stripe count"),
        )

    def invalidate_cache(self) -> None:
        """Empty librbd's own cache; blocking, without a question to the cluster.

        We turn that cache off, but the configuration of a pool or an image overrides the options of a client
        (`ImageCtx::apply_metadata`).
        """
        check(_rbd_invalidate_cache(self._handle), f"cannot invalidate the cache of image {self._name}")

    def watchers(self) -> frozenset[int]:
        """The clients that watch the image's header, by their ids; blocking."""
        count = c_size_t(_WATCHERS_AT_FIRST)
        while True:
            found = (_Watcher * count.value)()
            result = _rbd_watchers_list(self._handle, found, byref(count))
            if result != -errno.ERANGE:  # else `count` is now how many there are
                break
        check(result, f"cannot list the watchers of image {self._name}")
        clients = frozenset(watcher.id for watcher in found[: count.value])
        _rbd_watchers_list_cleanup(found, count)
        return clients

    def diff(
        self,
        offset: int,
        length: int,
        *,
        since_snapshot: str | None = None,
        include_parent: bool = True,
        whole_object: bool = True,
    ) -> list[Diff]:
        """Where a range holds data, or has changed since a snapshot (by its name), by offset; blocking.

        With a valid fast-diff map and `whole_object` it takes milliseconds, else one request for each object.
        """
        found: list[Diff] = []

        def collect(start: int, count: int, exists: int, _: int | None) -> int:
            found.append(Diff(start, count, bool(exists)))
            return 0

        result = _rbd_diff_iterate2(
            self._handle,
            None if since_snapshot is None else os.fsencode(since_snapshot),
            offset,
            length,
            include_parent,
            whole_object,
            _DiffCallback(collect),
            None,
        )
        check(result, f"cannot list the extents of image {self._name}")
        found.sort()
        return found

    def _get(self, function: Callable[..., Any], what: str) -> int:
        value = c_uint64()
        check(function(self._handle, byref(value)), f"cannot get {what} of image {self._name}")
        return value.value


def open_image(
    ioctx: Ioctx, event_fd: int, image_id: str, *, snap_id: int | None = None, by_name: bool = False
) -> Image:
    """Open an image at a snapshot or at HEAD, read-only; `by_name` takes its name for `image_id` (format 1).

    `event_fd` is a non-blocking eventfd that outlives the image; several images may share it. librbd does not check it:
    with a wrong one, completions are never announced. The image is not watched: if it is removed, it reads as zeros,
    without an error.
    """
    function = _rbd_open_read_only if by_name else _rbd_open_by_id_read_only
    handle = c_void_p()
    check(function(ioctx.pointer, os.fsencode(image_id), byref(handle), None), f"cannot open image {image_id}")
    try:
        if snap_id is not None:
            result = _rbd_snap_set_by_id(handle, snap_id)
            check(result, f"cannot open snapshot {snap_id} of image {image_id}")
        result = _rbd_set_image_notification(handle, event_fd, _EVENT_TYPE_EVENTFD)
        check(result, f"cannot set the eventfd of image {image_id}")
    except RbdfsError:
        _rbd_close(handle)
        raise
    return Image(handle, image_id)
