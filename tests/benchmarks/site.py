"""Where a run takes place: a folder with a cluster of its own, the images in it, and room for copies of them."""

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import rbd

from rbdfs.devcluster.cluster import Devcluster, DevclusterOptions
from tests.benchmarks import crowd
from tests.cluster import Ceph

MIB = 1 << 20
GIB = 1 << 30

BIG = "big"
"""Random bytes, as many as `--size` says."""
QUARTERS = ("quarter0", "quarter1", "quarter2", "quarter3")
"""Random bytes, together as many as BIG: copying BIG, and copying all of these, write as much to the disk."""
FITS = "fits"
"""Random bytes that the cache can hold, next to what is in flight."""
FITS_BYTES = 192 * MIB
EMPTY = "empty"
"""No bytes at all: what reads it only starts up."""
THIN = "thin"
"""What a virtual machine's image is like: 100 GiB, of which 10 objects exist. In a pool of its own."""
THIN_BYTES = 100 * GIB
THIN_POOL = "thin"
THIN_NEIGHBOURS = 9
"""More images in that pool, for `du`: 10 GiB each, of which one object exists."""
MANY = "many0"
"""The first of MANY_COUNT empty images, in a pool of their own."""
MANY_POOL = "many"
MANY_COUNT = 2000
LARGE = {
    crowd.CROWD: (crowd.CROWD_POOL, crowd.make_crowd),
    crowd.SNAPPED: (crowd.SNAPPED_POOL, crowd.make_snapped),
    crowd.VAST: (crowd.VAST_POOL, crowd.make_vast),
    crowd.SPACES: (crowd.SPACES_POOL, crowd.make_spaces),
}
"""Each in a pool of its own, with BESIDE: random bytes to be read while the others are looked at."""
BESIDE = "beside"
BESIDE_BYTES = 16 * MIB

CHANGED = "changed"
"""100 GiB that hold four times as much as BIG, with three snapshots: to `s2` one object in a hundred of these was
written anew, to `s3` CHANGED_PAGES pages anywhere in them."""
CHANGED_PAGES = 10_000
PAGE = 4096

OBJECT_BYTES = 4 * MIB
LATENCY = "ms_inject_delay_type = osd\nms_inject_delay_max = 0.02\nms_inject_delay_probability = 1\n"
"""For [global] of a client's ceph.conf: each message from an OSD comes 0-20 ms late."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image that was made for this run."""

    pool: str
    name: str
    size: int
    held_bytes: int
    """In whole objects."""
    sha256: str
    """Of all bytes; empty for a thin image."""


@dataclass(frozen=True, slots=True)
class Site:
    """A running cluster with its images. All of it is in one folder, on disk, and goes with it."""

    folder: Path
    conf: Path
    slow_conf: Path
    """The same cluster, further away: with LATENCY."""
    rbdfs_arguments: Sequence[str]
    """For `rbdfs mount`, beyond the defaults."""
    images: Mapping[str, Image] = field(default_factory=dict)

    @property
    def thin_pool_bytes(self) -> int:
        """What all images of THIN_POOL hold."""
        return sum(image.held_bytes for image in self.images.values() if image.pool == THIN_POOL)


@contextlib.contextmanager
def site(names: Iterable[str], size: int, rbdfs_arguments: Sequence[str]) -> Iterator[Site]:
    """Bring up a cluster with these images, and leave nothing of it behind, whatever happens.

    In TMPDIR if set, else in /var/tmp, which is on a disk where /tmp may not be.
    """
    folder = Path(tempfile.mkdtemp(prefix="rbdfs-benchmarks-", dir=os.environ.get("TMPDIR", "/var/tmp")))  # noqa: S108
    cluster = Devcluster(DevclusterOptions(folder / "cluster"))
    try:
        cluster.up()
        slow_conf = folder / "slow.conf"
        slow_conf.write_text(cluster.conf.read_text().replace("[global]\n", f"[global]\n{LATENCY}", 1))
        ceph = Ceph(cluster)
        try:
            images = {image.name: image for name in names for image in _make(ceph, name, size)}
            _keep_in_memory(ceph, images.values())
        finally:
            ceph.close()
        yield Site(folder, cluster.conf, slow_conf, rbdfs_arguments, images)
    finally:
        _unmount_all(folder)
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)


def _make(ceph: Ceph, name: str, size: int) -> Iterator[Image]:
    if name == THIN:
        ceph.make_pool(THIN_POOL)
        yield _make_thin(ceph, THIN, THIN_BYTES, objects=10)
        for number in range(THIN_NEIGHBOURS):
            yield _make_thin(ceph, f"neighbour{number}", 10 * GIB, objects=1)
    elif name == MANY:
        ceph.make_pool(MANY_POOL)
        with ceph.ioctx(MANY_POOL) as ioctx, ThreadPoolExecutor() as threads:
            create = partial(rbd.RBD().create, ioctx, size=10 * GIB, old_format=False)
            list(threads.map(create, (f"many{number}" for number in range(MANY_COUNT))))
        yield Image(MANY_POOL, MANY, 10 * GIB, 0, "")
    elif name in LARGE:
        pool, make = LARGE[name]
        size = make(ceph)
        ceph.make_image(BESIDE, os.urandom(BESIDE_BYTES), pool=pool)
        yield Image(pool, name, size, 0, "")
    elif name == CHANGED:
        yield _make_changed(ceph, 4 * size)
    else:
        yield _make_full(ceph, name, {BIG: size, FITS: FITS_BYTES, EMPTY: 0}.get(name, size // len(QUARTERS)))


def _make_full(ceph: Ceph, name: str, size: int) -> Image:
    ceph.run("rbd", "create", "--size", f"{size}B", f"rbd/{name}")
    digest = hashlib.sha256()
    step = 8 * OBJECT_BYTES
    for start in range(0, size, step):
        piece = os.urandom(min(step, size - start))
        digest.update(piece)
        ceph.write_image(name, piece, start)
    return Image("rbd", name, size, size, digest.hexdigest())


def _make_thin(ceph: Ceph, name: str, size: int, objects: int) -> Image:
    ceph.run("rbd", "create", "--size", f"{size}B", f"{THIN_POOL}/{name}")
    for number in range(objects):
        ceph.write_image(name, os.urandom(OBJECT_BYTES), number * (size // objects), pool=THIN_POOL)
    return Image(THIN_POOL, name, size, objects * OBJECT_BYTES, "")


def _make_changed(ceph: Ceph, held: int) -> Image:
    ceph.run("rbd", "create", "--size", f"{THIN_BYTES}B", f"rbd/{CHANGED}")
    source = random.Random(1)
    starts = [
        number * OBJECT_BYTES for number in source.sample(range(THIN_BYTES // OBJECT_BYTES), held // OBJECT_BYTES)
    ]
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, CHANGED) as image:
        for start in starts:
            image.write(os.urandom(OBJECT_BYTES), start)
        image.create_snap("s1")
        for start in starts[::100]:
            image.write(os.urandom(OBJECT_BYTES), start)
        image.create_snap("s2")
        for _ in range(CHANGED_PAGES):
            image.write(os.urandom(PAGE), source.choice(starts) + source.randrange(0, OBJECT_BYTES, PAGE))
        image.create_snap("s3")
    return Image("rbd", CHANGED, THIN_BYTES, held, "")


def _keep_in_memory(ceph: Ceph, images: Iterable[Image]) -> None:
    """Let the OSD hold all images in its memory, so that every client is measured and no disk."""
    held = sum(image.held_bytes for image in images)
    ceph.run("ceph", "config", "set", "osd", "osd_memory_target", str(held + 3 * GIB))


def _unmount_all(folder: Path) -> None:
    """What an interrupted measurement may have left."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        mountpoint = line.split()[1]
        if Path(mountpoint).is_relative_to(folder):
            unmount(Path(mountpoint))


def unmount(mountpoint: Path) -> None:
    """Lazily: also what hangs, or is in use, goes."""
    command = ("umount", "-l") if os.geteuid() == 0 else ("fusermount3", "-uz")
    subprocess.run((*command, os.fspath(mountpoint)), check=False, capture_output=True)
