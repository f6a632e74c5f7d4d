"""Images of every kind are listed, read, sought through, exported, mapped, compared as the `rbd` command here says.

With `--devcluster FOLDER` the cluster is one that runs already, of another release perhaps: see cross_release.sh.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rbdfs.fuse.names import encode
from tests.attributes import compare
from tests.cluster import RBDFS, READ_ONLY_CAPS, Ceph, Mount
from tests.golden.capture import truth_of_namespace
from tests.golden.images import DATA, POOLS, make_images, parts, said

Mounts = Callable[..., Mount]

WITHOUT_MOUNT = (
    *("plain", "no-features", "journal", "striped", "data-pool", "smallest-objects", "odd-size", "sparse", "shrunk"),
    *("shrunk@larger", "snapshots", "snapshots@protected", "old", "old@one", "clone-1", "clone-2@s", "grandchild"),
    *("clone-striped", "clone-shrunk", "flattened@before", "of-trash", "migrating", "migrated", "team/clone"),
)
"""Images that are exported and mapped, one process each."""


@dataclass(frozen=True, slots=True)
class Kind:
    """An image or a snapshot, and what `rbd` says of it."""

    image: str
    snapshot: str
    info: dict[str, Any]
    diff: list[dict[str, Any]]

    @property
    def options(self) -> tuple[str, ...]:
        """What names it for the `rbd` command, whatever its name."""
        return ("--image", self.image, *(("--snap", self.snapshot) if self.snapshot else ()))

    @property
    def path(self) -> Path:
        """Its file, in a mount."""
        pool, namespace, name = parts(self.image)
        return Path(pool, namespace, encode(name) + (f"@{encode(self.snapshot)}" if self.snapshot else ""))

    @property
    def extents(self) -> list[tuple[int, int]]:
        """Where it holds data. Where that of an image in migration is, rbdfs does not ask (tracker 53786)."""
        if "migrating" in self.info.get("features", ()):
            return [(0, self.info["size"])]
        return merged((each["offset"], each["offset"] + each["length"]) for each in self.diff)


def merged(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Starts and ends, of pieces that touch no other."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(extents):
        found.append((found.pop()[0] if found and found[-1][1] == start else start, end))
    return found


@pytest.fixture(scope="module")
def kinds(ceph: Ceph) -> Iterator[list[Kind]]:
    """All of them. They are made here, but for those of a cluster of another release, which has made its own."""
    is_ours = not set(POOLS) & set(ceph.rados.list_pools())
    if is_ours:
        make_images(ceph)
    found: list[Kind] = []
    for pool in POOLS:
        in_pool = truth_of_namespace(ceph, pool)
        inside = {f"{pool}/{name}": each for name, each in in_pool["namespaces"].items()}
        for where, namespace in {pool: in_pool, **inside}.items():
            for name, image in namespace["images"].items():
                found.append(Kind(f"{where}/{name}", "", image["info"], image["diff"]))
                found += [
                    Kind(f"{where}/{name}", snapshot, each["info"], each["diff"])
                    for snapshot, each in image["of_snapshots"].items()
                ]
    yield found
    if is_ours:
        for pool in (*POOLS, DATA):
            ceph.remove_pool(pool)


@pytest.fixture(params=[None, READ_ONLY_CAPS], ids=["admin", "read-only caps"])
def folder(request: pytest.FixtureRequest, ceph: Ceph, mounts: Mounts) -> Path:
    """A mount, by a key that may watch and by one that may not."""
    return mounts(*ceph.credentials(request.param)).path


def exported(ceph: Ceph, kind: Kind) -> bytes:
    """What `rbd export` reads."""
    environment = os.environ | {"CEPH_CONF": os.fspath(ceph.conf)}
    command = ["rbd", "export", "--no-progress", *kind.options, "--path", "-"]
    return subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120).stdout


def test_each_has_the_attributes_that_rbd_info_says(ceph: Ceph, kinds: list[Kind], mount: Mount) -> None:
    for kind in kinds:
        path = mount.path / kind.path
        found = {
            name.removeprefix("user.rbd."): os.fsdecode(os.getxattr(path, name))
            for name in os.listxattr(path)
            if not name.startswith("user.rbd.meta.")
        }
        info = said(ceph, "info", *kind.options)
        if info["format"] == 1:
            assert found["block_name_prefix"] == info["block_name_prefix"]
            assert found["object_size"] == str(info["object_size"])
        else:
            compare(found, info)
        if not kind.snapshot:
            locks = said(ceph, "lock", "ls", *kind.options)
            assert set(found["lock_owner"].splitlines()) == {
                f"{each['locker']} {each['id']} {each['address']}" for each in locks
            }
    shown = subprocess.run(
        ["getfattr", "-d", mount.path / "golden" / "sparse"], check=True, capture_output=True, text=True
    ).stdout
    assert 'user.rbd.object_size="1048576"\n' in shown


def test_each_is_listed_with_its_size(kinds: list[Kind], folder: Path) -> None:
    listed: dict[Path, int] = {}
    for where in {kind.path.parent for kind in kinds}:
        subprocess.run(["ls", "-l", folder / where], check=True, stdout=subprocess.DEVNULL, timeout=60)
        listed |= {where / entry.name: entry.stat().st_size for entry in os.scandir(folder / where) if entry.is_file()}
    assert listed == {kind.path: kind.info["size"] for kind in kinds if not kind.snapshot}
    for kind in kinds:
        assert (folder / kind.path).stat().st_size == kind.info["size"]


def test_each_has_the_bytes_that_rbd_export_reads(ceph: Ceph, kinds: list[Kind], folder: Path) -> None:
    for kind in kinds:
        assert (folder / kind.path).read_bytes() == exported(ceph, kind), kind


def test_seeks_find_the_data_that_rbd_diff_finds(kinds: list[Kind], folder: Path) -> None:
    for kind in kinds:
        with (folder / kind.path).open("rb", buffering=0) as file:
            assert list(data_of(file.fileno(), kind.info["size"])) == kind.extents, kind


def data_of(file: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file holds data."""
    position = 0
    while position < size:
        try:
            position = os.lseek(file, position, os.SEEK_DATA)
        except OSError:  # ENXIO: there is none
            return
        end = os.lseek(file, position, os.SEEK_HOLE)
        yield position, end
        position = end


def test_an_export_has_the_bytes_that_rbd_export_reads(ceph: Ceph, kinds: list[Kind], tmp_path: Path) -> None:
    environment = os.environ | {"CEPH_CONF": os.fspath(ceph.conf)}
    for spec, kind in without_mount(kinds):
        copy = tmp_path / "copy"
        subprocess.run([*RBDFS, "export", "--force", spec, copy], env=environment, check=True, timeout=60)
        assert copy.read_bytes() == exported(ceph, kind), spec


def test_a_map_has_the_extents_that_rbd_diff_says(ceph: Ceph, kinds: list[Kind]) -> None:
    environment = os.environ | {"CEPH_CONF": os.fspath(ceph.conf)}
    for spec, kind in without_mount(kinds):
        command = [*RBDFS, "map", "--json", spec]
        found = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60).stdout)
        assert found["size"] == kind.info["size"]
        data = (
            (each["offset"], each["offset"] + each["length"]) for each in found["extents"] if each["kind"] != "hole"
        )
        assert merged(data) == kind.extents, spec


def test_a_diff_is_the_list_of_rbd_diff(ceph: Ceph, kinds: list[Kind]) -> None:
    environment = os.environ | {"CEPH_CONF": os.fspath(ceph.conf)}
    for spec, kind in without_mount(kinds):
        if "migrating" in kind.info.get("features", ()):
            continue  # an error, as commands/test_diff.py says
        command = [*RBDFS, "diff", "--json", spec]
        found = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, timeout=60).stdout)
        assert found == sorted(said(ceph, "diff", *kind.options), key=lambda each: each["offset"]), spec


def without_mount(kinds: list[Kind]) -> Iterator[tuple[str, Kind]]:
    """Those that are exported and mapped."""
    by_spec = {f"{kind.image}{'@' if kind.snapshot else ''}{kind.snapshot}": kind for kind in kinds}
    return ((f"golden/{name}", by_spec[f"golden/{name}"]) for name in WITHOUT_MOUNT)
