"""Thin images stay thin, and not one byte of data is taken for a hole; on a real mount of a real cluster."""

import itertools
import json
import os
import random
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import rbd

from rbdfs.ceph.metadata import header
from tests.beats import beating
from tests.cluster import MIB, Ceph, Mount, random_bytes, wait_until
from tests.mount.test_device import opened, read_direct, resident_bytes

Mounts = Callable[..., Mount]

ALL_FEATURES = 61  # layering, exclusive-lock, object-map, fast-diff, deep-flatten
NO_FAST_DIFF = 1 | 4  # layering, exclusive-lock
LAYOUTS = [(MIB, 0, 0), (64 * 1024, 0, 0), (4 * MIB, 0, 0), (MIB, 64 * 1024, 3)]
SIZE = 40 * MIB + 12_288  # qemu-img knows whole sectors only


def scribble(image: rbd.Image, chance: random.Random, times: int) -> None:
    """Data, zeros and discards at random places."""
    for _ in range(times):
        offset = chance.randrange(image.size())
        length = min(chance.choice([1, 512, 4096, 70_000, 3 * MIB]), image.size() - offset)
        match chance.randrange(4):
            case 0:
                image.write(b"\0" * length, offset)
            case 1:
                image.discard(offset, length)
            case _:
                image.write(chance.randbytes(length), offset)


def make_pattern(ceph: Ceph, name: str, seed: int, features: int = ALL_FEATURES) -> str:
    """A scribbled image, a clone of it, and a clone of that; resized on the way. The last one's name."""
    chance = random.Random(seed)
    object_size, unit, count = LAYOUTS[seed % len(LAYOUTS)]
    options = {"order": object_size.bit_length() - 1, "features": features, "stripe_unit": unit, "stripe_count": count}
    client = rbd.RBD()
    with ceph.ioctx() as ioctx:
        client.create(ioctx, name, SIZE, old_format=False, **options)
        for generation in range(3):
            with rbd.Image(ioctx, name) as image:
                scribble(image, chance, 6)
                if generation == seed % 3:
                    image.resize(SIZE - 5 * MIB)
                    image.resize(SIZE + 3 * MIB)
                    scribble(image, chance, 2)
                if generation == 2:
                    if seed % 2:
                        image.flatten()
                    break
                image.create_snap("parent")
                image.protect_snap("parent")
            child = f"{name}-clone"
            client.clone(ioctx, name, "parent", ioctx, child, **options)
            name = child
    return name


def copies(source: Path, folder: Path) -> Iterator[Path]:
    """The file, copied by everything that looks for holes."""
    for mode in ("auto", "always"):
        target = folder / f"cp-{mode}"
        subprocess.run(["cp", f"--sparse={mode}", source, target], check=True, timeout=120)
        yield target
    subprocess.run(["tar", "-S", "-C", source.parent, "-cf", folder / "archive.tar", source.name], check=True)
    (folder / "tar").mkdir()
    subprocess.run(["tar", "-S", "-C", folder / "tar", "-xf", folder / "archive.tar"], check=True, timeout=120)
    yield folder / "tar" / source.name
    subprocess.run(["rsync", "-S", source, folder / "rsync"], check=True, timeout=120)
    yield folder / "rsync"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", source, folder / "qemu"], check=True, timeout=120)
    yield folder / "qemu"


@pytest.mark.parametrize("features", [ALL_FEATURES, NO_FAST_DIFF], ids=["fast-diff", "no fast-diff"])
@pytest.mark.parametrize("seed", range(4))
def test_every_copy_of_a_random_pattern_is_what_rbd_export_reads(
    ceph: Ceph, mount: Mount, tmp_path: Path, seed: int, features: int
) -> None:
    name = make_pattern(ceph, ceph.unique("pattern"), seed, features)
    exported = ceph.exported(name)
    for copy in copies(mount.image(name), tmp_path):
        assert copy.stat().st_size == len(exported), copy.name
        assert copy.read_bytes() == exported, copy.name


@pytest.mark.parametrize("seed", range(2))
def test_seeks_agree_at_every_boundary_with_what_rbd_diff_says(ceph: Ceph, mount: Mount, seed: int) -> None:
    name = make_pattern(ceph, ceph.unique("bounds"), seed)
    found: list[tuple[int, int]] = []
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name, read_only=True) as image:
        size = image.size()
        image.diff_iterate(0, size, None, lambda start, length, _: found.append((start, length)), True, True)
    edges = sorted({0, size, *(start for start, _ in found), *(start + length for start, length in found)})
    data = sorted((start, min(start + length, size)) for start, length in found)

    def model(position: int, whence: int) -> int | None:
        if position >= size:
            return None
        while True:
            inside = next((end for start, end in data if start <= position < end), None)
            if whence == os.SEEK_DATA:
                if inside is not None:
                    return position
                return min((start for start, _ in data if start > position), default=None)
            if inside is None or position == size:
                return position
            position = inside

    file = os.open(mount.image(name), os.O_RDONLY)
    try:
        for position in sorted({max(0, edge + step) for edge in edges for step in (-1, 0, 1)}):
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                expected = model(position, whence)
                if expected is None:
                    with pytest.raises(OSError, match="No such device or address"):
                        os.lseek(file, position, whence)
                else:
                    assert os.lseek(file, position, whence) == expected, (position, whence)
    finally:
        os.close(file)


def test_a_thin_image_is_copied_thin_and_its_blocks_are_what_it_holds(ceph: Ceph, mount: Mount, tmp_path: Path) -> None:
    name = ceph.unique("thin")
    with ceph.ioctx() as ioctx:
        rbd.RBD().create(ioctx, name, 100 << 30, old_format=False, features=ALL_FEATURES)
        with rbd.Image(ioctx, name) as image:
            for i in range(10):
                image.write(random_bytes(4 * MIB, seed=i), i * (9 << 30))
    source, copy = mount.image(name), tmp_path / "copy"
    assert source.stat().st_blocks * 512 == 40 * MIB
    subprocess.run(["cp", source, copy], check=True, timeout=60)
    assert copy.stat().st_size == 100 << 30
    assert abs(copy.stat().st_blocks * 512 - 40 * MIB) <= 40 * MIB // 100
    with copy.open("rb") as file:
        for i in range(10):
            file.seek(i * (9 << 30))
            assert file.read(4 * MIB) == random_bytes(4 * MIB, seed=i)
    ceph.remove_image(name)


def test_an_image_whose_object_map_is_invalid_looks_full_and_copies_right(
    ceph: Ceph, mount: Mount, tmp_path: Path
) -> None:
    name = ceph.unique("invalid")
    content = b"\0" * (8 * MIB) + random_bytes(4 * MIB) + b"\0" * (8 * MIB)
    with ceph.ioctx() as ioctx:
        rbd.RBD().create(ioctx, name, len(content), old_format=False, features=ALL_FEATURES)
        with rbd.Image(ioctx, name) as image:
            image.write(content[8 * MIB : 12 * MIB], 8 * MIB)
            flags = rbd.RBD_FLAG_OBJECT_MAP_INVALID | rbd.RBD_FLAG_FAST_DIFF_INVALID
            image_id = image.id()
        # The object map says that there is nothing at all, and the flags that it lies.
        no_snapshot = (2**64 - 2).to_bytes(8, "little")
        mask = flags.to_bytes(8, "little")
        ioctx.execute(header.object_name(image_id), "rbd", "set_flags", mask + mask + no_snapshot)
        ioctx.execute(f"rbd_object_map.{image_id}", "rbd", "object_map_resize", (5).to_bytes(8, "little") + b"\0")
        with rbd.Image(ioctx, name, read_only=True) as image:
            assert image.flags() == flags
    source, copy = mount.image(name), tmp_path / "copy"
    assert source.stat().st_blocks * 512 == len(content)
    for mode in ("auto", "always"):
        subprocess.run(["cp", f"--sparse={mode}", source, copy], check=True)
        assert copy.read_bytes() == content


def test_the_blocks_of_a_clone_are_what_it_reads_its_parents_included(ceph: Ceph, mount: Mount, tmp_path: Path) -> None:
    parent, child = ceph.unique("parent"), ceph.unique("child")
    content = b"\0" * (8 * MIB) + random_bytes(12 * MIB) + b"\0" * (20 * MIB)
    with ceph.ioctx() as ioctx:
        rbd.RBD().create(ioctx, parent, len(content), old_format=False, features=ALL_FEATURES)
        with rbd.Image(ioctx, parent) as image:
            image.write(content[8 * MIB : 20 * MIB], 8 * MIB)
            image.create_snap("base")
            image.protect_snap("base")
        rbd.RBD().clone(ioctx, parent, "base", ioctx, child, features=ALL_FEATURES)
        # tar takes a file without blocks for one without data
        assert mount.image(child).stat().st_blocks * 512 == 12 * MIB
        with rbd.Image(ioctx, child) as image:
            image.write(b"own", 30 * MIB)
            image.write(b"own", 9 * MIB)
    content = content[: 9 * MIB] + b"own" + content[9 * MIB + 3 : 30 * MIB] + b"own" + content[30 * MIB + 3 :]
    wait_until(lambda: mount.image(child).stat().st_blocks * 512 == 16 * MIB)
    for copy in copies(mount.image(child), tmp_path):
        assert copy.read_bytes() == content, copy.name


def test_a_clone_with_an_ancestor_whose_object_map_is_invalid_looks_full_and_copies_right(
    ceph: Ceph, mount: Mount, tmp_path: Path
) -> None:
    name = ceph.unique("invalid")
    names = [f"{name}-{generation}" for generation in range(3)]
    content = bytes(8 * MIB) + random_bytes(4 * MIB) + bytes(8 * MIB)
    with ceph.ioctx() as ioctx:
        rbd.RBD().create(ioctx, names[0], len(content), old_format=False, features=ALL_FEATURES)
        ceph.write_image(names[0], content[8 * MIB : 12 * MIB], 8 * MIB)
        for parent, child in itertools.pairwise(names):
            with rbd.Image(ioctx, parent) as image:
                image.create_snap("s")
                image.protect_snap("s")
            rbd.RBD().clone(ioctx, parent, "s", ioctx, child, features=ALL_FEATURES)
        paths = [mount.image(each) for each in (names[1], f"{names[1]}@s", names[2])]
        assert [path.stat().st_blocks * 512 for path in paths] == [4 * MIB] * 3
        with rbd.Image(ioctx, names[0], read_only=True) as image:
            image_id = image.id()
            (snapshot_id,) = [snapshot["id"] for snapshot in image.list_snaps()]
        # The object map says that there is nothing at all, and the flags that it lies.
        mask = (rbd.RBD_FLAG_OBJECT_MAP_INVALID | rbd.RBD_FLAG_FAST_DIFF_INVALID).to_bytes(8, "little")
        ioctx.execute(header.object_name(image_id), "rbd", "set_flags", mask + mask + snapshot_id.to_bytes(8, "little"))
        empty = struct.pack("<IBBIQ", 14, 1, 1, 8, 5) + bytes(2) + bytes(4)
        ioctx.write_full(f"rbd_object_map.{image_id}.{snapshot_id:016x}", empty)
    for number, path in enumerate(paths):
        wait_until(lambda path=path: path.stat().st_blocks * 512 == len(content))  # type: ignore[misc]
        subprocess.run(["cp", path, tmp_path / str(number)], check=True)
        assert (tmp_path / str(number)).read_bytes() == content


def test_a_clone_with_stripes_looks_full_for_its_overlap_ends_in_several_objects(ceph: Ceph, mount: Mount) -> None:
    striped, plain = ceph.unique("striped"), ceph.unique("plain")
    stripes = {"order": 20, "stripe_unit": 65536, "stripe_count": 4, "features": ALL_FEATURES}
    with ceph.ioctx() as ioctx:
        for name, options in ((striped, stripes), (plain, {"order": 20, "features": ALL_FEATURES})):
            rbd.RBD().create(ioctx, name, 8 * MIB, old_format=False, **options)
            with rbd.Image(ioctx, name) as image:
                image.write(b"x" * 65536, 65536)  # with stripes, object 1; else object 0
                image.create_snap("s")
                image.protect_snap("s")
            rbd.RBD().clone(ioctx, name, "s", ioctx, f"{name}-child", **stripes)
            with rbd.Image(ioctx, f"{name}-child") as image:
                image.resize(128 * 1024)
                image.resize(8 * MIB)
                assert image.read(65536, 65536) == b"x" * 65536
    for name in (striped, plain):
        assert mount.image(f"{name}-child").stat().st_blocks * 512 == 8 * MIB


@pytest.mark.parametrize("damage", [lambda data: data[:-6], lambda _: b""], ids=["cut", "empty"])
def test_an_image_whose_object_map_is_damaged_looks_full(
    ceph: Ceph, mount: Mount, damage: Callable[[bytes], bytes]
) -> None:
    pool_mates = [ceph.unique(name) for name in ("fine", "damaged")]
    for name in pool_mates:
        ceph.make_image(name, b"x" * MIB, features=ALL_FEATURES)
        ceph.resize_image(name, 40 * MIB)
    with ceph.ioctx() as ioctx:
        with rbd.Image(ioctx, pool_mates[1], read_only=True) as image:
            map_object = f"rbd_object_map.{image.id()}"
        ioctx.write_full(map_object, damage(ioctx.read(map_object)))
    blocks = {entry.name: entry.stat().st_blocks * 512 for entry in os.scandir(mount.path / "rbd")}
    assert [blocks[name] for name in pool_mates] == [4 * MIB, 40 * MIB]


def test_a_clone_whose_object_map_is_shorter_than_it_looks_full_and_fails_no_listing(ceph: Ceph, mount: Mount) -> None:
    parent, child = ceph.unique("parent"), ceph.unique("child")
    ceph.make_image(parent, random_bytes(40 * MIB), features=ALL_FEATURES)
    with ceph.ioctx() as ioctx:
        with rbd.Image(ioctx, parent) as image:
            image.create_snap("s")
            image.protect_snap("s")
        rbd.RBD().clone(ioctx, parent, "s", ioctx, child, features=ALL_FEATURES)
        with rbd.Image(ioctx, child, read_only=True) as image:
            map_object = f"rbd_object_map.{image.id()}"
        ioctx.execute(map_object, "rbd", "object_map_resize", (2).to_bytes(8, "little") + b"\0")
    blocks = {entry.name: entry.stat().st_blocks * 512 for entry in os.scandir(mount.path / "rbd")}
    assert [blocks[name] for name in (parent, child)] == [40 * MIB] * 2
    assert mount.image(child).stat().st_blocks * 512 == 40 * MIB


def test_du_says_what_rbd_du_says(ceph: Ceph, mounts: Mounts) -> None:
    pool = ceph.unique("du")
    ceph.make_pool(pool)
    try:
        with ceph.ioctx(pool) as ioctx:
            for number, size in enumerate((5 * MIB, 64 * MIB, 10 << 30)):
                rbd.RBD().create(ioctx, f"image{number}", size, old_format=False, features=ALL_FEATURES)
                with rbd.Image(ioctx, f"image{number}") as image:
                    for offset in range(0, min(size, 40 * MIB), 9 * MIB):
                        image.write(b"x", offset)
        mount = mounts("--pool", pool)
        said = subprocess.run(["du", "-sB1", mount.path / pool], check=True, capture_output=True, text=True)
        rbd_du = json.loads(ceph.run("rbd", "du", "-p", pool, "--format", "json"))
        assert int(said.stdout.split()[0]) == rbd_du["total_used_size"]
    finally:
        ceph.remove_pool(pool)


def test_an_image_of_64_tib_that_is_full_is_sought_and_stated_in_little_memory(ceph: Ceph, mount: Mount) -> None:
    name, beside, objects = ceph.unique("full"), ceph.unique("beside"), 1 << 24
    content = random_bytes(MIB)
    ceph.make_image(beside, content)
    with ceph.ioctx() as ioctx:
        rbd.RBD().create(ioctx, name, objects * 4 * MIB, old_format=False, features=ALL_FEATURES)
        with rbd.Image(ioctx, name) as image:
            map_object = f"rbd_object_map.{image.id()}"
        # As if all of it were written to: from the first object on, as many, exist.
        ioctx.execute(map_object, "rbd", "object_map_update", struct.pack("<QQBB", 0, objects, 1, 0))
    with opened(mount.image(beside), os.O_DIRECT) as other, opened(mount.image(name)) as file:
        before = resident_bytes(mount)
        assert mount.image(name).stat().st_blocks * 512 == objects * 4 * MIB
        waits: list[float] = []
        with ThreadPoolExecutor(1) as threads, beating() as clock:
            sought = threads.submit(os.lseek, file, 0, os.SEEK_HOLE)
            while not sought.done() or not waits:
                began = clock()
                offset = len(waits) % 200 * 4096
                assert read_direct(other, offset) == content[offset : offset + 4096]
                waits.append(clock() - began)
        assert max(waits) < 1.0
        assert sought.result() == objects * 4 * MIB
        assert os.lseek(file, 5 << 40, os.SEEK_DATA) == 5 << 40
        # Its map has 4 MiB, and is decoded and kept.
        assert resident_bytes(mount) - before < 64 * MIB
    with ceph.ioctx() as ioctx:
        rbd.RBD().trash_move(ioctx, name)


def test_images_of_many_tib_are_read_and_copied_in_the_time_of_what_they_hold(
    ceph: Ceph, mount: Mount, tmp_path: Path
) -> None:
    size = 15 << 40  # ext4's largest file is a little less than 16 TiB
    images = {  # name: size, size of its objects
        (large := ceph.unique("large")): (size, 4 * MIB),
        ceph.unique("huge"): (64 << 40, 32 * MIB),  # librbd takes half a second for each million of objects
    }
    with ceph.ioctx() as ioctx:
        for name, (end, object_size) in images.items():
            order = object_size.bit_length() - 1
            rbd.RBD().create(ioctx, name, end, order=order, old_format=False, features=ALL_FEATURES)
            with rbd.Image(ioctx, name) as image:
                image.write(b"first", 0)
                image.write(b"last", end - 4)
    for name, (end, object_size) in images.items():
        assert mount.image(name).stat().st_blocks * 512 == 2 * object_size
        with mount.image(name).open("rb", buffering=0) as file:
            assert os.lseek(file.fileno(), object_size, os.SEEK_DATA) == end - object_size
            assert os.pread(file.fileno(), 10, end - 5) == b"\0last"
    copy = tmp_path / "copy"
    subprocess.run(["cp", mount.image(large), copy], check=True, timeout=60)
    assert copy.stat().st_size == size
    assert copy.stat().st_blocks * 512 <= 9 * MIB
    with copy.open("rb", buffering=0) as file:
        assert file.read(5) == b"first"
        assert os.pread(file.fileno(), 10, size - 5) == b"\0last"
    with ceph.ioctx() as ioctx:
        for name in images:
            rbd.RBD().trash_move(ioctx, name)  # to remove them means to look for each of their objects
