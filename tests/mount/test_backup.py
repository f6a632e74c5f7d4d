"""Backup programs on a mounted pool of odd images: each is copied once, byte for byte; a broken one fails alone."""

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import rbd

from tests.cluster import MIB, Ceph, Mount, random_bytes

Mounts = Callable[..., Mount]

FILES = {  # file name: image
    "two words": "two words",
    "new\nline": "new\nline",
    "Größe-日本": "Größe-日本",
    ".hidden": ".hidden",
    "-rf": "-rf",
    "100%25": "100%",
    "empty": "empty",
    "clone": "clone",
    "team/two words": "team/two words",
}
BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool of odd images, mounted, and what `rbd export` reads of them."""

    path: Path
    exported: Mapping[str, bytes]
    """By file name, without the broken one."""


def export(ceph: Ceph, pool: str, name: str) -> bytes:
    """An image as `rbd export` has it."""
    *namespace, image = name.split("/")
    where = [f"--pool={pool}", f"--image={image}", *(f"--namespace={each}" for each in namespace)]
    command = ["rbd", "export", "--no-progress", *where, "--path=-"]
    environment = os.environ | {"CEPH_CONF": str(ceph.conf)}
    return subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60).stdout


@pytest.fixture(scope="module")
def names(ceph: Ceph) -> Iterator[tuple[str, Mapping[str, bytes]]]:
    """The pool's name, and what is in it."""
    pool = ceph.unique("odd")
    ceph.make_pool(pool)
    content = random_bytes(MIB) + bytes(2 * MIB) + random_bytes(MIB + 7, seed=2)
    for image in (*FILES.values(), BROKEN):
        if "/" not in image and image not in ("empty", "clone"):
            ceph.make_image(image, content + image.encode(), MIB, pool=pool)
    ceph.make_image("empty", b"", pool=pool)
    with ceph.ioctx(pool) as ioctx:
        with rbd.Image(ioctx, "two words") as image:
            image.create_snap("s")
            image.protect_snap("s")
        rbd.RBD().clone(ioctx, "two words", "s", ioctx, "clone")
        with rbd.Image(ioctx, "clone") as image:
            image.write(b"its own", 5 * MIB // 2)
        with rbd.Image(ioctx, BROKEN, read_only=True) as image:
            header = f"rbd_header.{image.id()}"
        ioctx.remove_object(header)
        rbd.RBD().namespace_create(ioctx, "team")
        ioctx.set_namespace("team")
        rbd.RBD().create(ioctx, "two words", MIB, old_format=False)
        with rbd.Image(ioctx, "two words") as image:
            image.write(b"of the namespace", 5)
    yield pool, {file: export(ceph, pool, image) for file, image in FILES.items()}
    ceph.remove_pool(pool)


@pytest.fixture
def pool(names: tuple[str, Mapping[str, bytes]], mounts: Mounts) -> Pool:
    name, exported = names
    mount = mounts("--pool", name)
    mount.expect("ERROR")
    return Pool(mount.path / name, exported)


def run(
    *command: object, status: int = 0, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a program, which must end with this exit status."""
    words = [os.fspath(word) if isinstance(word, Path) else str(word) for word in command]
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, timeout=120, check=False)
    assert done.returncode == status, done
    return done


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rsync_copies_each_image_once_and_fails_for_the_broken_one(pool: Pool, tmp_path: Path) -> None:
    done = run("rsync", "-a", f"{pool.path}/", f"{tmp_path}/copy/", status=23)
    assert contents(tmp_path / "copy") == pool.exported
    assert BROKEN.encode() in done.stderr
    done = run("rsync", "-a", "--itemize-changes", f"--exclude={BROKEN}", f"{pool.path}/", f"{tmp_path}/copy/")
    assert done.stdout == b""  # nothing looks changed


def test_find_lists_each_image_once(pool: Pool) -> None:
    found = run("find", pool.path, "-type", "f", "-printf", "%P\\0%s\\0").stdout.decode().split("\0")
    sizes = {name: int(size) for name, size in zip(found[:-1:2], found[1::2], strict=True)}
    assert len(found) - 1 == 2 * len(sizes)
    assert sizes == {name: len(content) for name, content in pool.exported.items()} | {BROKEN: 1}
    assert run("find", pool.path, "-name", "*\n*").stdout == f"{pool.path}/new\nline\n".encode()


@pytest.mark.parametrize("options", [(), ("--sparse", "--xattrs")], ids=["plain", "sparse"])
def test_tar_archives_each_image_and_fails_for_the_broken_one(
    pool: Pool, tmp_path: Path, options: tuple[str, ...]
) -> None:
    archive, copy = tmp_path / "archive.tar", tmp_path / "copy"
    done = run("tar", *options, "-C", pool.path, "-cf", archive, ".", status=2)
    assert BROKEN.encode() in done.stderr
    copy.mkdir()
    run("tar", "-C", copy, "-xf", archive)
    assert contents(copy) == pool.exported


def test_restic_backs_up_each_image_and_fails_for_the_broken_one(pool: Pool, tmp_path: Path) -> None:
    environment = {
        "RESTIC_REPOSITORY": str(tmp_path / "repository"),
        "RESTIC_PASSWORD": "secret",
        "RESTIC_CACHE_DIR": str(tmp_path / "cache"),
    }
    run("restic", "init", environment=environment)
    done = run("restic", "backup", ".", folder=pool.path, status=3, environment=environment)
    assert BROKEN.encode() in done.stderr
    run("restic", "restore", "latest", "--target", tmp_path / "copy", environment=environment)
    assert contents(tmp_path / "copy") == pool.exported
