"""The table of what is measured: each row of the bar, and beside it what else can do the same work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tests.benchmarks.measures import (
    Check,
    Contender,
    Figure,
    Unit,
    copy_is_thin,
    copy_is_whole,
    cpu_seconds_per_gb,
    dd_read_all,
    du_is_right,
    fio_iops,
    fio_megabytes_per_second,
    hash_is_right,
    listing_is_whole,
    megabytes_per_second,
    nothing,
    peak_rss_megabytes,
    rbd_bench_megabytes_per_second,
    rbd_du_is_right,
    seconds,
    seconds_with_mount,
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
from tests.benchmarks.site import EMPTY, FITS, MANY, QUARTERS, THIN

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
        "export",
        "rbdfs export to a file on disk",
        Unit.RATE,
        OUR_EXPORT_TO_FILE,
        EXPORT_TO_FILE,
        bar=1.0,
        aim=1.3,
        context=(replace(QEMU_IMG, figure=megabytes_per_second),),
    ),
    Case("export-stdout", "rbdfs export - >/dev/null", Unit.RATE, OUR_EXPORT, EXPORT, bar=0.8, aim=1.0),
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
