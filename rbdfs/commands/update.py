"""`rbdfs export --update`: what to copy into a file so that it becomes a copy of a snapshot."""

import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import trio

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings.encoding import NANOSECONDS
from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.image.ceph_image import CephImage
from rbdfs.ceph.image.changes import Changes
from rbdfs.errors import LabelError
from rbdfs.export.journal import origin_of
from rbdfs.export.label import Copied
from rbdfs.export.updated_file import UpdatedFile
from rbdfs.spec import ImageSpec
from rbdfs.threads import run_in_thread

HINT = "--full compares all of it with the image, and writes what differs"

LATE_WRITES_SECONDS = 10.0
OLD_SECONDS = 60.0
"""A client that writes without the exclusive lock learns of a snapshot late (librbd waits `rbd_notify_timeout` for it,
10 s by default): its writes until then change the snapshot. By our clock, a snapshot is old enough only later than
that: other clocks may differ."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a file becomes a copy of a snapshot."""

    of: Copied | None
    """The snapshot that it is a copy of; None if that is not known."""
    towards: tuple[Copied, ...] = ()
    """The snapshots of unfinished updates, of which it may hold parts, and last the one to copy; empty if it is a copy
    of that one already."""
    changes: Changes | None = None
    """The ranges to copy; None compares all."""
    notice: str = ""
    """A line for a person."""


async def copied_of(cluster: Cluster, spec: ImageSpec, source: CephImage, *, wait: bool) -> Copied | None:
    """The snapshot as a label names it; None if it may still change, because something is filling it.

    `wait`: while the snapshot is so new that clients without the exclusive lock may change it, sleep; else None.
    """
    if source.image.snapshot_id is None or not source.state.is_complete:
        return None
    created_ns = source.state.own.header.modified_ns
    if not source.is_immutable and time.time() - created_ns / NANOSECONDS < OLD_SECONDS:
        if not wait:
            return None
        await trio.sleep(LATE_WRITES_SECONDS)
    origin = origin_of(cluster.fsid, source.image, source.size)
    return Copied(origin, str(replace(spec, snapshot="")), spec.snapshot, created_ns)


async def plan_update(
    cluster: Cluster, source: CephImage, new: Copied, target: UpdatedFile, closing: AsyncExitStack, *, full: bool
) -> Plan:
    """Find out what to copy. Does not change the file; `UpdatedFile.begin` does.

    Opens the snapshots of unfinished updates, which `closing` closes. Raises LabelError if only `full` can help, and
    RbdfsError.
    """
    if full:
        return Plan(None, (new,))
    try:
        label = await run_in_thread(target.read_label)
    except LabelError as error:
        raise LabelError(f"{error}; {HINT}") from error
    if label is None:
        what = "a block device has no label" if target.is_device else "it has no label"
        raise LabelError(f"{target.path} is not known to be a copy: {what}; {HINT}")
    if label.of is None:
        raise LabelError(f"an export --full to {target.path} did not finish, so its contents are not known; {HINT}")
    if label.whole is not None and label.whole.origin == new.origin:
        return Plan(label.of)
    for copied in (label.of, *label.towards):
        _check_image(copied, new, target)
    image, spec = source.image, source.spec
    snapshots = {ref.snapshot_id: name for name, ref in (await cluster.snapshots(_head(image))).items()}
    _check_old(label.of, new, snapshots, target)
    earlier = tuple(copied for copied in label.towards if copied.origin != new.origin)
    gone = [copied for copied in earlier if copied.origin.snapshot_id not in snapshots]
    if gone:
        notice = f"{target.path} may hold parts of {gone[0]}, which was removed: all of it is compared"
        return Plan(label.of, (*earlier, new), notice=notice)
    others: list[CephImage] = []
    for copied in earlier:
        name = snapshots[copied.origin.snapshot_id]
        ref = replace(image, snapshot_id=copied.origin.snapshot_id)
        others.append(await cluster.open_image(replace(spec, snapshot=name), ref))
        closing.push_async_callback(others[-1].close)
    kept_bytes = min(copied.origin.size for copied in (label.of, *label.towards))
    since = replace(image, snapshot_id=label.of.origin.snapshot_id)
    changes = await cluster.changes(since, [source, *others], kept_bytes)
    return Plan(label.of, (*earlier, new), changes)


def _head(image: ImageRef) -> ImageRef:
    return replace(image, snapshot_id=None)


def _check_image(copied: Copied, new: Copied, target: UpdatedFile) -> None:
    """Raise LabelError if it is a copy of another image."""
    old, origin = copied.origin, new.origin
    if old.cluster != origin.cluster:
        raise LabelError(f"{target.path} is a copy of {copied.image} of another cluster ({old.cluster}); {HINT}")
    if (old.pool_id, old.namespace, old.image_id) != (origin.pool_id, origin.namespace, origin.image_id):
        was = "that was another image of the same name; " if copied.image == new.image else ""
        raise LabelError(
            f"{target.path} is a copy of {copied.image}, image {old.image_id} in pool {old.pool_id}, and not of "
            f"{new.image}, image {origin.image_id} in pool {origin.pool_id}; {was}{HINT}"
        )


def _check_old(old: Copied, new: Copied, snapshots: dict[int | None, str], target: UpdatedFile) -> None:
    """Raise LabelError if the snapshot that the file is a copy of was removed, or is not an earlier one."""
    old_id = old.origin.snapshot_id
    if old_id not in snapshots:
        another = ", and another snapshot has its name now" if old.snapshot in snapshots.values() else ""
        raise LabelError(f"{target.path} is a copy of {old}, which was removed{another}; {HINT}")
    if old_id >= new.origin.snapshot_id:
        raise LabelError(
            f"{target.path} is a copy of {old}, which is not earlier than snapshot {new.origin.snapshot_id}; {HINT}"
        )
