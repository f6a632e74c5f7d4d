"""Random histories of an image and its snapshots, made by Ceph's own binding."""

import random
import struct
from contextlib import suppress
from dataclasses import dataclass

import rados
import rbd

from rbdfs.ceph.metadata import header
from tests.cluster import Ceph, random_bytes

KIB = 1 << 10
GRAIN = 512
ORDER = 16
"""Objects of 64 KiB: a few MiB are many."""
MOST_BYTES = 4 << 20
NO_SNAPSHOT = struct.pack("<Q", 2**64 - 2)
MAPS = rbd.RBD_FEATURE_OBJECT_MAP | rbd.RBD_FEATURE_FAST_DIFF
FEATURES = rbd.RBD_FEATURE_LAYERING | rbd.RBD_FEATURE_EXCLUSIVE_LOCK | rbd.RBD_FEATURE_DEEP_FLATTEN | MAPS

KINDS = ("maps", "no maps", "clone", "clone without maps", "striped", "format 1")


@dataclass
class History:
    """One image, and what happens to it."""

    ceph: Ceph
    name: str
    source: random.Random
    kind: str

    @classmethod
    def begin(cls, ceph: Ceph, source: random.Random, kind: str) -> "History":
        """A new image of a kind."""
        name = ceph.unique("history")
        size = MOST_BYTES - source.randrange(0, MOST_BYTES // 2, GRAIN)
        features = FEATURES & ~(MAPS if kind in ("no maps", "clone without maps", "striped") else 0)
        with ceph.ioctx() as ioctx:
            if kind.startswith("clone"):
                parent = f"{name}-parent"
                rbd.RBD().create(ioctx, parent, MOST_BYTES, ORDER, old_format=False, features=features)
                with rbd.Image(ioctx, parent) as image:
                    for start in range(0, MOST_BYTES, MOST_BYTES // 8):
                        image.write(random_bytes(source.randrange(1, MOST_BYTES // 8), seed=start), start)
                    image.create_snap("s")
                    image.protect_snap("s")
                rbd.RBD().clone(ioctx, parent, "s", ioctx, name, features=features, order=ORDER)
            elif kind == "format 1":
                rbd.RBD().create(ioctx, name, size, ORDER, old_format=True)
            else:
                stripes = {"stripe_unit": 16 * KIB, "stripe_count": 3} if kind == "striped" else {}
                rbd.RBD().create(ioctx, name, size, ORDER, old_format=False, features=features, **stripes)
        return cls(ceph, name, source, kind)

    def go_on(self, steps: int) -> list[str]:
        """Do some things at random. Which."""
        choices = [self.write, self.write, self.write, self.discard, self.write_zeroes, self.resize, self.roll_back]
        if self.kind.startswith("clone"):
            choices += [self.flatten]
        if self.kind in ("maps", "clone"):
            choices += [self.toggle_maps, self.invalidate_maps]
        choices += [self.sparsify] if self.kind != "format 1" else []
        done = []
        for _ in range(steps):
            step = self.source.choice(choices)
            step()
            done.append(step.__name__)
        return done

    def snap(self, name: str) -> None:
        """Make a snapshot."""
        with self.ceph.ioctx() as ioctx, rbd.Image(ioctx, self.name) as image:
            image.create_snap(name)

    def remove_snap(self, name: str) -> None:
        """Remove one."""
        with self.ceph.ioctx() as ioctx, rbd.Image(ioctx, self.name) as image:
            image.remove_snap(name)

    def _range(self, image: rbd.Image, grain: int = GRAIN) -> tuple[int, int]:
        size = image.size()
        start = self.source.randrange(0, max(1, size), grain)
        longest = max(grain, self.source.choice((4 * KIB, 64 * KIB, 512 * KIB)))
        return start, min(self.source.randrange(grain, longest + 1, grain), size - start)

    def write(self) -> None:
        """Bytes, or zeros."""
        with self.ceph.ioctx() as ioctx, rbd.Image(ioctx, self.name) as image:
            start, length = self._range(image)
            zeros = self.source.random() < 0.1
            image.write(bytes(length) if zeros else self.source.randbytes(length), start)

    def discard(self) -> None:
        """Sometimes whole objects."""
        with self.ceph.ioctx() as ioctx, rbd.Image(ioctx, self.name) as image:
            image.discard(*self._range(image, self.source.choice((GRAIN, 1 << ORDER))))

    def write_zeroes(self) -> None:
        """As a discard that must read as zeros."""
        with self.ceph.ioctx() as ioctx, rbd.Image(ioctx, self.name) as image:
            image.write_zeroes(*self._range(image))

    def resize(self) -> None:
        """Sometimes shrunk and grown at once, so that what was there is not."""
        with self.ceph.ioctx() as ioctx, rbd.Image(ioctx, self.name) as image:
            sizes = [self.source.randrange(GRAIN, MOST_BYTES, GRAIN) for _ in range(self.source.choice((1, 1, 2)))]
            for size in sizes:
                image.resize(size)

    def roll_back(self) -> None:
        """To any snapshot, but for one with an invalid map: HEAD would have that, and take it for valid (16.2)."""
        with self.ceph.ioctx() as ioctx, rbd.Image(ioctx, self.name) as image:
            has_map = image.features() & rbd.RBD_FEATURE_OBJECT_MAP
            names = [
                each["name"]
                for each in image.list_snaps()
                if not (has_map and self._is_invalid(ioctx, image.id(), each["id"]))
            ]
            if names:
                image.rollback_to_snap(self.source.choice(names))

    @staticmethod
    def _is_invalid(ioctx: rados.Ioctx, image_id: str, snapshot_id: int) -> bool:
        _, flags = ioctx.execute(header.object_name(image_id), "rbd", "get_flags", struct.pack("<Q", snapshot_id))
        return bool(struct.unpack("<Q", flags)[0] & rbd.RBD_FLAG_OBJECT_MAP_INVALID)

    def flatten(self) -> None:
        """Seldom: it is once and for all."""
        if self.source.random() < 0.3:
            with self.ceph.ioctx() as ioctx, rbd.Image(ioctx, self.name) as image, suppress(rbd.InvalidArgument):
                image.flatten()

    def toggle_maps(self) -> None:
        """Made anew they are invalid, until they are rebuilt."""
        with self.ceph.ioctx() as ioctx, rbd.Image(ioctx, self.name) as image:
            image.update_features(MAPS, not image.features() & rbd.RBD_FEATURE_OBJECT_MAP)
        if self.source.random() < 0.5:
            with suppress(rbd.InvalidArgument), self.ceph.ioctx() as ioctx, rbd.Image(ioctx, self.name) as image:
                image.rebuild_object_map()

    def drop_maps(self) -> None:
        """Those of snapshots, too: they may be wrong, and librbd reads by them."""
        with self.ceph.ioctx() as ioctx, rbd.Image(ioctx, self.name) as image:
            if image.features() & rbd.RBD_FEATURE_OBJECT_MAP:
                image.update_features(MAPS, False)

    def invalidate_maps(self) -> None:
        """As librbd does when it could not write one."""
        with self.ceph.ioctx() as ioctx:
            with rbd.Image(ioctx, self.name) as image:
                if not image.features() & rbd.RBD_FEATURE_OBJECT_MAP:
                    return
                image_id = image.id()
            flags = rbd.RBD_FLAG_OBJECT_MAP_INVALID | rbd.RBD_FLAG_FAST_DIFF_INVALID
            mask = struct.pack("<Q", flags)
            ioctx.execute(header.object_name(image_id), "rbd", "set_flags", mask + mask + NO_SNAPSHOT)

    def sparsify(self) -> None:
        """Zeros become holes."""
        with self.ceph.ioctx() as ioctx, rbd.Image(ioctx, self.name) as image:
            image.sparsify(4 * KIB)
