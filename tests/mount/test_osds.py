"""Three OSDs, as in a real cluster: replicated pools and erasure-coded data, while OSDs die and objects are damaged.

All images of this cluster have their data in the erasure-coded pool, unless a test says otherwise. The tests that are
imported run on a single OSD, too.
"""

import errno
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import PIPE

import pytest
import rados
import rbd

from rbdfs.ceph.placement import NO_OSD
from rbdfs.devcluster.cluster import EC_POOL
from tests.cluster import MIB, Ceph, Mount, random_bytes, rbdfs, running_ceph, wait_until
from tests.mount.test_open import (
    kinds,  # noqa: F401  (a fixture)
)
from tests.mount.test_open import (
    test_every_kind_of_image_and_its_snapshot_are_what_rbd_export_reads as test_every_kind_of_image_with_coded_data,  # noqa: F401
)
from tests.mount.test_sparse import (
    test_du_says_what_rbd_du_says as test_du_of_images_with_coded_data,  # noqa: F401
)
from tests.mount.test_sparse import (
    test_every_copy_of_a_random_pattern_is_what_rbd_export_reads as test_every_copy_of_coded_data,  # noqa: F401
)
from tests.mount.test_sparse import (
    test_seeks_agree_at_every_boundary_with_what_rbd_diff_says as test_seeks_in_coded_data,  # noqa: F401
)
from tests.mount.test_sparse import (
    test_the_blocks_of_a_clone_are_what_it_reads_its_parents_included as test_a_clone_of_coded_data,  # noqa: F401
)

Mounts = Callable[..., Mount]

REPLICATED = "rbd"
POOLS = (REPLICATED, EC_POOL)
OBJECTS = 24
DEFAULT_OSD_TIMEOUT = 120.0
"""Seconds."""
PIECE = 4096
"""Bytes that lie together on a disk: a block of bluestore; what the shards of an erasure-coded object take in turns."""


@pytest.fixture(scope="module")
def ceph() -> Iterator[Ceph]:
    """Three OSDs."""
    with running_ceph(osds=3) as first:
        first.run("ceph", "config", "set", "client", "rbd_default_data_pool", EC_POOL)
        # A test that fails must not leave the next ones, or the end, waiting for an OSD.
        first.run("ceph", "config", "set", "client", "rados_osd_op_timeout", "60")
        ceph = Ceph(first.devcluster)  # who was connected before has the old settings
        try:
            yield ceph
        finally:
            ceph.close()


@contextmanager
def dead(ceph: Ceph, *osds: int) -> Iterator[None]:
    """Kill these OSDs, and start them again at the end; then all placement groups answer."""
    for osd in osds:
        ceph.devcluster.kill_daemon(f"osd.{osd}")
    with ExitStack() as stack:
        for osd in reversed(osds):
            stack.callback(ceph.devcluster.start_daemon, f"osd.{osd}")
        yield
    for pool in POOLS:
        with ceph.ioctx(pool) as ioctx:
            for number in range(512):  # that one of 32 groups has none of these names is as good as impossible
                with suppress(rados.ObjectNotFound):
                    ioctx.stat(f"any{number}")


def make_image(ceph: Ceph, data_pool: str, name: str, seed: int = 1) -> bytes:
    """An image of 24 objects of 1 MiB, which lie in this pool. Its content."""
    content = random_bytes(OBJECTS * MIB, seed)
    with ceph.ioctx() as ioctx:
        # The data pool of an image in `rbd` that has none of its own is `rbd`, whatever the default is.
        rbd.RBD().create(ioctx, name, len(content), order=20, old_format=False, data_pool=data_pool)
    ceph.write_image(name, content)
    return content


def objects_of(ceph: Ceph, name: str) -> list[str]:
    """The names of an image's objects, in order."""
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name, read_only=True) as image:
        return [f"{image.block_name_prefix()}.{number:016x}" for number in range(OBJECTS)]


def acting(ceph: Ceph, pool: str, object_name: str) -> list[int]:
    """The OSDs of an object, as `ceph osd map` has them."""
    said = json.loads(ceph.tell_mon("osd map", pool=pool, object=object_name, format="json"))
    return list(said["acting"])


def primary(ceph: Ceph, pool: str, object_name: str) -> int:
    """The OSD that clients ask for an object."""
    return next(osd for osd in acting(ceph, pool, object_name) if osd != NO_OSD)


def has_data(ceph: Ceph, osd: int, pool: str, object_name: str) -> bool:
    """Whether an OSD has a copy of an object, or one of its data shards."""
    return osd in acting(ceph, pool, object_name)[: 2 if pool == EC_POOL else 3]


def readers(ceph: Ceph, pool: str, object_name: str) -> list[int]:
    """The OSDs that a read of an object needs as long as all are well: the primary, or all that have a data shard."""
    return acting(ceph, pool, object_name)[: 2 if pool == EC_POOL else 1]


def test_the_images_of_this_file_have_coded_data(ceph: Ceph, kinds: dict[str, bytes]) -> None:  # noqa: F811
    infos = {spec: json.loads(ceph.run("rbd", "info", "--format", "json", spec)) for spec in kinds if "@" not in spec}
    others = {spec: info.get("data_pool") for spec, info in infos.items() if info.get("data_pool") != EC_POOL}
    assert others == {"rbd/data-pool": "kinds-data", "rbd/format-1": None}


def test_an_osd_that_dies_while_cp_runs_costs_no_error_and_no_wrong_byte(ceph: Ceph, mounts: Mounts) -> None:
    names = {pool: ceph.unique("dies") for pool in POOLS}
    content = {pool: make_image(ceph, pool, name) for pool, name in names.items()}
    mount = mounts("--cache-size", "4M")  # so that most is read when the OSD is dead
    needed = {
        pool: Counter(osd for each in objects_of(ceph, name)[OBJECTS // 2 :] for osd in readers(ceph, pool, each))
        for pool, name in names.items()
    }
    victim = max(range(3), key=lambda osd: min(needed[pool][osd] for pool in POOLS))
    assert all(needed[pool][victim] for pool in POOLS)
    copied: dict[str, bytes] = {}
    with ExitStack() as copies:
        running = {
            pool: copies.enter_context(subprocess.Popen(["cp", mount.image(name), "/dev/stdout"], stdout=PIPE))
            for pool, name in names.items()
        }
        for pool, cp in running.items():
            assert cp.stdout is not None
            copied[pool] = cp.stdout.read(MIB)
        with dead(ceph, victim):
            for pool, cp in running.items():
                assert cp.stdout is not None
                copied[pool] += cp.stdout.read()
                assert cp.wait(60) == 0
    assert copied == content


def test_pools_below_min_size_wait_for_an_osd_and_fail_after_osd_timeout(ceph: Ceph, mounts: Mounts) -> None:
    names = {pool: ceph.unique("below") for pool in POOLS}
    content = {pool: make_image(ceph, pool, name) for pool, name in names.items()}
    patient, hasty = mounts(), mounts("--osd-timeout", "5")
    hasty.expect("ERROR", "WARNING")
    with ExitStack() as files, ThreadPoolExecutor() as threads:

        def opened(mount: Mount) -> dict[str, int]:
            return {
                pool: files.enter_context(mount.image(name).open("rb", buffering=0)).fileno()
                for pool, name in names.items()
            }

        waiting, failing = opened(patient), opened(hasty)
        objects = {pool: objects_of(ceph, name) for pool, name in names.items()}
        with dead(ceph, 0):
            # Otherwise the monitor may think that 1 died first and 0 served writes without it: what is erasure-coded
            # would then wait for 0.
            wait_until(lambda: 0 not in acting(ceph, REPLICATED, names[REPLICATED]))
            # What the last OSD is the primary of, it may serve for 2 s more.
            others = {
                pool: next(n for n, each in enumerate(objects[pool]) if primary(ceph, pool, each) == 1)
                for pool in POOLS
            }
            with dead(ceph, 1):
                reads = {pool: threads.submit(os.pread, waiting[pool], len(content[pool]), 0) for pool in POOLS}
                for pool in POOLS:
                    with pytest.raises(TimeoutError):
                        os.pread(failing[pool], MIB, others[pool] * MIB)
                    assert not reads[pool].done()
            # Two of three are enough. `--osd-timeout` ends what is never answered.
            assert {pool: read.result(DEFAULT_OSD_TIMEOUT + 10) for pool, read in reads.items()} == content
        for pool in POOLS:
            wait_until(lambda pool=pool: read_or_time_out(failing[pool], len(content[pool])) == content[pool], 150)  # type: ignore[misc]


def read_or_time_out(descriptor: int, length: int, offset: int = 0) -> bytes:
    """Nothing, if no OSD answered."""
    try:
        return os.pread(descriptor, length, offset)
    except TimeoutError:
        return b""


def test_map_says_none_for_the_osd_of_a_shard_that_is_missing(ceph: Ceph) -> None:
    name = ceph.unique("mapped")
    make_image(ceph, EC_POOL, name)
    objects = objects_of(ceph, name)
    with dead(ceph, 1):
        wait_until(lambda: NO_OSD in acting(ceph, EC_POOL, objects[0]))
        table = rbdfs("map", f"rbd/{name}", conf=ceph.conf).stdout.splitlines()[-OBJECTS:]
        extents = json.loads(rbdfs("map", "--json", f"rbd/{name}", conf=ceph.conf).stdout)["extents"]
        for number, each in enumerate(objects):
            said = ceph.run("ceph", "osd", "map", EC_POOL, each) if number < 2 else None
            osds = acting(ceph, EC_POOL, each)
            assert extents[number]["osds"] == osds
            shown = ",".join("none" if osd == NO_OSD else str(osd) for osd in osds)
            assert table[number].split()[-1] == shown
            assert said is None or f"acting ([{shown.upper()}]" in said


def data_of(descriptor: int) -> Iterator[tuple[int, bytes]]:
    """What a sparse file holds: offsets and bytes."""
    end = 0
    while (start := seek_data(descriptor, end)) is not None:
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, os.pread(descriptor, end - start, start)


def seek_data(descriptor: int, start: int) -> int | None:
    """Where the next data begin, if there are any."""
    try:
        return os.lseek(descriptor, start, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def damage(ceph: Ceph, osd: int, pieces: AbstractSet[bytes]) -> int:
    """Spoil these pieces on the disk of an OSD that is dead, if it has them. How many it had."""
    found = 0
    with (ceph.conf.parent / f"osd{osd}" / "block").open("r+b") as block:
        for start, data in data_of(block.fileno()):
            for at in range(0, len(data), PIECE):
                piece = data[at : at + PIECE]
                if piece in pieces:
                    os.pwrite(block.fileno(), bytes(byte ^ 0xFF for byte in piece), start + at)
                    found += 1
    return found


def lose(ceph: Ceph, osd: int, object_name: str) -> None:
    """Remove an object from an OSD that is dead, behind Ceph's back."""
    tool = ("ceph-objectstore-tool", "--data-path", str(ceph.conf.parent / f"osd{osd}"))
    (found,) = ceph.run(*tool, "--op", "list", object_name).splitlines()
    ceph.run(*tool, found, "remove")


def pieces(pool: str, content: bytes, numbers: Iterable[int]) -> set[bytes]:
    """The first pieces of these objects of an image, as OSDs have them on their disks."""
    starts = (number * MIB + shard * PIECE for number in numbers for shard in range(2 if pool == EC_POOL else 1))
    return {content[start : start + PIECE] for start in starts}


def test_objects_that_are_damaged_or_lost_on_one_osd_are_read_right(ceph: Ceph, mount: Mount) -> None:
    mount.expect("WARNING")  # OSDs that have just begun may take long to let an image be closed
    names = {pool: ceph.unique("damaged") for pool in POOLS}
    content = {pool: make_image(ceph, pool, name, seed=ord(pool[0])) for pool, name in names.items()}
    first = {pool: objects_of(ceph, name)[0] for pool, name in names.items()}
    second = {pool: acting(ceph, pool, first[pool])[1] for pool in POOLS}
    on_0 = {pool: sum(has_data(ceph, 0, pool, each) for each in objects_of(ceph, names[pool])[1:]) for pool in POOLS}
    with dead(ceph, 0, 1, 2):
        for pool in POOLS:
            assert damage(ceph, 0, pieces(pool, content[pool], range(1, OBJECTS))) >= on_0[pool] > 0
            lose(ceph, second[pool], first[pool])
    for pool, name in names.items():
        assert mount.image(name).read_bytes() == content[pool]
        assert ceph.exported(name) == content[pool]


def test_an_object_that_is_damaged_on_all_osds_is_an_error(ceph: Ceph, mounts: Mounts, tmp_path: Path) -> None:
    names = {pool: ceph.unique("damaged") for pool in POOLS}
    content = {pool: make_image(ceph, pool, name, seed=256 + ord(pool[0])) for pool, name in names.items()}
    with dead(ceph, 0, 1, 2):
        for pool in POOLS:
            assert sum(damage(ceph, osd, pieces(pool, content[pool], [3])) for osd in range(3)) >= 2
    # Ceph lets the readers of a replicated object wait if it knows of no good copy; of an erasure-coded one it is EIO.
    timeout = ("--osd-timeout", "5")
    mount = mounts(*timeout)
    mount.expect("ERROR", "WARNING")
    beyond = 4 * MIB  # what is read ahead together with the damaged object
    for pool, name in names.items():
        with mount.image(name).open("rb", buffering=0) as file:
            wait_until(lambda file=file: read_or_time_out(file.fileno(), 1, beyond) != b"", 150)  # type: ignore[misc]
            with pytest.raises(OSError, match=r"Input/output error|timed out"):
                os.pread(file.fileno(), PIECE, 3 * MIB)
            assert os.pread(file.fileno(), len(content[pool]), beyond) == content[pool][beyond:]
        exported = rbdfs("export", *timeout, f"rbd/{name}", str(tmp_path / "export"), conf=ceph.conf)
        assert exported.returncode == 1
        assert f"cannot read rbd/{name} at " in exported.stderr
