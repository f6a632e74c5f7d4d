"""The rules of another client. Each is done, or refused, before the next step."""

import time
from functools import partial

import rbd
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition

from rbdfs.ceph.metadata import header
from tests.model.example import SIZE_MAX, Example, picks, places, sizes, step
from tests.model.reference import Before, Image, Place, Readable, Spec, differing
from tests.model.world import DATA_POOL, PLACES, retried
from tests.truth import describe

FEATURES = {
    "layering": 1,
    "striping": 2,
    "exclusive-lock": 4,
    "object-map": 8,
    "fast-diff": 16,
    "deep-flatten": 32,
    "journaling": 64,
}
FEATURE_SETS = (61, 5, 1, 29, 33, 13, 0, 125)
CHANGES = (8 | 16, 16, 4 | 8 | 16, 64)
"""Features that are enabled and disabled together."""
MAP_INVALID = rbd.RBD_FLAG_OBJECT_MAP_INVALID | rbd.RBD_FLAG_FAST_DIFF_INVALID
DEPTH_MAX = 3
WRITERS_MAX = 2

orders = st.sampled_from([16, 14, 18, 20])
stripes = st.sampled_from([None, None, (1, 2), (4, 3)])
"""How many stripe units an object has, and how many objects a stripe."""
ranges = st.tuples(
    st.integers(0, SIZE_MAX // 4096 - 1),
    st.integers(1, SIZE_MAX // 4096),
    st.sampled_from([0, 0, 0, 512, 1000]),
    st.sampled_from([0, 0, 0, -512, -1000]),
)
"""The first 4 KiB, how many, and what begins and ends beside their boundaries."""


def within(size: int, wanted: tuple[int, int, int, int]) -> tuple[int, int]:
    """An offset and a length in something of this size, which is not 0."""
    first, count, later, longer = wanted
    offset = (first * 4096 + later) % size
    return offset, min(max(count * 4096 + longer, 1), size - offset)


def named(mask: int) -> str:
    """Features, as the rbd command has them."""
    return ",".join(name for name, bit in FEATURES.items() if mask & bit)


def told_apart(read: bytes, right: bytes, image: Image) -> str:
    """How something else than the model has was read."""
    versions = {f"version_{number}": each.content for number, each in enumerate(image.versions)}
    return f"{len(read)} bytes instead of {len(right)}: {describe(read, right=right, **versions)}"


class Others(Example):
    """What another client does."""

    # Images

    @initialize(size=sizes, features=st.sampled_from(FEATURE_SETS), order=orders)
    def first_image(self, size: int, features: int, order: int) -> None:
        """There is something to begin with, and a snapshot of it."""
        self.make(PLACES[0], 0, max(size, 4096), features, order, None, None, filled=True)
        self.make_snapshot(next(iter(self.reference.images.values())), "s")

    @precondition(lambda self: not self.is_full)
    @step(
        place=places,
        name=picks,
        size=sizes,
        features=st.sampled_from(FEATURE_SETS),
        order=orders,
        striped=stripes,
        data_pool=st.sampled_from([None, None, DATA_POOL]),
        filled=st.booleans(),
    )
    def create(
        self,
        place: Place,
        name: int,
        size: int,
        features: int,
        order: int,
        striped: tuple[int, int] | None,
        data_pool: str | None,
        filled: bool,
    ) -> None:
        self.make(place, name, size, features, order, striped, data_pool, filled=filled)

    def make(
        self,
        place: Place,
        name: int,
        size: int,
        features: int,
        order: int,
        striped: tuple[int, int] | None,
        data_pool: str | None,
        *,
        filled: bool,
    ) -> None:
        """As `rbd create`."""
        spec = self.free(place, name)
        options: dict[str, object] = {"order": order, "features": features}
        line = f"rbd create --size {size}B --object-size {1 << order}B"
        line += "".join(f" --image-feature {each}" for each in named(features).split(",") if each)
        if striped is not None:
            units, count = striped
            options |= {"stripe_unit": (1 << order) // units, "stripe_count": count, "features": features | 2}
            line += f" --stripe-unit {(1 << order) // units}B --stripe-count {count}"
        if data_pool is not None:
            options["data_pool"] = data_pool
            line += f" --data-pool {data_pool}"
        make = partial(rbd.RBD().create, self.world.at(place), spec.name, size, old_format=False, **options)
        self.do(f"{line} {spec}", make, may_be_refused=False)
        image = self.bind_new(spec, Image(bytes(size), time.monotonic()))
        if filled and size:
            self.write_at(image, 0, size)

    def bind_new(self, spec: Spec, image: Image) -> Image:
        """An image has come to be."""
        with rbd.Image(self.world.at(spec.place), spec.name, read_only=True) as handle:
            image.ids.append(handle.id())
        self.reference.bind(spec, image, time.monotonic())
        return image

    @step(which=picks, name=picks)
    def rename(self, which: int, name: int) -> None:
        if image := self.one(which):
            spec = self.reference.spec(image)
            new = self.free(spec.place, name)
            self.rename_to(image, spec, new)

    def rename_to(self, image: Image, spec: Spec, new: Spec) -> None:
        """In its place."""
        move = partial(rbd.RBD().rename, self.world.at(spec.place), spec.name, new.name)
        if self.do(f"rbd rename {spec} {new}", move):
            self.reference.bind(spec, None, time.monotonic())
            self.reference.bind(new, image, time.monotonic())

    @step(which=picks, other=picks)
    def rename_over(self, which: int, other: int) -> None:
        image, old = self.one(which), self.one(other, written=False)
        if image is None or old is None or image is old:
            return
        spec, new = self.reference.spec(image), self.reference.spec(old)
        if spec.place == new.place and self.remove_image(old):
            self.rename_to(image, spec, new)

    @step(which=picks)
    def remove(self, which: int) -> None:
        if image := self.one(which, written=False):
            self.remove_image(image)

    def remove_image(self, image: Image) -> bool:
        """Whether it was removed: it has neither snapshots nor watchers."""
        spec = self.reference.spec(image)
        remove = partial(rbd.RBD().remove, self.world.at(spec.place), spec.name)
        if self.do_unwatched(f"rbd rm --no-progress {spec}", remove, image):
            self.reference.bind(spec, None, time.monotonic())
            image.link(None)
            image.disturb()
            return True
        return False

    def do_unwatched(self, line: str, action: "partial[object]", image: Image) -> bool:
        """As `do`, what is refused of a watched image, and what a watch of a moment ago may still hold off."""
        if not self.is_watched(image):
            return self.do(line, partial(retried, action))
        done = self.do(line, action)
        assert not done, f"{self.reference.spec(image)} is open, and that does not hold this off"
        return False

    @step(which=picks)
    def trash_move(self, which: int) -> None:
        if image := self.one(which, written=False):
            spec = self.reference.spec(image)
            move = partial(rbd.RBD().trash_move, self.world.at(spec.place), spec.name, 0)
            if self.do(f"rbd trash mv {spec}", move, may_be_refused=False):  # a watch does not hold it off
                self.reference.bind(spec, None, time.monotonic())
                self.reference.trash[image] = spec
                image.disturb()

    @precondition(lambda self: self.reference.trash)
    @step(which=picks, name=picks)
    def trash_restore(self, which: int, name: int) -> None:
        image, old = list(self.reference.trash.items())[which % len(self.reference.trash)]
        spec = self.free(old.place, name)
        restore = partial(rbd.RBD().trash_restore, self.world.at(spec.place), image.id, spec.name)
        place = f"--pool {spec.place.pool} --namespace '{spec.place.namespace}'"
        line = f"rbd trash restore {place} --image {spec.name} ID  # of what was {old}"
        self.do(line, restore, may_be_refused=False)
        del self.reference.trash[image]
        self.reference.bind(spec, image, time.monotonic())

    # Bytes

    def write_at(self, image: Image, offset: int, length: int, zeros_at_end: int = 0) -> None:
        """Write what was nowhere before."""
        length -= zeros_at_end
        if length > 0:
            expression, data = self.random_bytes(length)
            end = f" + bytes({zeros_at_end})" if zeros_at_end else ""
            data += bytes(zeros_at_end)
            if self.on(image, f"write({expression}{end}, {offset})", lambda handle: handle.write(data, offset)):
                image.write(offset, data, time.monotonic())

    @step(which=picks, wanted=ranges, zeros_at_end=st.sampled_from([0, 0, 1, 5000]))
    def write(self, which: int, wanted: tuple[int, int, int, int], zeros_at_end: int) -> None:
        if (image := self.any_one(which)) and image.content:
            self.write_at(image, *within(len(image.content), wanted), zeros_at_end)

    @step(which=picks, wanted=ranges, how=st.sampled_from(["discard", "write_zeroes", "write"]))
    def zero(self, which: int, wanted: tuple[int, int, int, int], how: str) -> None:
        if (image := self.any_one(which)) and image.content:
            offset, length = within(len(image.content), wanted)
            if how == "write":
                done = self.on(
                    image, f"write(bytes({length}), {offset})", lambda handle: handle.write(bytes(length), offset)
                )
            else:
                done = self.on(image, f"{how}({offset}, {length})", lambda handle: getattr(handle, how)(offset, length))
            if done:
                image.write(offset, bytes(length), time.monotonic())

    @step(which=picks, size=sizes)
    def resize(self, which: int, size: int) -> None:
        if image := self.one(which):
            line = f"rbd resize --no-progress --allow-shrink --size {size}B {self.reference.spec(image)}"
            if self.on(image, line, lambda handle: handle.resize(size)):
                if size < len(image.content):
                    image.disturb()
                image.become(image.content[:size].ljust(size, b"\0"), time.monotonic())

    @step(which=picks)
    def sparsify(self, which: int) -> None:
        if image := self.one(which):
            line = f"rbd sparsify --no-progress --sparse-size 4096 {self.reference.spec(image)}"
            self.on(image, line, lambda handle: handle.sparsify(4096))

    # Snapshots

    @step(which=picks, name=st.sampled_from("st"))
    def snapshot_create(self, which: int, name: str) -> None:
        image = self.one(which)
        if image and name not in image.snapshots:
            self.make_snapshot(image, name)

    def make_snapshot(self, image: Image, name: str) -> None:
        """As `rbd snap create`."""
        line = f"rbd snap create --no-progress {self.reference.spec(image)}@{name}"
        if self.on(image, line, lambda handle: handle.create_snap(name)):
            image.snapshots[name] = Readable(image.content, time.monotonic())

    @step(which=picks, snapshot=picks)
    def snapshot_remove(self, which: int, snapshot: int) -> None:
        image = self.one(which)
        if image and (name := self.snapshot(image, snapshot)):
            line = f"rbd snap rm --no-progress {self.reference.spec(image)}@{name}"
            if self.on(image, line, lambda handle: handle.remove_snap(name)):
                image.snapshots.pop(name).disturbed += 1

    @step(which=picks, snapshot=picks)
    def snapshot_protect(self, which: int, snapshot: int) -> None:
        image = self.one(which)
        if image and (name := self.snapshot(image, snapshot)):
            with self.opened(image, read_only=True) as handle:
                how = "unprotect" if handle.is_protected_snap(name) else "protect"
            line = f"rbd snap {how} {self.reference.spec(image)}@{name}"
            self.on(image, line, lambda handle: getattr(handle, f"{how}_snap")(name))

    @step(which=picks, snapshot=picks)
    def rollback(self, which: int, snapshot: int) -> None:
        image = self.one(which)
        if image and (name := self.snapshot(image, snapshot)):
            line = f"rbd snap rollback --no-progress {self.reference.spec(image)}@{name}"
            if self.on(image, line, lambda handle: handle.rollback_to_snap(name)):
                image.disturb()
                image.become(image.snapshots[name].content, time.monotonic())

    # Clones and copies

    @precondition(lambda self: not self.is_full)
    @step(
        which=picks,
        snapshot=picks,
        place=places,
        name=picks,
        clone_format=st.sampled_from([2, 1]),
        order=orders,
        features=st.sampled_from(FEATURE_SETS),
    )
    def clone(
        self, which: int, snapshot: int, place: Place, name: int, clone_format: int, order: int, features: int
    ) -> None:
        parent = self.one(which)
        if not parent or parent.depth >= DEPTH_MAX or not (base := self.snapshot(parent, snapshot)):
            return
        of, spec = self.reference.spec(parent), self.free(place, name)
        features |= rbd.RBD_FEATURE_LAYERING
        if clone_format == 1:
            with self.opened(parent, read_only=True) as handle:
                is_protected = handle.is_protected_snap(base)
            if not is_protected:
                self.on(parent, f"rbd snap protect {of}@{base}", lambda handle: handle.protect_snap(base))
        line = f"rbd clone --rbd-default-clone-format {clone_format} --object-size {1 << order}B"
        line += "".join(f" --image-feature {each}" for each in named(features).split(","))
        self.world.client.conf_set("rbd_default_clone_format", str(clone_format))
        at = (self.world.at(of.place), of.name, base, self.world.at(place), spec.name)
        if self.do(f"{line} {of}@{base} {spec}", partial(rbd.RBD().clone, *at, features=features, order=order)):
            self.bind_new(spec, Image(parent.snapshots[base].content, time.monotonic(), parent))

    @step(which=picks)
    def flatten(self, which: int) -> None:
        if (image := self.one(which)) and image.parent:
            line = f"rbd flatten --no-progress {self.reference.spec(image)}"
            if self.on(image, line, lambda handle: handle.flatten()):
                image.disturb()

    @precondition(lambda self: not self.is_full)
    @step(which=picks, place=places, name=picks, order=orders)
    def deep_copy(self, which: int, place: Place, name: int, order: int) -> None:
        if image := self.one(which):
            of, spec = self.reference.spec(image), self.free(place, name)
            at = (self.world.at(place), spec.name)
            line = f"rbd deep cp --no-progress --object-size {1 << order}B {of} {spec}"
            with self.opened(image, read_only=True) as handle:
                done = self.do(line, partial(handle.deep_copy, *at, order=order))
            if done:
                copy = self.bind_new(spec, Image(image.content, time.monotonic(), image.parent))
                for snapshot, each in image.snapshots.items():
                    copy.snapshots[snapshot] = Readable(each.content, time.monotonic())

    # Migration. librbd fails an assertion over snapshots and sizes that change in the middle of one (16.2:
    # ObjectCopyRequest::compute_read_ops), and ends the process: so here they do not.

    @step(which=picks, place=places, name=picks, order=orders)
    def migration_prepare(self, which: int, place: Place, name: int, order: int) -> None:
        if image := self.one(which, written=False):
            spec, new = self.reference.spec(image), self.free(place, name)
            at = (self.world.at(spec.place), spec.name, self.world.at(place), new.name)
            prepare = partial(rbd.RBD().migration_prepare, *at, order=order)
            if self.do_unwatched(f"rbd migration prepare --object-size {1 << order}B {spec} {new}", prepare, image):
                image.before_migration = Before(spec, image.content, dict(image.snapshots))
                self.moved(image, spec, new)

    def moved(self, image: Image, spec: Spec, new: Spec) -> None:
        """Another image in the cluster has the name and the bytes from now on."""
        image.disturb(descendants=True)
        self.reference.bind(spec, None, time.monotonic())
        self.bind_new(new, image)

    @step(which=picks)
    def migration_execute(self, which: int) -> None:
        if image := self.one(which, migrating=True, written=False):
            spec = self.reference.spec(image)
            execute = partial(rbd.RBD().migration_execute, self.world.at(spec.place), spec.name)
            self.do(f"rbd migration execute --no-progress {spec}", execute)

    @step(which=picks)
    def migration_commit(self, which: int) -> None:
        if image := self.one(which, migrating=True, written=False):
            spec = self.reference.spec(image)
            commit = partial(rbd.RBD().migration_commit, self.world.at(spec.place), spec.name)
            if self.do(f"rbd migration commit --no-progress --force {spec}", commit):
                image.before_migration = None
                image.disturb(descendants=True)

    @step(which=picks)
    def migration_abort(self, which: int) -> None:
        image = self.one(which, migrating=True, written=False)
        # librbd 16.2 leaves the image's clones without a parent then: nobody can open them any more, nor can it itself.
        if image and not image.children and (before := image.before_migration):
            spec = self.reference.spec(image)
            abort = partial(rbd.RBD().migration_abort, self.world.at(spec.place), spec.name)
            if before.spec not in self.reference.images and self.do(f"rbd migration abort --no-progress {spec}", abort):
                for name, snapshot in image.snapshots.items():
                    snapshot.disturbed += name not in before.snapshots
                image.before_migration = None
                image.snapshots = before.snapshots
                written = image.content
                self.moved(image, spec, before.spec)
                # What was written in the middle of it is lost, or is not: no document says which (16.2).
                content = self.librbd_reads(image, None)
                wrong = differing(content, before.content, written)
                assert not wrong, (
                    f"after the abort librbd reads what never was there, in {len(wrong)} blocks: {wrong[:8]}"
                )
                image.become(content, time.monotonic())

    # Features, maps, metadata, locks

    @step(which=picks, mask=st.sampled_from(CHANGES), enabled=st.booleans())
    def update_features(self, which: int, mask: int, enabled: bool) -> None:
        if image := self.one(which):
            line = f"rbd feature {'enable' if enabled else 'disable'} {self.reference.spec(image)} {named(mask)}"
            self.on(image, line.replace(",", " "), lambda handle: handle.update_features(mask, enabled))

    @step(which=picks)
    def object_map_rebuild(self, which: int) -> None:
        if image := self.one(which):
            line = f"rbd object-map rebuild --no-progress {self.reference.spec(image)}"
            self.on(image, line, lambda handle: handle.rebuild_object_map())

    @step(which=picks, snapshot=st.none() | picks)
    def object_map_invalidate(self, which: int, snapshot: int | None) -> None:
        """As librbd does it that could not write the map."""
        if image := self.one(which):
            name = None if snapshot is None else self.snapshot(image, snapshot)
            spec = self.reference.spec(image)
            with self.opened(image, read_only=True) as handle:
                if not handle.features() & rbd.RBD_FEATURE_OBJECT_MAP:
                    return
                number = 2**64 - 2 if name is None else handle.snap_get_id(name)
            flags = MAP_INVALID.to_bytes(8, "little")
            arguments = (header.object_name(image.id), "rbd", "set_flags", flags + flags + number.to_bytes(8, "little"))
            what = f"{spec}@{name}" if name else spec
            line = f"# the object map of {what} is marked invalid: class method rbd.set_flags"
            self.do(line, partial(self.world.at(spec.place).execute, *arguments))

    @step(which=picks, value=st.sampled_from("xy"))
    def set_metadata(self, which: int, value: str) -> None:
        if image := self.one(which):
            line = f"rbd image-meta set {self.reference.spec(image)} key {value}"
            self.on(image, line, lambda handle: handle.metadata_set("key", value))

    @precondition(lambda self: len(self.writers) < WRITERS_MAX)
    @step(which=picks)
    def writer_comes(self, which: int) -> None:
        """A client opens an image for writing, and stays: it holds the lock from its first write on."""
        image = self.one(which, written=False)
        if image and image.content:
            spec = self.reference.spec(image)
            ioctx = self.stack.enter_context(self.world.ioctx(self.world.writer, spec.place))
            self.history.append(f"# a client opens {spec} for writing and stays; its first write:")
            self.writers[image] = rbd.Image(ioctx, spec.name)
            self.write_at(image, 0, min(len(image.content), 4096))

    @precondition(lambda self: self.writers)
    @step(which=picks)
    def writer_leaves(self, which: int) -> None:
        image = list(self.writers)[which % len(self.writers)]
        self.history.append(f"# the writer of {self.reference.spec(image)} is gone")
        self.writers.pop(image).close()

    @step(seconds=st.sampled_from([0.2, 1.2]))
    def pass_time(self, seconds: float) -> None:
        """What is known for so long, or done so often, comes to its end."""
        self.history.append(f"sleep {seconds}")
        time.sleep(seconds)

    # The independent reader

    @step(which=picks, snapshot=st.none() | picks)
    def librbd_agrees(self, which: int, snapshot: int | None) -> None:
        """What the model says is what `rbd export` reads."""
        if image := self.any_one(which):
            name = None if snapshot is None else self.snapshot(image, snapshot)
            right = image.snapshots[name].content if name else image.content
            what = f"{self.reference.spec(image)}{'@' + name if name else ''}"
            self.history.append(f"rbd export --no-progress {what} - | cmp - MODEL")
            read = self.librbd_reads(image, name)
            assert read == right, f"librbd and the model do not agree: {told_apart(read, right, image)}"
