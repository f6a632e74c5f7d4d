"""The table of what is measured: each row of the bar, and beside it what else can do the same work."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tests.benchmarks.crowd import CROWD, CROWD_COUNT, NAMESPACE_COUNT, SNAPPED, SNAPSHOT_COUNT, SPACES, VAST
from tests.benchmarks.measures import (
    Check,
    Contender,
    Figure,
    Unit,
    all_data_is_found,
    copy_is_thin,
    copy_is_whole,
    cpu_seconds,
    cpu_seconds_per_gb,
    crowd_is_whole,
    dd_read_all,
    du_is_right,
    fio_iops,
    fio_megabytes_per_second,
    hash_is_right,
    listing_is_whole,
    longest_read_seconds,
    megabytes_per_second,
    nothing,
    peak_rss_megabytes,
    rbd_bench_megabytes_per_second,
    rbd_du_is_right,
    seconds,
    seconds_with_mount,
    snapshots_are_whole,
)
from tests.benchmarks.peers import (
    QEMU_STORAGE_DAEMON,
    RBD_FUSE,
    RBDFS,
    RBDFS_COMMAND,
    Server,
    baseline_server,
    by_baseline,
)
from tests.benchmarks.site import BESIDE, CHANGED, EMPTY, FITS, MANY, QUARTERS, THIN

CACHE_BYTES = 256 << 20
"""The default of `--cache-size`."""
RSS_ALLOWANCE, RSS_AIM = 150e6, 80e6
"""Bytes that rbdfs may use beside its cache: at most, and aimed at."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A fixed figure to be compared with, in place of a peer's."""

    figure: float
    name: str = "a fixed limit"


@dataclass(frozen=True, slots=True)
class Case:
    """One work, who does it, and how much better we are to be."""

    id: str
    work: str
    unit: Unit
    ours: Contender
    peer: Contender | Limit
    bar: float | None = None
    """The least ratio (Unit.ratio: larger is better for us); none for a row that is there to be known."""
    aim: float | None = None
    context: Sequence[Contender] = ()
    """Others, without a bar."""
    before: Contender | None = None
    """The same work by another rbdfs (`--baseline`)."""

    @property
    def contenders(self) -> Sequence[Contender]:
        """All, we first; an earlier rbdfs is next to us, so that little can change between the two."""
        return tuple(each for each in (self.ours, self.before, self.peer, *self.context) if isinstance(each, Contender))

    def against_baseline(self, python: str) -> "Case":
        """With the rbdfs of another interpreter as one more contender."""
        before = replace(
            self.ours,
            name="rbdfs before",
            command=by_baseline(self.ours.command, python),
            server=baseline_server(python) if self.ours.server else None,
        )
        return replace(self, before=before)


@dataclass(frozen=True, slots=True)
class MemoryCase:
    """The row that is measured along with all others: the most memory that rbdfs had in any."""

    id: str = "rss"
    work: str = "peak RSS of rbdfs in any of these"
    against: str = "cache size + 150 MB"
    unit: Unit = Unit.MEMORY
    limit: float = (CACHE_BYTES + RSS_ALLOWANCE) / 1e6
    bar: float = 1.0
    aim: float = (CACHE_BYTES + RSS_ALLOWANCE) / (CACHE_BYTES + RSS_AIM)


MEMORY = MemoryCase()

SERVER_NAMES: Mapping[Server, str] = {
    RBDFS: "rbdfs",
    RBD_FUSE: "rbd-fuse",
    QEMU_STORAGE_DAEMON: "qemu-storage-daemon",
}


def _through(server: Server, command: str, check: Check, figure: Figure = megabytes_per_second) -> Contender:
    return Contender(SERVER_NAMES[server], command, figure, check, server)


def _dd(server: Server, options: str) -> Contender:
    return _through(server, f"dd if={{file}} of=/dev/null {options}", dd_read_all)


def _cp(server: Server) -> Contender:
    return _through(server, "cp {file} {target}", copy_is_whole)


def _sha256sum(server: Server) -> Contender:
    return _through(server, "sha256sum {file}", hash_is_right)


def _rsync(server: Server) -> Contender:
    return _through(server, "rsync {file} {target}", copy_is_whole)


def _randread(server: Server, jobs: int, *, direct: bool = True) -> Contender:
    options = f"--rw=randread --bs=4k --ioengine=psync --direct={int(direct)} --filename={{file}}"
    # They open the file one after the other, for rbd-fuse (see there), and all start to count after the last.
    names = " ".join(
        f"--name=job{number} --startdelay={number * FIO_STAGGER_MS}ms --ramp_time={(jobs - number) * FIO_STAGGER_MS}ms"
        for number in range(jobs)
    )
    return _through(server, f"{FIO} {options} {names}", nothing, fio_iops)


FIO_STAGGER_MS = 300
"""fio looks every 100 ms for jobs to start."""
FIO = "fio --readonly --thread --group_reporting --time_based --runtime=6 --output-format=json"
FIO_RBD = f"{FIO} --name=read --ioengine=rbd --clientname=admin --pool={{pool}} --rbdname={{image}}"

EXPORT = Contender("rbd export -", "rbd export --no-progress {pool}/{image} -", megabytes_per_second)
EXPORT_TO_FILE = Contender(
    "rbd export", "rbd export --no-progress {pool}/{image} {target}", megabytes_per_second, copy_is_whole
)
OUR_EXPORT_COMMAND = f"{RBDFS_COMMAND} export --no-progress {{pool}}/{{image}}"
OUR_EXPORT = Contender("rbdfs export -", f"{OUR_EXPORT_COMMAND} -", megabytes_per_second)
OUR_EXPORT_TO_FILE = Contender("rbdfs export", f"{OUR_EXPORT_COMMAND} {{target}}", megabytes_per_second, copy_is_whole)
QEMU_IMG = Contender(
    "qemu-img convert", "qemu-img convert -O raw rbd:{pool}/{image}:conf={conf} {target}", seconds, copy_is_whole
)
RBD_BENCH = Contender(
    "rbd bench (raw librbd)",
    "rbd bench --io-type read --io-size 4M --io-threads 10 --io-total {size} --io-pattern seq {pool}/{image}",
    rbd_bench_megabytes_per_second,
)
FIO_4M = Contender("fio rbd engine", f"{FIO_RBD} --rw=read --bs=4M --iodepth=10", fio_megabytes_per_second)
START_MOUNT = replace(_through(RBDFS, "stat {file}", nothing, seconds_with_mount), images=(EMPTY,))
THIN_CP = replace(_cp(RBDFS), figure=seconds, check=copy_is_thin, images=(THIN,), needs_holes=True)


def _update(snapshot: str, before: str) -> Contender:
    """Ours: what has changed since another snapshot goes into a copy of that."""
    command = f"{RBDFS_COMMAND} export --no-progress --update {{pool}}/{{image}}@{{snapshot}} {{target}}"
    return Contender(
        "rbdfs export --update",
        command.replace("{snapshot}", snapshot),
        seconds,
        copy_is_thin,
        before=command.replace("{snapshot}", before),
        images=(CHANGED,),
    )


def _merge(snapshot: str, before: str) -> Contender:
    """What the rbd command has for it: a diff of the two, merged into one of all before."""
    export, image = "rbd export-diff --no-progress", "{pool}/{image}@"
    merge = "rbd merge-diff --no-progress {target} {target}.diff {target}.new"
    return Contender(
        "rbd export-diff and merge-diff",
        f"bash -c '{export} --from-snap {before} {image}{snapshot} {{target}}.diff && {merge}'",
        seconds,
        before=f"{export} {image}{before} {{target}}",
        images=(CHANGED,),
    )


UPDATE, UPDATE_SCATTERED = _update("s2", "s1"), _update("s3", "s2")

OPENS = 50
OPEN_EACH = f"bash -c 'for n in $(seq {OPENS}); do : <{{folder}}/many$n; done'"
OPEN_AGAIN = f"bash -c 'for n in $(seq {OPENS}); do : <{{file}}; done'"
INFO_EACH = f"bash -c 'for n in $(seq {OPENS}); do rbd info {{pool}}/many$n; done'"
WORKS = f"{sys.executable} -m tests.benchmarks.works"
LS_CROWD = "ls -l {folder}"
LS_SNAPSHOTS = "ls -l {folder}/.snap/{image}"
LS_SPACES = "ls -lR {folder}"
SEEK = f"{WORKS} seek {{file}}"
OPEN_AT_ONCE = 1000
OPEN_ALL = f"{WORKS} open {{folder}} crowd {OPEN_AT_ONCE}"
RBD_LS_SPACES = "bash -c 'for n in $(rbd namespace ls {pool} | tail -n +2); do rbd ls -l {pool}/$n; done'"
OF_CROWD, OF_SNAPPED, OF_SPACES, OF_VAST = (CROWD,), (SNAPPED,), (SPACES,), (VAST,)
READ_SECONDS = 0.05
"""For so long at most a read waits while something large is looked at."""


def _beside(case: str, work: str, command: str, images: Sequence[str]) -> Case:
    """The longest read of another file meanwhile."""
    ours = _through(RBDFS, f"{WORKS} beside {{folder}}/{BESIDE} {command}", nothing, longest_read_seconds)
    return Case(
        case,
        f"the longest of other reads during {work}",
        Unit.SECONDS,
        replace(ours, images=images),
        Limit(READ_SECONDS),
        bar=1.0,
    )


def _fio_rbd_randread(depth: int) -> Contender:
    return Contender("fio rbd engine", f"{FIO_RBD} --rw=randread --bs=4k --iodepth={depth}", fio_iops)


RANDREAD_BARS = ((1, 0.8, 1.0), (16, 0.9, 1.1))
"""Jobs, the least ratio, and the aim."""

CASES: Sequence[Case] = (
    Case(
        "dd-1M",
        "dd bs=1M, cold",
        Unit.RATE,
        _dd(RBDFS, "bs=1M"),
        _dd(RBD_FUSE, "bs=1M"),
        bar=4,
        aim=6,
        context=(_dd(QEMU_STORAGE_DAEMON, "bs=1M"), EXPORT),
    ),
    Case(
        "dd-4M-direct",
        "dd bs=4M iflag=direct, cold",
        Unit.RATE,
        _dd(RBDFS, "bs=4M iflag=direct"),
        RBD_BENCH,
        bar=0.85,
        aim=0.95,
        context=(_dd(QEMU_STORAGE_DAEMON, "bs=4M iflag=direct"), EXPORT, FIO_4M),
    ),
    Case(
        "cp",
        "cp to a file on disk",
        Unit.RATE,
        _cp(RBDFS),
        EXPORT_TO_FILE,
        bar=1.0,
        aim=1.3,
        context=(replace(QEMU_IMG, figure=megabytes_per_second), _cp(QEMU_STORAGE_DAEMON)),
    ),
    Case(
        "cp-tmpfs",
        "cp to a file on tmpfs",
        Unit.RATE,
        replace(_cp(RBDFS), to_memory=True),
        replace(EXPORT_TO_FILE, to_memory=True),
    ),
    *(
        Case(f"dd-{size}", f"dd bs={size}, cold", Unit.RATE, _dd(RBDFS, options), _dd(RBD_FUSE, options), 1.5, 3)
        for size, options in (("512", "bs=512"), ("4k", "bs=4k"), ("64k", "bs=64k"))
    ),
    Case("sha256sum", "sha256sum, cold", Unit.RATE, _sha256sum(RBDFS), _sha256sum(RBD_FUSE), 1.5, 3),
    Case("rsync", "rsync to a file on disk", Unit.RATE, _rsync(RBDFS), _rsync(RBD_FUSE), 1.5, 3),
    *(
        Case(
            f"randread-{jobs}",
            f"fio randread 4k, {jobs} job{'s' * (jobs > 1)}, direct, cold",
            Unit.IOPS,
            _randread(RBDFS, jobs),
            _randread(RBD_FUSE, jobs),
            bar,
            aim,
            context=(_randread(QEMU_STORAGE_DAEMON, jobs), _fio_rbd_randread(jobs)),
        )
        for jobs, bar, aim in RANDREAD_BARS
    ),
    *(
        Case(
            f"randread-{jobs}-buffered",
            f"fio randread 4k, {jobs} job{'s' * (jobs > 1)}, page cache, cold",
            Unit.IOPS,
            _randread(RBDFS, jobs, direct=False),
            _randread(RBD_FUSE, jobs, direct=False),
            bar,
            aim,
        )
        for jobs, bar, aim in RANDREAD_BARS
    ),
    Case(
        "second-read",
        "second dd bs=4M iflag=direct, fits the cache",
        Unit.RATE,
        replace(_dd(RBDFS, "bs=4M iflag=direct"), images=(FITS,), rehearsals=1),
        replace(_dd(RBDFS, "bs=4M iflag=direct"), images=(FITS,), name="the first read"),
        bar=3,
        aim=5,
    ),
    Case(
        "latency",
        "dd bs=1M, 0-20 ms from the OSD",
        Unit.RATE,
        replace(_dd(RBDFS, "bs=1M"), is_far=True),
        replace(EXPORT, is_far=True),
        bar=0.9,
        aim=1.2,
        context=(replace(RBD_BENCH, is_far=True),),
    ),
    Case(
        "four-cps",
        "4 cps of 4 images at once, total",
        Unit.RATE,
        replace(_cp(RBDFS), images=QUARTERS),
        replace(_cp(RBDFS), name="one cp of as much"),
        bar=1.0,
        aim=1.3,
    ),
    Case(
        "cpu",
        "client CPU for a GB, dd bs=4M iflag=direct",
        Unit.CPU,
        replace(_dd(RBDFS, "bs=4M iflag=direct"), figure=cpu_seconds_per_gb),
        replace(EXPORT, figure=cpu_seconds_per_gb),
        bar=1 / 2,
        aim=1 / 1.2,
    ),
    Case(
        "thin-cp",
        "cp of a 100 GiB image that holds 40 MiB",
        Unit.SECONDS,
        THIN_CP,
        replace(EXPORT_TO_FILE, figure=seconds, check=copy_is_thin, images=(THIN,)),
        bar=30,
    ),
    Case(
        "thin-cp-qemu",
        "cp of the same image",
        Unit.SECONDS,
        THIN_CP,
        replace(QEMU_IMG, check=copy_is_thin, images=(THIN,)),
        bar=1 / 1.5,
    ),
    Case(
        "du",
        "du of a pool of 10 thin images",
        Unit.SECONDS,
        replace(_through(RBDFS, "du -s --block-size=1 {folder}", du_is_right, seconds), images=(THIN,)),
        Contender("rbd du", "rbd du --format json -p {pool}", seconds, rbd_du_is_right, images=(THIN,)),
        bar=1.0,
    ),
    Case(
        "ls",
        "ls -l of a pool of 2,000 images",
        Unit.SECONDS,
        replace(_through(RBDFS, "ls -l {folder}", listing_is_whole, seconds), images=(MANY,)),
        Contender("rbd ls -l", "rbd ls -l {pool}", seconds, listing_is_whole, images=(MANY,)),
        bar=10,
        aim=20,
    ),
    Case(
        "open-first",
        f"open and close of {OPENS} images, one after the other",
        Unit.SECONDS,
        replace(_through(RBDFS, OPEN_EACH, nothing, seconds), images=(MANY,)),
        Contender("rbd info of each", INFO_EACH, seconds, nothing, images=(MANY,)),
    ),
    Case(
        "open-second",
        f"open and close of one image, {OPENS} times",
        Unit.SECONDS,
        _through(RBDFS, OPEN_AGAIN, nothing, seconds),
        _through(RBD_FUSE, OPEN_AGAIN, nothing, seconds),
    ),
    Case(
        "ls-crowd",
        f"ls -l of a pool of {CROWD_COUNT:,} images",
        Unit.SECONDS,
        replace(_through(RBDFS, LS_CROWD, crowd_is_whole, seconds), images=OF_CROWD),
        Contender("rbd ls, names alone", "rbd ls {pool}", seconds, crowd_is_whole, images=OF_CROWD),
    ),
    _beside("ls-crowd-beside", "that", LS_CROWD, OF_CROWD),
    Case(
        "ls-snapshots",
        f"ls -l of {SNAPSHOT_COUNT:,} snapshots of an image",
        Unit.SECONDS,
        replace(_through(RBDFS, LS_SNAPSHOTS, snapshots_are_whole, seconds), images=OF_SNAPPED),
        Contender("rbd snap ls", "rbd snap ls {pool}/{image}", seconds, snapshots_are_whole, images=OF_SNAPPED),
    ),
    _beside("ls-snapshots-beside", "that", LS_SNAPSHOTS, OF_SNAPPED),
    Case(
        "ls-namespaces",
        f"ls -lR of a pool of {NAMESPACE_COUNT} namespaces",
        Unit.SECONDS,
        replace(_through(RBDFS, LS_SPACES, nothing, seconds), images=OF_SPACES),
        Contender("rbd ls -l of each", RBD_LS_SPACES, seconds, nothing, images=OF_SPACES),
    ),
    _beside("ls-namespaces-beside", "that", LS_SPACES, OF_SPACES),
    Case(
        "open-at-once",
        f"{OPEN_AT_ONCE:,} files open at once",
        Unit.SECONDS,
        replace(_through(RBDFS, OPEN_ALL, nothing, seconds), images=OF_CROWD),
        Limit(OPEN_AT_ONCE * 0.02, "20 ms each"),
    ),
    _beside("open-at-once-beside", "that", OPEN_ALL, OF_CROWD),
    Case(
        "seek-vast",
        "SEEK_DATA and SEEK_HOLE through 64 TiB, half of it data",
        Unit.SECONDS,
        replace(_through(RBDFS, SEEK, all_data_is_found, seconds), images=OF_VAST),
        Contender("rbd du", "rbd du {pool}/{image}", seconds, nothing, images=OF_VAST),
    ),
    _beside("seek-vast-beside", "that", SEEK, OF_VAST),
    Case(
        "export",
        "rbdfs export to a file on disk",
        Unit.RATE,
        OUR_EXPORT_TO_FILE,
        EXPORT_TO_FILE,
        bar=1.0,
        aim=1.3,
        context=(replace(QEMU_IMG, figure=megabytes_per_second),),
    ),
    Case(
        "export-tmpfs",
        "rbdfs export to a file on tmpfs",
        Unit.RATE,
        replace(OUR_EXPORT_TO_FILE, to_memory=True),
        replace(EXPORT_TO_FILE, to_memory=True),
        bar=0.95,
        aim=1.0,
    ),
    Case("export-stdout", "rbdfs export - >/dev/null", Unit.RATE, OUR_EXPORT, EXPORT, bar=0.85, aim=1.0),
    Case(
        "export-thin",
        "rbdfs export of a 100 GiB image that holds 40 MiB",
        Unit.SECONDS,
        replace(OUR_EXPORT_TO_FILE, figure=seconds, check=copy_is_thin, images=(THIN,)),
        replace(EXPORT_TO_FILE, figure=seconds, check=copy_is_thin, images=(THIN,)),
        bar=30,
        aim=60,
    ),
    Case(
        "update",
        "to bring a copy of a 100 GiB image up to date of which 1% changed",
        Unit.SECONDS,
        UPDATE,
        _merge("s2", "s1"),
        bar=1.0,
        aim=1.5,
    ),
    Case(
        "update-full",
        "the same",
        Unit.SECONDS,
        UPDATE,
        Contender(
            "rbdfs export",
            f"{OUR_EXPORT_COMMAND}@s2 {{target}}",
            seconds,
            copy_is_thin,
            images=(CHANGED,),
        ),
        bar=20,
    ),
    Case(
        "update-scattered",
        "the same of which 10,000 pages of 4 KiB changed",
        Unit.SECONDS,
        UPDATE_SCATTERED,
        _merge("s3", "s2"),
        bar=1.0,
    ),
    Case(
        "update-cpu",
        "client CPU of that",
        Unit.CPU_SECONDS,
        replace(UPDATE_SCATTERED, figure=cpu_seconds),
        replace(_merge("s3", "s2"), figure=cpu_seconds),
    ),
    Case(
        "export-rss",
        "peak RSS of rbdfs export to a file on disk",
        Unit.MEMORY,
        replace(OUR_EXPORT_TO_FILE, figure=peak_rss_megabytes),
        replace(EXPORT_TO_FILE, figure=peak_rss_megabytes),
        bar=1 / 0.7,
        aim=2,
    ),
    Case(
        "start-export",
        "rbdfs export - of an empty image",
        Unit.SECONDS,
        replace(OUR_EXPORT, figure=seconds, images=(EMPTY,)),
        Limit(0.18),
        bar=1.0,
        context=(replace(EXPORT, figure=seconds, images=(EMPTY,)),),
    ),
    Case(
        "start-mount",
        "rbdfs mount, until stat of an image is answered",
        Unit.SECONDS,
        START_MOUNT,
        Limit(0.25),
        bar=1.0,
        context=(replace(START_MOUNT, name=SERVER_NAMES[RBD_FUSE], server=RBD_FUSE),),
    ),
)
