"""What the commands that read one image have in common: find it, open it, say in one line why it failed, close it."""

import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import replace

import trio

from rbdfs.catalog import ImageRef
from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.ceph.image.ceph_image import CephImage
from rbdfs.commands.resolve import resolve
from rbdfs.commands.shutdown import SIGNALLED, exit_at_the_latest, until_signalled
from rbdfs.errors import RbdfsError, UsageError
from rbdfs.spec import ImageSpec

FAILED = 1
WRONG_USAGE = 2


def print_stderr(sentence: str) -> None:
    """Print a line on stderr, beside what the command prints."""
    print(f"rbdfs: {sentence}", file=sys.stderr, flush=True)


class ImageCommand(ABC):
    """The composition root of such a command; a subclass adds its own work."""

    cluster: Cluster
    source: CephImage

    def __init__(self, cluster: ClusterOptions, image: str) -> None:
        """`image` is an image spec, as the rbd command takes it. Raises UsageError."""
        self.spec = ImageSpec.parse(image, default_pool="")
        self.status = 0
        """The exit status."""
        self.lines: Iterable[str] = ()
        """To print on stdout once all is closed: their reader may be slow, or gone."""
        self.closing = AsyncExitStack()
        """Closes what the work has opened, in reverse."""
        self._cluster_options = cluster
        self._failure: RbdfsError | None = None
        self._began = 0.0

    def run(self) -> int:
        """The exit status. Each failure is a line on stderr."""
        trio.run(until_signalled, self._work, self._end)
        for line in self.lines:
            print(line)
        return self.status

    @abstractmethod
    async def work(self) -> None:
        """Do it, and say what was done. Raises RbdfsError."""

    def failed(self, why: str) -> None:
        """Say in one line why the work ended early."""
        print_stderr(why)

    def status_of(self, error: RbdfsError) -> int:
        """The exit status after this error."""
        return WRONG_USAGE if isinstance(error, UsageError) else FAILED

    async def find(self) -> ImageRef:
        """Connect, and find the image. Raises RbdfsError."""
        self.cluster = await Cluster.connect(self._cluster_options, (self.spec.pool,) if self.spec.pool else ())
        self.closing.push_async_callback(self.cluster.aclose)
        if not self.spec.pool:
            self.spec = replace(self.spec, pool=self.cluster.setting("rbd_default_pool"))
        return await resolve(self.cluster, self.spec)

    async def open(self, image: ImageRef) -> CephImage:
        """Open the image that was found. Raises RbdfsError."""
        self.source = await self.cluster.open_image(self.spec, image)
        self.closing.push_async_callback(self.source.close)
        return self.source

    async def warn_of_writers(self, image: ImageRef, command: str) -> None:
        """Warn if somebody may write to the image while it is read. Raises RbdfsError."""
        writers = await self.cluster.writers(image) if image.snapshot_id is None else ()
        if writers:
            snapshot = f"{self.spec}@NAME"
            print_stderr(
                f"warning: {self.spec} may be written to, by {', '.join(writers)}, so its bytes may be of different "
                f"moments; 'rbd snap create {snapshot}' and {command} {snapshot}"
            )

    def concurrency(self, asked_for: int | None) -> int:
        """Reads to keep in flight: as asked for, else as the rbd command does."""
        return asked_for or int(self.cluster.setting("rbd_concurrent_management_ops"))

    @property
    def seconds(self) -> float:
        """How long the work has taken so far."""
        return trio.current_time() - self._began

    async def _work(self) -> None:
        self._began = trio.current_time()
        try:
            await self.work()
        except RbdfsError as error:
            self._failure = error

    async def _end(self, signalled: signal.Signals | None) -> None:
        if signalled is not None:
            self.status = SIGNALLED + signalled
            self.failed(f"stopped by {signalled.name}")
        elif self._failure is not None:
            self.status = self.status_of(self._failure)
            self.failed(str(self._failure))
        with exit_at_the_latest(self.status):
            await self.closing.aclose()
