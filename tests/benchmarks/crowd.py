"""Pools of a size that librbd would take hours to make, written as it would have: only to be listed and looked at."""

import struct
from collections.abc import Iterator

import rados
import rbd

from rbdfs.ceph.bindings.encoding import encode_string
from rbdfs.ceph.metadata import header
from rbdfs.ceph.metadata.rbd_directory import DIRECTORY
from tests.cluster import Ceph

CROWD_POOL = "crowd"
CROWD = "crowd0"
"""The first of CROWD_COUNT images, alike, without data."""
CROWD_COUNT = 100_000

SNAPPED_POOL = "snapped"
SNAPPED = "snapped"
"""An image with SNAPSHOT_COUNT snapshots."""
SNAPSHOT_COUNT = 10_000

VAST_POOL = "vast"
VAST = "vast"
"""64 TiB whose object map says that every other run of VAST_RUN objects is there."""
VAST_BYTES = 64 << 40
VAST_RUN = 1 << 16

SPACES_POOL = "spaces"
SPACES = "spaced"
"""An image in a pool with NAMESPACE_COUNT namespaces, each with an image."""
NAMESPACE_COUNT = 500

IMAGE_BYTES = 10 << 30
KEYS_A_WRITE = 5_000
IN_FLIGHT = 256
OBJECT_BYTES = 4 << 20


def make_crowd(ceph: Ceph) -> int:
    """CROWD_COUNT images; the size of one in bytes."""
    ceph.make_pool(CROWD_POOL)
    with ceph.ioctx(CROWD_POOL) as ioctx:
        rbd.RBD().create(ioctx, "template", IMAGE_BYTES, old_format=False)
        with rbd.Image(ioctx, "template", read_only=True) as image:
            template = image.id()
        keys = _omap(ioctx, header.object_name(template))
        held = ioctx.read(f"rbd_object_map.{template}", 1 << 20)
        rbd.RBD().remove(ioctx, "template")
        names = {f"crowd{number}": f"c{number:x}" for number in range(CROWD_COUNT)}
        _write_all(ioctx, _crowd_objects(names, keys, held))
        directory = {}
        for name, image_id in names.items():
            directory[f"name_{name}"] = encode_string(image_id)
            directory[f"id_{image_id}"] = encode_string(name)
        _set_omap(ioctx, DIRECTORY, directory)
    return IMAGE_BYTES


def _crowd_objects(
    names: dict[str, str], keys: dict[str, bytes], held: bytes
) -> Iterator[tuple[str, bytes, dict[str, bytes]]]:
    """Names, data and keys of the objects of images."""
    for name, image_id in names.items():
        yield f"rbd_id.{name}", encode_string(image_id), {}
        yield header.object_name(image_id), b"", keys | {"object_prefix": encode_string(f"rbd_data.{image_id}")}
        yield f"rbd_object_map.{image_id}", held, {}


def make_snapped(ceph: Ceph) -> int:
    """An image with SNAPSHOT_COUNT snapshots, of which RADOS knows nothing; its size in bytes."""
    ceph.make_pool(SNAPPED_POOL)
    with ceph.ioctx(SNAPPED_POOL) as ioctx:
        rbd.RBD().create(ioctx, SNAPPED, IMAGE_BYTES, old_format=False)
        with rbd.Image(ioctx, SNAPPED) as image:
            image_id = image.id()
            image.create_snap("0")
            first = next(iter(image.list_snaps()))["id"]
        keys = _omap(ioctx, header.object_name(image_id))
        snapshot = keys[f"snapshot_{first:016x}"]
        # A cls_rbd_snap (src/cls/rbd/cls_rbd_types.h): version, compatible version, length, id, name.
        head, rest = snapshot[:6], snapshot[6 + 8 + 4 + 1 :]
        made = {}
        for number in range(1, SNAPSHOT_COUNT):
            body = struct.pack("<Q", first + number) + encode_string(str(number)) + rest
            made[f"snapshot_{first + number:016x}"] = head[:2] + struct.pack("<I", len(body)) + body
        made["snap_seq"] = struct.pack("<Q", first + SNAPSHOT_COUNT)
        _set_omap(ioctx, header.object_name(image_id), made)
    return IMAGE_BYTES


def make_vast(ceph: Ceph) -> int:
    """An image without one object, whose map says that half of them are there; its size in bytes."""
    ceph.make_pool(VAST_POOL)
    with ceph.ioctx(VAST_POOL) as ioctx:
        rbd.RBD().create(ioctx, VAST, VAST_BYTES, old_format=False)
        with rbd.Image(ioctx, VAST, read_only=True) as image:
            name = f"rbd_object_map.{image.id()}"
        for first in range(0, VAST_BYTES // OBJECT_BYTES, 2 * VAST_RUN):
            # cls_rbd's object_map_update: from which object to which, what they are now (1: there), and not only if
            # they were something else before.
            ioctx.execute(name, "rbd", "object_map_update", struct.pack("<QQBB", first, first + VAST_RUN, 1, 0))
    return VAST_BYTES


def make_spaces(ceph: Ceph) -> int:
    """NAMESPACE_COUNT namespaces with an image each, and one image beside them; its size in bytes."""
    ceph.make_pool(SPACES_POOL)
    with ceph.ioctx(SPACES_POOL) as ioctx:
        rbd.RBD().create(ioctx, SPACES, IMAGE_BYTES, old_format=False)
        for number in range(NAMESPACE_COUNT):
            rbd.RBD().namespace_create(ioctx, f"team{number}")
            ioctx.set_namespace(f"team{number}")
            rbd.RBD().create(ioctx, "vm1", IMAGE_BYTES, old_format=False)
            ioctx.set_namespace("")
    return IMAGE_BYTES


def _omap(ioctx: rados.Ioctx, name: str) -> dict[str, bytes]:
    with rados.ReadOpCtx() as operation:
        values, _ = ioctx.get_omap_vals(operation, "", "", 1000)
        ioctx.operate_read_op(operation, name)
        return dict(values)


def _set_omap(ioctx: rados.Ioctx, name: str, values: dict[str, bytes]) -> None:
    keys = list(values)
    for start in range(0, len(keys), KEYS_A_WRITE):
        some = tuple(keys[start : start + KEYS_A_WRITE])
        with rados.WriteOpCtx() as operation:
            ioctx.set_omap(operation, some, tuple(values[key] for key in some))
            ioctx.operate_write_op(operation, name)


def _write_all(ioctx: rados.Ioctx, objects: Iterator[tuple[str, bytes, dict[str, bytes]]]) -> None:
    """Many at once."""
    waiting: list[rados.Completion] = []
    for name, data, values in objects:
        with rados.WriteOpCtx() as operation:
            operation.write_full(data)
            if values:
                ioctx.set_omap(operation, tuple(values), tuple(values.values()))
            waiting.append(ioctx.operate_aio_write_op(operation, name))
        if len(waiting) == IN_FLIGHT:
            _wait(waiting)
    _wait(waiting)


def _wait(waiting: list[rados.Completion]) -> None:
    for completion in waiting:
        completion.wait_for_complete_and_cb()
    waiting.clear()
