"""Where a soak takes place: a cluster of three OSDs with images, a mount under memory pressure, and room for copies."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import rbd

from tests.cluster import Ceph, Mount, running_ceph
from tests.soak.changes import Changes
from tests.soak.fixed import FULL, POOL, Fixed, files_of, make_all
from tests.soak.probe import Probe
from tests.soak.programs import Programs

OSDS = 3
REFERENCES = "references"
"""The folder of what the images hold."""
OSD_TIMEOUT_SECONDS = 10
"""Of the mount."""
CACHE_SIZE = "16M"
"""Less than any image: the object cache drops something all the time."""


@dataclass(frozen=True, slots=True)
class Site:
    """All that readers, changes and faults share."""

    folder: Path
    ceph: Ceph
    mount: Mount
    fixed: Mapping[str, Fixed]
    changes: Changes
    probe: Probe
    programs: Programs

    @property
    def files(self) -> Path:
        """What is in the file system of the image DISK."""
        return files_of(self.folder / REFERENCES)

    def path(self, fixed: Fixed) -> Path:
        """The file of an image."""
        return self.mount.path / POOL / fixed.name

    @contextmanager
    def room(self, name: str) -> Iterator[Path]:
        """An empty folder, for as long as it is needed."""
        folder = self.folder / name
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def site(seed: int, scale: int) -> Iterator[Site]:
    """Bring all of it up, and leave nothing behind. In TMPDIR if set, else in /var/tmp, which is on a disk.

    The mount is ended with an AssertionError if its process does not end, or if it has logged a traceback.
    """
    folder = Path(tempfile.mkdtemp(prefix="rbdfs-soak-", dir=os.environ.get("TMPDIR", "/var/tmp")))  # noqa: S108
    try:
        with running_ceph(OSDS, parent=folder) as ceph:
            for pause in ("osd_recovery_sleep", "osd_snap_trim_sleep"):  # of 0.1 s and more an object, on disks
                ceph.run("ceph", "config", "set", "osd", pause, "0")
            # Else an OSD that was silent a few times is thought up for minutes, and clients wait for it.
            ceph.run("ceph", "config", "set", "mon", "mon_osd_adjust_heartbeat_grace", "false")
            changes = Changes(ceph, seed)
            try:
                fixed = make_all(ceph, folder / REFERENCES, seed, scale)
                options = ("--cache-size", CACHE_SIZE, "--osd-timeout", str(OSD_TIMEOUT_SECONDS))
                probe = Probe(ceph, POOL, probed(ceph))
                mount = Mount(ceph, folder / "mount", options, "rbdfs")
                mount.expect("ERROR", "WARNING")
                try:
                    yield Site(folder, ceph, mount, fixed, changes, probe, Programs())
                finally:
                    probe.close()
                    mount.end()
            finally:
                changes.close()
                subprocess.run(["umount", "-l", "-q", str(folder / "mount" / "mnt")], check=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def probed(ceph: Ceph) -> list[str]:
    """Objects in many placement groups: those of one image, and all headers."""
    with ceph.ioctx(POOL) as ioctx:
        with rbd.Image(ioctx, FULL, read_only=True) as image:
            prefix = image.block_name_prefix()
        names = [entry.key for entry in ioctx.list_objects()]
    return [name for name in names if name.startswith((prefix, "rbd_header."))]
