"""Whatever reads files reads exactly the bytes of the image, on a real mount of a real cluster."""

import concurrent.futures
import hashlib
import mmap
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster import MIB, Ceph, Mount, random_bytes

KIB = 1024
SIZES = [0, 1, 511, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 200 * MIB + 7]
OBJECT_SIZES = [4 * KIB, 64 * KIB, MIB, 32 * MIB]

Mounts = Callable[..., Mount]


@pytest.fixture(scope="module")
def images(ceph: Ceph) -> dict[str, bytes]:
    """Images of all sizes and object sizes: name → content."""
    contents = {f"size-{size}": random_bytes(size, seed=size) for size in SIZES}
    for name, content in contents.items():
        ceph.make_image(name, content)
    for object_size in OBJECT_SIZES:
        name = f"objects-{object_size}"
        contents[name] = random_bytes(40 * MIB + 7 if object_size > 64 * KIB else 2 * MIB + 7, seed=object_size)
        ceph.make_image(name, contents[name], object_size)
    contents["striped-read"] = random_bytes(6 * MIB + 7, seed=5)  # a whole object set of 5 MiB, and a piece of the next
    ceph.make_image("striped-read", contents["striped-read"], MIB, stripe_unit=64 * KIB, stripe_count=5)
    return contents


def output(*command: str) -> bytes:
    """What a program wrote; it must succeed."""
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout


def test_the_listing_has_exact_sizes(images: dict[str, bytes], mount: Mount) -> None:
    listed = {entry.name: entry.stat().st_size for entry in os.scandir(mount.path / "rbd")}
    assert {name: listed[name] for name in images} == {name: len(content) for name, content in images.items()}


def test_cp_cmp_sha256sum_and_rsync_give_the_bytes_that_were_written(
    images: dict[str, bytes], mount: Mount, tmp_path: Path
) -> None:
    for name, content in images.items():
        source, copy = mount.image(name), tmp_path / name
        output("cp", str(source), str(copy))
        assert copy.read_bytes() == content, name
        output("cmp", str(source), str(copy))
        digest = output("sha256sum", str(source)).split()[0].decode()
        assert digest == hashlib.sha256(content).hexdigest(), name
    output("rsync", "-a", *(str(mount.image(name)) for name in images), f"{tmp_path}/rsync/")
    for name, content in images.items():
        assert (tmp_path / "rsync" / name).read_bytes() == content, name


@pytest.mark.parametrize("options", [(), ("--direct-io",), ("--cache-size", "0"), ("--cache-size", "4M")], ids=" ".join)
def test_every_image_reads_whole_whatever_the_options(
    images: dict[str, bytes], mounts: Mounts, options: tuple[str, ...]
) -> None:
    mount = mounts(*options)
    for name, content in images.items():
        assert output("cat", str(mount.image(name))) == content, name


@pytest.mark.parametrize("flags", [(), ("iflag=direct",)], ids=["cached", "direct"])
@pytest.mark.parametrize("block", ["512", "4k", "1M", "4M"])
def test_dd_gives_the_bytes_with_any_block_size(
    images: dict[str, bytes], mount: Mount, block: str, flags: tuple[str, ...]
) -> None:
    for name in ("size-4194305", "size-511", "size-0", "striped-read"):
        assert output("dd", f"if={mount.image(name)}", f"bs={block}", "status=none", *flags) == images[name], name


@pytest.mark.parametrize("flags", ["skip_bytes,count_bytes", "skip_bytes,count_bytes,direct"])
@pytest.mark.parametrize(
    ("skip", "count"),
    [(1, 1), (4095, 2), (4 * MIB - 1, 2), (4 * MIB - 3, MIB + 7), (200 * MIB, 1000), (200 * MIB + 7, 5), (1 << 40, 5)],
)
def test_dd_gives_the_bytes_at_odd_offsets(
    images: dict[str, bytes], mount: Mount, skip: int, count: int, flags: str
) -> None:
    name = f"size-{200 * MIB + 7}"
    read = output("dd", f"if={mount.image(name)}", "bs=64k", f"skip={skip}", f"count={count}", f"iflag={flags}")
    assert read == images[name][skip : skip + count]


def test_mmap_gives_the_bytes(images: dict[str, bytes], mount: Mount) -> None:
    name = "size-4194305"
    with mount.image(name).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == images[name]


def test_eight_readers_at_once_get_their_bytes(images: dict[str, bytes], mount: Mount) -> None:
    name = f"objects-{MIB}"

    def digest(_: int) -> str:
        return output("sha256sum", str(mount.image(name))).split()[0].decode()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(digest, range(8))) == {hashlib.sha256(images[name]).hexdigest()}


def test_a_thousand_random_preads_agree_with_rbd_export(images: dict[str, bytes], mount: Mount, ceph: Ceph) -> None:
    chance = random.Random(11)
    for name in (f"size-{200 * MIB + 7}", "striped-read"):
        exported = ceph.exported(name)
        assert exported == images[name]
        file = os.open(mount.image(name), os.O_RDONLY)
        try:
            for _ in range(500):
                offset = chance.randrange(len(exported) + 1000)
                length = chance.choice([1, 511, 4096, 70_000, 300_000])
                assert os.pread(file, length, offset) == exported[offset : offset + length]
        finally:
            os.close(file)


def test_reads_of_nothing_and_past_the_end_are_empty(images: dict[str, bytes], mount: Mount) -> None:
    for flags in (os.O_RDONLY, os.O_RDONLY | os.O_DIRECT):
        file = os.open(mount.image("size-511"), flags)
        try:
            assert os.pread(file, 0, 0) == b""
            assert os.pread(file, 4096, 4096) == b""
            assert os.pread(file, 4096, 1 << 50) == b""
        finally:
            os.close(file)


def test_an_image_reads_the_same_with_a_key_that_may_not_watch(
    images: dict[str, bytes], mounts: Mounts, ceph: Ceph
) -> None:
    keyring = ceph.make_key("reader", "mon", "profile rbd", "osd", "profile rbd-read-only")
    mount = mounts("--id", "reader", "--keyring", str(keyring))
    for name in ("size-4194305", "striped-read"):
        assert mount.image(name).read_bytes() == images[name]
