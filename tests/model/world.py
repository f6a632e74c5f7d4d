"""The real side of the model: a cluster, another client of it, and a mount in each mode."""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import rados
import rbd

from tests.cluster import Ceph, wait_until
from tests.model.reference import Place
from tests.truth import Mode, ModeMounts

POOL, NAMESPACE, OTHER_POOL, DATA_POOL = "model", "inner", "model-other", "model-data"
PLACES = (Place(POOL), Place(POOL, NAMESPACE), Place(OTHER_POOL))
KEPT_OBJECTS = ("rbd_info",)
"""What belongs to a pool and not to an image."""
HUNG_SECONDS = 180.0

CLIENT = {
    "rbd_skip_partial_discard": "false",  # a discard is exact, whatever the size of the objects
    "rbd_atime_update_interval": "0",
}


class World:
    """What all examples share: they leave it as they found it, but for what was counted."""

    def __init__(self, ceph: Ceph, folder: Path, modes: Sequence[Mode]) -> None:
        self.ceph = ceph
        self.modes = modes
        self.folder = folder
        self.examples = 0
        self.steps: Counter[str] = Counter()
        self.by_mode: dict[Mode, Counter[str]] = defaultdict(Counter)
        self._mounts = ModeMounts(ceph, lambda: Path(tempfile.mkdtemp(dir=folder)), "tests.model.mount")
        self.client = connect(ceph)
        self.writer = connect(ceph)
        """Another client again, whose images stay open."""
        for pool in (POOL, OTHER_POOL, DATA_POOL):
            ceph.make_pool(pool)
        self._ioctxs = {place: self.ioctx(self.client, place) for place in PLACES if not place.namespace}
        self._make_namespace()
        self._ioctxs |= {place: self.ioctx(self.client, place) for place in PLACES if place.namespace}

    @staticmethod
    def ioctx(client: rados.Rados, place: Place) -> rados.Ioctx:
        """A place, to work on images in."""
        ioctx = client.open_ioctx(place.pool)
        ioctx.set_namespace(place.namespace)
        return ioctx

    def at(self, place: Place) -> rados.Ioctx:
        """A place, as the other client has it."""
        return self._ioctxs[place]

    def path(self, mode: Mode, place: Place) -> Path:
        """The directory of a place."""
        return self._mounts.get(mode).path / str(place)

    @contextlib.contextmanager
    def example(self) -> Iterator[None]:
        """Afterwards all images are gone, and all mounts still run."""
        self.examples += 1
        mounts = [self._mounts.get(mode) for mode in self.modes]
        with watchdog([mount.pid for mount in mounts]):
            try:
                yield
            finally:
                self.clean()
        dead = [mode for mode, mount in zip(self.modes, mounts, strict=True) if not mount.is_running]
        assert not dead, f"these mounts have died: {dead}"

    def clean(self) -> None:
        """Remove all images, by their objects: librbd cannot remove one whose migration was aborted."""
        for pool in (POOL, OTHER_POOL, DATA_POOL):
            with self.client.open_ioctx(pool) as ioctx:
                ioctx.set_namespace(rados.LIBRADOS_ALL_NSPACES)
                for each in ioctx.list_objects():
                    if each.key not in KEPT_OBJECTS:
                        with contextlib.suppress(rados.ObjectNotFound):  # it has only snapshots left
                            each.remove()
        self._make_namespace()

    def _make_namespace(self) -> None:
        rbd.RBD().namespace_create(self._ioctxs[Place(POOL)], NAMESPACE)

    def close(self) -> None:
        """Unmount and disconnect."""
        self._mounts.end()
        for ioctx in self._ioctxs.values():
            ioctx.close()
        for client in (self.client, self.writer):
            client.shutdown()

    def summary(self) -> str:
        """What was done, for a person."""
        lines = [f"{self.examples} examples, {self.steps.total()} steps"]
        lines += [f"  {count:7} {name}" for name, count in sorted(self.steps.items())]
        for mode in self.modes:
            counts = self.by_mode[mode]
            what = ", ".join(f"{counts[name]:,} {name}" for name in ("opens", "reads", "bytes", "seeks", "errors"))
            lines.append(f"  {', '.join(mode)}: {what}")
        return "\n".join(lines)


def connect(ceph: Ceph) -> rados.Rados:
    """A client of its own."""
    client = rados.Rados(conffile=os.fspath(ceph.conf), conf=CLIENT)
    client.connect()
    return client


@contextlib.contextmanager
def watchdog(pids: Sequence[int]) -> Iterator[None]:
    """Who waits for a mount for ever cannot be killed: the mounts can."""

    def kill() -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(HUNG_SECONDS, kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def world(ceph: Ceph, modes: Sequence[Mode]) -> Iterator[World]:
    """A world, until the end."""
    folder = Path(tempfile.mkdtemp(prefix="rbdfs-model-"))
    try:
        made = World(ceph, folder, modes)
        try:
            yield made
        finally:
            made.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def retried(action: Callable[[], object]) -> None:
    """Do what a watch of a moment ago may still hold off."""

    def succeeds() -> bool:
        try:
            action()
        except rbd.ImageBusy:
            return False
        return True

    wait_until(succeeds, 5)
