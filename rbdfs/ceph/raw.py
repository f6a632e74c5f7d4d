"""The shortcut to one image: it is open in librbd once more, for reads by C calls alone (rbdfs/shortcut.py)."""

import logging
from collections.abc import Callable

import trio

from rbdfs.ceph import librbd
from rbdfs.ceph.aio import ReadHandle
from rbdfs.errors import RbdfsError
from rbdfs.shortcut import RawImage, Shortcut
from rbdfs.spec import ImageSpec
from rbdfs.threads import in_thread_to_its_end

log = logging.getLogger(__name__)

IN_FLIGHT_SECONDS = 0.005
"""How often a shortcut that is being closed is asked whether librbd has answered its last reads."""


class RawReads:
    """An image's shortcut, if it has one."""

    def __init__(self, spec: ImageSpec) -> None:
        self._spec = spec
        self._lock = trio.Lock()
        self._made: tuple[librbd.Image[None], Shortcut] | None = None

    async def begin(
        self, handle: ReadHandle, make: Callable[[RawImage], Shortcut], *, is_constant: bool
    ) -> Shortcut | None:
        """The shortcut, made by `make` if there is none; None where `handle` cannot be read so. Raises RbdfsError."""
        async with self._lock:
            if self._made is None:
                image = await in_thread_to_its_end(handle.open_raw)
                if image is None:
                    return None
                try:
                    info = await in_thread_to_its_end(image.info)
                    raw = RawImage(image.address, *librbd.RAW_CALLS, info.size, 1 << info.order, is_constant)
                    self._made = image, make(raw)
                except BaseException:
                    with trio.CancelScope(shield=True):
                        await in_thread_to_its_end(image.close)
                    raise
            return self._made[1]

    def open(self, seconds: float) -> None:
        """See `Shortcut.open`."""
        if self._made is not None:
            self._made[1].open(seconds)

    async def close(self) -> None:
        """No read takes it any more; wait for those that did."""
        async with self._lock:
            if self._made is None:
                return
            (image, shortcut), self._made = self._made, None
            shortcut.open(0.0)
            while shortcut.in_flight:  # noqa: ASYNC110  (there is no event: nobody in Python hears of them)
                await trio.sleep(IN_FLIGHT_SECONDS)
            try:
                await in_thread_to_its_end(image.close)
            except RbdfsError as error:
                log.warning("%s could not be closed in good order: %s", self._spec, error)
