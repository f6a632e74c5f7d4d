"""Images of every kind, small ones, made by the `rbd` command of the release that runs here.

python -m tests.golden.images FOLDER    # in the devcluster that runs in this folder
"""

import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rados
import rbd

from rbdfs.devcluster.cluster import Devcluster, DevclusterOptions
from tests.cluster import MIB, Ceph

POOL, PARENTS, DATA = "golden", "golden-parents", "golden-data"
POOLS = (POOL, PARENTS)
"""Those with images of their own."""
NAMESPACE = "team"

HELD = f"{POOL}/held"
"""For a test to hold its exclusive lock."""
INVALID = f"{POOL}/invalid"
"""Its object map is marked as invalid."""
NOT_UTF8 = os.fsdecode(b"not\xffutf8")
ODD_NAMES = ("with space", "ü日本", "new\nline", "100%", "-dash", "x" * 256, NOT_UTF8)
ODD_SNAPSHOTS = ("after a\nshrink", "ü", "a/b")
METADATA = {"note": "a note", "ü": "日本", "new\nline": "a\ttab", "empty": ""} | {
    f"key{i:03}": str(i) for i in range(70)
}
"""More than a page of them."""

CLONE = "clone --rbd-default-clone-format 2 --object-size 1M"
ALL_FEATURES = "--image-feature layering,exclusive-lock,object-map,fast-diff,deep-flatten,journaling"
WITHOUT_OBJECT_MAP = "--image-feature layering"
COMMANDS = f"""
namespace create golden/{NAMESPACE}
namespace create golden/empty-namespace
namespace create golden-parents/base

create --size 3M --object-size 1M golden/plain
create --size 3M --object-size 1M {WITHOUT_OBJECT_MAP} golden/layering
create --size 3M --object-size 1M --image-feature exclusive-lock,journaling golden/journal
create --size 3M --object-size 1M {ALL_FEATURES} golden/all-features
create --size 5M --object-size 1M --stripe-unit 64K --stripe-count 4 golden/striped
create --size 3M --object-size 1M --data-pool golden-data golden/data-pool
create --size 100K --object-size 4K golden/smallest-objects
create --size 50M --object-size 32M golden/largest-objects
create --size 0 golden/empty
create --size 1234567B --object-size 1M golden/odd-size
create --size 9M --object-size 1M golden/sparse
WRITE golden/sparse 0 4 7
create --size 2M --object-size 1M golden/grown
WRITE golden/grown 0 1
resize --size 5M golden/grown
create --size 5M --object-size 1M golden/shrunk
WRITE golden/shrunk 1 4
snap create golden/shrunk@larger
resize --size 2M --allow-shrink golden/shrunk
create --size 5M --object-size 1M golden/invalid
WRITE golden/invalid 2
create --size 2M --object-size 1M {HELD}
create --size 2M --object-size 1M golden/metadata
create --size 2M --object-size 1M golden/team/plain

create --size 5M --object-size 1M golden/snapshots
WRITE golden/snapshots 0
snap create golden/snapshots@first
WRITE golden/snapshots 2
snap create golden/snapshots@protected
snap protect golden/snapshots@protected
snap create golden/snapshots@trashed
clone --rbd-default-clone-format 2 golden/snapshots@trashed golden/of-trashed-snapshot
snap rm golden/snapshots@trashed
resize --size 7M golden/snapshots
WRITE golden/snapshots 6
snap create golden/snapshots@last
snap create golden/snapshots@removed
snap rm golden/snapshots@removed

create --size 2M --object-size 1M golden/grouped
group create golden/group
group image add golden/group golden/grouped
group snap create golden/group@of-group
mirror pool enable golden image
create --size 2M --object-size 1M golden/mirrored
mirror image enable golden/mirrored snapshot

create --size 5M --object-size 1M --image-format 1 golden/old
WRITE golden/old 0 3
snap create golden/old@one
snap create golden/old@two
resize --size 6M golden/old
create --size 4M --image-format 1 golden/old-plain

create --size 6M --object-size 1M golden/parent
WRITE golden/parent 0 2 5
snap create golden/parent@s
snap protect golden/parent@s
create --size 4M --object-size 1M golden-parents/base/parent
WRITE golden-parents/base/parent 1 3
snap create golden-parents/base/parent@s
clone --rbd-default-clone-format 1 --object-size 1M golden/parent@s golden/clone-1
WRITE golden/clone-1 1
{CLONE} golden/parent@s golden/clone-2
WRITE golden/clone-2 3
snap create golden/clone-2@s
{CLONE} golden/clone-2@s golden/grandchild
WRITE golden/grandchild 4
{CLONE} golden-parents/base/parent@s golden/team/clone
WRITE golden/team/clone 0
{CLONE} --stripe-unit 64K --stripe-count 2 golden/parent@s golden/clone-striped
{CLONE} --data-pool golden-data golden/parent@s golden/clone-data-pool
{CLONE} golden/parent@s golden/clone-grown
resize --size 8M golden/clone-grown
{CLONE} golden/parent@s golden/clone-shrunk
snap create golden/clone-shrunk@larger
resize --size 3M --allow-shrink golden/clone-shrunk
resize --size 9M golden/clone-shrunk
{CLONE} {WITHOUT_OBJECT_MAP} golden/parent@s golden/flattened
snap create golden/flattened@before
flatten golden/flattened
snap create golden/flattened@after
{CLONE} golden/parent@s golden/flattened-deep
snap create golden/flattened-deep@before
flatten golden/flattened-deep
create --size 2M --object-size 1M golden/to-trash
WRITE golden/to-trash 1
snap create golden/to-trash@s
{CLONE} golden/to-trash@s golden/of-trash
trash mv golden/to-trash

create --size 3M --object-size 1M golden/source
WRITE golden/source 0 2
migration prepare golden/source golden/migrating
create --size 3M --object-size 1M golden/source-2
WRITE golden/source-2 1
migration prepare golden/source-2 golden/migrated
migration execute golden/migrated

create --size 2M --object-size 1M golden/locked
lock add golden/locked cookie
create --size 2M --object-size 1M {WITHOUT_OBJECT_MAP} golden/locked-shared
lock add --shared tag golden/locked-shared cookie-ü
lock add --shared tag golden/locked-shared another
"""
"""Commands of `rbd`, and WRITE IMAGE MIB...: something in the middle of these objects of 1 MiB."""


def parts(spec: str) -> tuple[str, str, str]:
    """Pool, namespace and image; only in a namespace may the image have a slash."""
    pool, _, rest = spec.partition("/")
    namespace, slash, image = rest.partition("/")
    return (pool, namespace, image) if slash else (pool, "", rest)


@contextmanager
def opened(ceph: Ceph, spec: str) -> Iterator[rbd.Image]:
    """An image, to change it."""
    pool, namespace, name = parts(spec)
    with ceph.ioctx(pool) as ioctx:
        ioctx.set_namespace(namespace)
        with rbd.Image(ioctx, name) as image:
            yield image


def make_images(ceph: Ceph) -> None:
    """All of them."""
    os.environ["RBD_FORCE_ALLOW_V1"] = "1"
    for pool in (*POOLS, DATA):
        ceph.make_pool(pool)
    for line in filter(None, COMMANDS.splitlines()):
        command, *arguments = line.split()
        if command == "WRITE":
            _write(ceph, arguments[0], [int(each) * MIB for each in arguments[1:]])
        else:
            ceph.run("rbd", command, *arguments)
    for number, name in enumerate(ODD_NAMES):
        ceph.run("rbd", "create", "--size", f"{number + 1}M", "--image", f"{POOL}/{name}")
    with ceph.ioctx(POOL) as ioctx:  # what the command refuses
        rbd.RBD().create(ioctx, "no-features", 3 * MIB, order=20, old_format=False, features=0)
        ioctx.set_namespace(NAMESPACE)
        rbd.RBD().create(ioctx, "a/b", 2 * MIB, order=20, old_format=False)
    with opened(ceph, f"{POOL}/snapshots") as image:
        for name in ODD_SNAPSHOTS:
            image.create_snap(name)
    with opened(ceph, f"{POOL}/metadata") as image:
        for key, value in METADATA.items():
            image.metadata_set(key, value)
    _mark_as_invalid(ceph, INVALID)


def said(ceph: Ceph, *command: str) -> Any:
    """What a command of `rbd` says, in JSON, which escapes nothing; None if it says nothing."""
    return json.loads(ceph.run("rbd", *command, "--format", "json").strip() or "null", strict=False)


def _write(ceph: Ceph, spec: str, offsets: list[int]) -> None:
    with opened(ceph, spec) as image:
        for offset in offsets:
            image.write(random.Random(f"{spec} {offset}").randbytes(4096), offset + MIB // 2)


def _mark_as_invalid(ceph: Ceph, spec: str) -> None:
    flags = rbd.RBD_FLAG_OBJECT_MAP_INVALID | rbd.RBD_FLAG_FAST_DIFF_INVALID
    with opened(ceph, spec) as image:
        header = f"rbd_header.{image.id()}"
    with ceph.ioctx(POOL) as ioctx, rados.WriteOpCtx() as operation:
        ioctx.set_omap(operation, ("flags",), (flags.to_bytes(8, "little"),))
        ioctx.operate_write_op(operation, header)


if __name__ == "__main__":
    make_images(Ceph(Devcluster(DevclusterOptions(Path(sys.argv[1])))))
