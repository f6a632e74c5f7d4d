"""Images of every kind, and snapshots of each, read as `rbd export` reads them; what cannot be opened says why."""

import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rbd

from tests.cluster import MIB, READ_ONLY_CAPS, Ceph, Mount, random_bytes, wait_until

Mounts = Callable[..., Mount]

KIB = 1024
ALL_FEATURES = 61
WATCHING_CAPS = ("mon", "profile rbd", "osd", "profile rbd")
SIZE = 9 * MIB + 512
SOON = 3.0
"""Seconds, while an image that was closed is still open in librbd."""
NAMESPACE, OTHER_POOL, DATA_POOL = "tenant", "kinds-other", "kinds-data"

Plan = Callable[[Ceph, str], str]
"""Makes an image by this name, writes to it, and says where it is: POOL/[NAMESPACE/]NAME."""


def scribble(ceph: Ceph, spec: str, seed: int) -> None:
    """Write here and there, take the snapshot `s`, write again, and leave the image larger than the snapshot."""
    pool, *namespace, name = spec.split("/")
    chance = random.Random(seed)
    with ceph.ioctx(pool) as ioctx:
        ioctx.set_namespace("".join(namespace))
        with rbd.Image(ioctx, name) as image:
            size = image.size()
            for step in range(8):
                if step == 5:
                    image.create_snap("s")
                    if not image.features() & rbd.RBD_FEATURE_MIGRATING:
                        image.resize(size + MIB)
                image.write(chance.randbytes(100_000), chance.randrange(size - 100_000))


def plain(**options: object) -> Plan:
    """An image made with these options."""

    def make(ceph: Ceph, name: str) -> str:
        with ceph.ioctx() as ioctx:
            rbd.RBD().create(ioctx, name, SIZE, order=20, old_format=False, **options)
        return f"rbd/{name}"

    return make


def format_1(ceph: Ceph, name: str) -> str:
    """As before Ceph 0.61."""
    environment = os.environ | {"CEPH_CONF": os.fspath(ceph.conf), "RBD_FORCE_ALLOW_V1": "1"}
    command = ["rbd", "create", "--image-format", "1", "--order", "20", "--size", f"{SIZE}B", f"rbd/{name}"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60)
    return f"rbd/{name}"


def clone(parent: str, child: str, clone_format: int) -> Plan:
    """A clone of an image in another place, `parent`, at a place `child`: POOL[/NAMESPACE]."""

    def make(ceph: Ceph, name: str) -> str:
        source = f"{parent}/{name}-parent"
        ceph.run("rbd", "create", "--object-size", "1M", "--size", f"{SIZE}B", source)
        scribble(ceph, source, seed=99)
        if clone_format == 1:
            ceph.run("rbd", "snap", "protect", f"{source}@s")
        ceph.run("rbd", "clone", "--rbd-default-clone-format", str(clone_format), f"{source}@s", f"{child}/{name}")
        return f"{child}/{name}"

    return make


def encrypted(ceph: Ceph, name: str) -> str:
    """LUKS in RBD: what is shown is the ciphertext."""
    with ceph.ioctx() as ioctx:
        rbd.RBD().create(ioctx, name, 32 * MIB, old_format=False)
        with rbd.Image(ioctx, name) as image:
            image.encryption_format(rbd.RBD_ENCRYPTION_FORMAT_LUKS1, "secret")
            image.write(b"a secret" * KIB, 0)
    return f"rbd/{name}"


def migrating(ceph: Ceph, name: str) -> str:
    """In the middle of a migration: the source shows through."""
    plain()(ceph, f"{name}-source")
    ceph.write_image(f"{name}-source", random_bytes(SIZE, seed=4))
    ceph.run("rbd", "migration", "prepare", f"rbd/{name}-source", f"rbd/{name}")
    return f"rbd/{name}"


KINDS: dict[str, Plan] = {
    "no-features": plain(features=0),
    "all-features": plain(features=ALL_FEATURES),
    "journaling": plain(features=ALL_FEATURES | rbd.RBD_FEATURE_JOURNALING),
    "striped": plain(stripe_unit=64 * KIB, stripe_count=5),
    "data-pool": plain(data_pool=DATA_POOL),
    "format-1": format_1,
    "clone-1": clone("rbd", "rbd", 1),
    "clone-2": clone("rbd", "rbd", 2),
    "clone-of-another-pool": clone(OTHER_POOL, "rbd", 2),
    "clone-of-a-namespace": clone(f"rbd/{NAMESPACE}", f"rbd/{NAMESPACE}", 2),
    "clone-of-another-namespace": clone(f"rbd/{NAMESPACE}", "rbd", 2),
    "encrypted": encrypted,
    "migrating": migrating,
}


def exported(ceph: Ceph, spec: str) -> bytes:
    """What `rbd export` reads."""
    environment = os.environ | {"CEPH_CONF": os.fspath(ceph.conf)}
    command = ["rbd", "export", "--no-progress", spec, "-"]
    return subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120).stdout


@pytest.fixture(scope="module")
def kinds(ceph: Ceph) -> Iterator[dict[str, bytes]]:
    """One image of each kind, named so, with a snapshot `s`: where each is → what `rbd export` reads of it."""
    for pool in (OTHER_POOL, DATA_POOL):
        ceph.make_pool(pool)
    ceph.run("rbd", "namespace", "create", f"rbd/{NAMESPACE}")
    contents: dict[str, bytes] = {}
    for seed, (kind, make) in enumerate(KINDS.items()):
        spec = make(ceph, kind)
        if kind != "encrypted":
            scribble(ceph, spec, seed)
        else:
            ceph.run("rbd", "snap", "create", "--no-progress", f"{spec}@s")
        contents |= {each: exported(ceph, each) for each in (spec, f"{spec}@s")}
    yield contents
    for pool in (OTHER_POOL, DATA_POOL):
        ceph.remove_pool(pool)


@pytest.mark.parametrize("caps", [WATCHING_CAPS, READ_ONLY_CAPS], ids=["watching", "read-only caps"])
def test_every_kind_of_image_and_its_snapshot_are_what_rbd_export_reads(
    ceph: Ceph, kinds: dict[str, bytes], mounts: Mounts, caps: tuple[str, ...], tmp_path: Path
) -> None:
    mount = mounts(*ceph.credentials(caps))
    for spec, expected in kinds.items():
        path, copy = mount.path / spec, tmp_path / "copy"
        assert path.stat().st_size == len(expected), spec
        assert path.read_bytes() == expected, spec
        subprocess.run(["cp", path, copy], check=True, timeout=60)
        assert copy.read_bytes() == expected, spec


def test_reading_and_seeking_take_the_exclusive_lock_from_nobody(ceph: Ceph, mount: Mount, tmp_path: Path) -> None:
    for features in (ALL_FEATURES, ALL_FEATURES | rbd.RBD_FEATURE_JOURNALING):
        name, content = ceph.unique("locked"), random_bytes(4 * MIB)
        ceph.make_image(name, content, MIB, features=features)
        ceph.resize_image(name, 9 * MIB)
        with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as writer:
            writer.write(content[:10], 0)
            assert writer.is_exclusive_lock_owner()
            subprocess.run(["cp", mount.image(name), tmp_path / "copy"], check=True, timeout=60)
            assert writer.is_exclusive_lock_owner()
        assert (tmp_path / "copy").read_bytes() == content + bytes(5 * MIB)


def reads_answered(ceph: Ceph) -> int:
    """How many operations that read the OSD has done."""
    return int(json.loads(ceph.run("ceph", "tell", "osd.0", "perf", "dump", "osd"))["osd"]["op_r"])


def test_reads_in_the_holes_of_a_snapshot_ask_no_osd(ceph: Ceph, mount: Mount) -> None:
    name, content = ceph.unique("holes"), random_bytes(4 * MIB)
    with ceph.ioctx() as ioctx:
        rbd.RBD().create(ioctx, name, 4 << 30, old_format=False, features=ALL_FEATURES)
        with rbd.Image(ioctx, name) as image:
            image.write(content, 1 << 30)
            image.create_snap("s")

    chance = random.Random(2)
    for _ in range(2):  # also at the next open, which has nothing to learn any more
        with mount.image(f"{name}@s").open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 4096, 0) == bytes(4096)
            before = reads_answered(ceph)
            for _ in range(2000):
                offset = (2 << 30) + chance.randrange(2 << 30 >> 12) * 4096
                assert os.pread(file.fileno(), 4096, offset) == bytes(4096)
            assert reads_answered(ceph) - before < 20  # one look a second, and what else there is in a cluster
            assert os.pread(file.fileno(), 4 * MIB, 1 << 30) == content


def test_the_kernels_pages_of_a_snapshot_are_kept_over_opens(ceph: Ceph, mounts: Mounts) -> None:
    mount = mounts("--cache-size", "0")
    name, content = ceph.unique("kept"), random_bytes(4 * MIB)
    ceph.make_image(name, content)
    ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{name}@s")
    path = mount.image(f"{name}@s")
    assert path.read_bytes() == content
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as image:
        prefix = image.block_name_prefix()
    with ceph.ioctx() as ioctx:
        ioctx.remove_object(f"{prefix}.0000000000000000")  # behind RBD's back: what is read now is from the kernel
    assert path.read_bytes() == content


def test_a_clone_whose_parent_the_key_may_not_read_says_so_at_open(
    ceph: Ceph, kinds: dict[str, bytes], mounts: Mounts
) -> None:
    caps = ("mon", "profile rbd", "osd", "profile rbd-read-only pool=rbd")
    mount = mounts(*ceph.credentials(caps))
    mount.expect("ERROR")
    with pytest.raises(PermissionError):
        mount.image("clone-of-another-pool").read_bytes()
    assert "it is a clone: the key must be allowed to read its parent as well" in mount.log
    assert mount.image("all-features").read_bytes() == kinds["rbd/all-features"]


def test_to_open_an_image_soon_after_its_close_asks_less(ceph: Ceph, mount: Mount) -> None:
    name = ceph.unique("soon")
    ceph.make_image(name, random_bytes(MIB), features=ALL_FEATURES)
    ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{name}@s")
    for path in (mount.image(name), mount.image(f"{name}@s")):
        counts = [reads_answered(ceph)]
        for opens in (1, 10):
            for _ in range(opens):
                path.open("rb").close()
            counts.append(reads_answered(ceph))
        first, ten_more = counts[1] - counts[0], counts[2] - counts[1]
        assert ten_more < 10 * first / 2  # seen: 17 and 60; of the snapshot, 18 and 40


@pytest.mark.parametrize("features", [ALL_FEATURES, rbd.RBD_FEATURE_LAYERING], ids=["all features", "layering"])
def test_what_others_do_right_after_a_close_is_seen_at_the_next_open(ceph: Ceph, mount: Mount, features: int) -> None:
    name, content = ceph.unique("since"), random_bytes(2 * MIB)
    path = mount.image(name)
    ceph.make_image(name, content, MIB, features=features)
    assert path.read_bytes() == content
    ceph.resize_image(name, 3 * MIB)
    wait_until(lambda: path.stat().st_size == 3 * MIB, SOON)
    assert path.read_bytes() == content + bytes(MIB)
    ceph.resize_image(name, MIB)
    wait_until(lambda: path.stat().st_size == MIB, SOON)
    assert path.read_bytes() == content[:MIB]
    with ceph.ioctx() as ioctx:
        with rbd.Image(ioctx, name) as image:
            image.create_snap("s")
            image.write(content[MIB:], 0)
        assert path.read_bytes() == content[MIB:]
        assert mount.image(f"{name}@s").read_bytes() == content[:MIB]
        with rbd.Image(ioctx, name) as image:
            image.rollback_to_snap("s")
            image.remove_snap("s")
        assert path.read_bytes() == content[:MIB]
        wait_until(lambda: not mount.image(f"{name}@s").exists(), SOON)
    # A watch would hold this off; who closes a file is not told when it has ended.
    wait_until(lambda: is_removed(ceph, name), SOON)
    wait_until(lambda: not path.exists(), SOON)
    ceph.make_image(name, content[::-1], MIB, features=features)
    wait_until(path.exists, SOON)
    assert path.read_bytes() == content[::-1]


def test_opens_stats_and_reads_of_a_file_that_others_write_to_never_wait_for_each_other(
    ceph: Ceph, mount: Mount
) -> None:
    # Each open() calls the kernel's attributes back, while it waits for the answer to that open().
    name, content = ceph.unique("hammered"), random_bytes(2 * MIB)
    ceph.make_image(name, content, MIB, features=ALL_FEATURES)
    path, wrong, rounds = mount.image(name), list[str](), [0] * 6
    stop = threading.Event()

    def hammer(number: int) -> None:
        while not stop.is_set() and not wrong:
            with path.open("rb", buffering=0) as file:
                sizes = {os.fstat(file.fileno()).st_size, path.stat().st_size}
                data = os.pread(file.fileno(), 2 * MIB, 0)
                if sizes != {2 * MIB} or data != content:
                    wrong.append(f"{sizes}, {len(data)} bytes")
            rounds[number] += 1

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(len(rounds))]
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name) as writer:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while min(rounds) <= 5 and not wrong and time.monotonic() < deadline:
            for _ in range(50):
                writer.write(content[:MIB], 0)
                time.sleep(0.05)  # it holds the lock, so that no open() is `unchanged`
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert min(rounds) > 5


def test_a_path_leads_to_the_image_that_has_the_name_now(ceph: Ceph, mount: Mount) -> None:
    # The kernel goes by the inode that it has looked up, and is told ESTALE: then it looks the name up again.
    name = ceph.unique("successor")
    path = mount.image(name)
    for content in (b"first" * 1000, b"second" * 1000, b"third" * 1000):
        ceph.make_image(name, content)
        if content.startswith(b"first"):
            wait_until(path.exists, SOON)
        assert path.read_bytes() == content
        assert path.stat().st_size == len(content)
        wait_until(lambda: is_removed(ceph, name), SOON)
    with pytest.raises(FileNotFoundError):
        path.open("rb")


def is_removed(ceph: Ceph, name: str) -> bool:
    """Try to remove an image; False while that is refused."""
    try:
        ceph.remove_image(name)
    except rbd.ImageBusy:
        return False
    return True
