"""One measurement: run a contender's commands, take the figure, and see that the work was done."""

import contextlib
import json
import os
import re
import resource
import select
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from tests.benchmarks.crowd import CROWD_COUNT, OBJECT_BYTES, SNAPSHOT_COUNT, VAST_BYTES, VAST_RUN
from tests.benchmarks.peers import PeerError, Served, Server, environment, served
from tests.benchmarks.site import BIG, MANY_COUNT, Image, Site

TIMEOUT_SECONDS = 300.0
"""For one command; what takes longer has lost."""
DISK_BLOCK = 512
"""What st_blocks counts in."""
TMPFS = Path("/dev/shm")  # noqa: S108  (in a folder of our own there)
"""A tmpfs that is there on every Linux, and for which nobody has to be root."""
ALLOCATION_TOLERANCE = 0.01
"""A copy of a thin image takes as much disk as the image does, but for this."""


class Unit(Enum):
    """Of a figure. The value is how a table writes it."""

    RATE = "MB/s"
    IOPS = "IOPS"
    SECONDS = "s"
    CPU = "CPU s/GB"
    CPU_SECONDS = "CPU s"
    MEMORY = "MB"

    @property
    def larger_is_better(self) -> bool:
        """Whether it is a speed, and not a cost."""
        return self in (Unit.RATE, Unit.IOPS)

    def ratio(self, ours: float, theirs: float) -> float:
        """How much better ours is: 2 is twice the speed, or half the cost."""
        return ours / theirs if self.larger_is_better else theirs / ours


@dataclass(frozen=True, slots=True)
class Run:
    """What the commands of one measurement have left."""

    images: Sequence[Image]
    targets: Sequence[Path]
    seconds: float
    cpu_seconds: float
    """User and system, of the commands and of the process that serves the mount."""
    outputs: Sequence[str]
    errors: Sequence[str]
    site: Site
    mount: Served | None
    peak_rss_bytes: int
    """Of the command that had the most memory."""

    @property
    def image_bytes(self) -> int:
        """Of all images that were read."""
        return sum(image.size for image in self.images)


Figure = Callable[[Run], float]
Check = Callable[[Run], None]
"""Raises PeerError if the work was not done, or was done wrong."""


def megabytes_per_second(run: Run) -> float:
    """From the start of the first command to the end of the last."""
    return run.image_bytes / run.seconds / 1e6


def seconds(run: Run) -> float:
    """From the start of the first command to the end of the last."""
    return run.seconds


def seconds_with_mount(run: Run) -> float:
    """From the start of the command that mounts to the end of the last that reads, but for what is done between."""
    return run.seconds + (run.mount.start_seconds if run.mount else 0.0)


def cpu_seconds_per_gb(run: Run) -> float:
    """Of commands and serving process together."""
    return run.cpu_seconds / (run.image_bytes / 1e9)


def cpu_seconds(run: Run) -> float:
    """Of commands and serving process together."""
    return run.cpu_seconds


def longest_read_seconds(run: Run) -> float:
    """As `works.beside` has it."""
    return float(run.outputs[0].split()[-1])


def peak_rss_megabytes(run: Run) -> float:
    """Of the command itself."""
    return run.peak_rss_bytes / 1e6


def fio_iops(run: Run) -> float:
    """As fio has it, without the time that it takes to start."""
    return float(_fio_job(run)["read"]["iops"])


def fio_megabytes_per_second(run: Run) -> float:
    """As fio has it, without the time that it takes to start."""
    return float(_fio_job(run)["read"]["bw_bytes"]) / 1e6


def rbd_bench_megabytes_per_second(run: Run) -> float:
    """As `rbd bench` has it, without the time that it takes to connect."""
    result = re.search(r"bytes/sec: ([\d.]+) ?([KMGT]?)i?B", run.outputs[0])
    if result is None:
        raise PeerError(f"rbd bench said nothing of bytes/sec: {run.outputs[0][-200:]}")
    return float(result[1]) * float(1024 ** " KMGT".index(result[2] or " ")) / 1e6


def nothing(run: Run) -> None:
    """The exit status says enough, or the figure could not be had without the work."""


def dd_read_all(run: Run) -> None:
    """Dd counts the bytes that it copied."""
    for image, error in zip(run.images, run.errors, strict=True):
        if not re.search(rf"^{image.size} bytes ", error, re.MULTILINE):
            raise PeerError(f"dd did not read the {image.size} bytes of {image.name}: {error.strip()}")


def hash_is_right(run: Run) -> None:
    """The bytes are those that were written."""
    for image, output in zip(run.images, run.outputs, strict=True):
        if output.split()[0] != image.sha256:
            raise PeerError(f"wrong bytes: the SHA-256 of {image.name} is {image.sha256}, and not {output.split()[0]}")


def copy_is_whole(run: Run) -> None:
    """By size; the bytes were compared once before the first measurement."""
    for image, target in zip(run.images, run.targets, strict=True):
        if target.stat().st_size != image.size:
            raise PeerError(f"the copy of {image.name} has {target.stat().st_size} bytes, not {image.size}")


def copy_is_thin(run: Run) -> None:
    """By size, and by what it takes on disk."""
    copy_is_whole(run)
    for image, target in zip(run.images, run.targets, strict=True):
        allocated = target.stat().st_blocks * DISK_BLOCK
        if abs(allocated - image.held_bytes) > image.held_bytes * ALLOCATION_TOLERANCE:
            raise PeerError(f"the copy takes {allocated} bytes on disk, {image.name} holds {image.held_bytes}")


def du_is_right(run: Run) -> None:
    """The pool holds what was written to it; its folder itself takes nothing."""
    expect_pool_bytes(run, int(run.outputs[0].split()[0]))


def rbd_du_is_right(run: Run) -> None:
    """The same, as `rbd du --format json` says it."""
    expect_pool_bytes(run, int(json.loads(run.outputs[0])["total_used_size"]))


def listing_is_whole(run: Run) -> None:
    """A line for each image, and one above them."""
    lines = len(run.outputs[0].splitlines())
    if lines != MANY_COUNT + 1:
        raise PeerError(f"lists {lines - 1} images of {MANY_COUNT}")


def crowd_is_whole(run: Run) -> None:
    """A line for each image, and perhaps one above them; and one image beside."""
    lines = len(run.outputs[0].splitlines())
    if lines not in (CROWD_COUNT + 1, CROWD_COUNT + 2):
        raise PeerError(f"lists {lines} lines for {CROWD_COUNT} images")


def snapshots_are_whole(run: Run) -> None:
    """A line for each, and one above them."""
    lines = len(run.outputs[0].splitlines())
    if lines != SNAPSHOT_COUNT + 1:
        raise PeerError(f"lists {lines - 1} snapshots of {SNAPSHOT_COUNT}")


def all_data_is_found(run: Run) -> None:
    """Of VAST."""
    pieces = VAST_BYTES // OBJECT_BYTES // VAST_RUN // 2
    if int(run.outputs[0]) != pieces:
        raise PeerError(f"finds {run.outputs[0]} pieces of data, not {pieces}")


def expect_pool_bytes(run: Run, used: int) -> None:
    """Compare with what was written."""
    if used != run.site.thin_pool_bytes:
        raise PeerError(f"says that the pool holds {used} bytes, but it holds {run.site.thin_pool_bytes}")


@dataclass(frozen=True, slots=True)
class Contender:
    """Who does some work, and how the figure is had from it."""

    name: str
    command: str
    """With {file} (in the mount), {folder} (its pool's), {pool}, {image}, {size}, {target} and {conf} to fill in; run
    once for each image, all at the same time."""
    figure: Figure
    check: Check = nothing
    server: Server | None = None
    """Whose mount the command reads; none if it reads the cluster itself."""
    images: Sequence[str] = (BIG,)
    rehearsals: int = 0
    """How often the same was done before, in the same mount, without counting."""
    is_far: bool = False
    """Whether the network is slow (site.LATENCY)."""
    needs_holes: bool = False
    """Not tried if the mount says that the image is full: 100 GiB would be copied."""
    to_memory: bool = False
    """Whether {target} is on a tmpfs, and not on the disk of the cluster."""
    before: str = ""
    """A command like that one, which is run first, without counting."""

    @property
    def missing(self) -> str:
        """The first of its programs that this machine lacks, or nothing."""
        programs = [shlex.split(self.command)[0], *([self.server.program] if self.server else [])]
        return next((program for program in programs if shutil.which(program) is None), "")


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement, of one contender."""

    figure: float
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int | None
    """Of the serving process; none without one."""


def measure(site: Site, contender: Contender) -> Sample:
    """Do the work once, with cold caches: nothing of an earlier measurement is still mounted.

    The cluster is warm: the OSD has all images in its memory. Raises PeerError for work that was not done.
    """
    conf = site.slow_conf if contender.is_far else site.conf
    images = [site.images[name] for name in contender.images]
    os.sync()  # what earlier copies have yet to write would be counted as ours
    with contextlib.ExitStack() as stack:
        mount = stack.enter_context(served(contender.server, site, conf, images[0])) if contender.server else None
        if mount and contender.needs_holes:
            for image in images:
                _expect_holes(mount.file(image))
        for _ in range(contender.rehearsals):
            _run(site, contender, conf, images, mount)
        with _room_for(site, images, to_memory=contender.to_memory) as targets:
            if contender.before:
                _run(site, replace(contender, command=contender.before), conf, images, mount, targets)
                os.sync()
            run = _run(site, contender, conf, images, mount, targets)
            contender.check(run)
        return Sample(contender.figure(run), run.seconds, run.cpu_seconds, mount.peak_rss_bytes if mount else None)


def _expect_holes(file: Path) -> None:
    status = file.stat()
    if status.st_blocks * DISK_BLOCK >= status.st_size:
        raise PeerError("the mount does not tell where an image has holes; 100 GiB would be copied")


@contextlib.contextmanager
def _room_for(site: Site, images: Sequence[Image], *, to_memory: bool) -> Iterator[Sequence[Path]]:
    """Names for copies, on the disk of the cluster or on a tmpfs; what is there afterwards is removed."""
    folder = Path(tempfile.mkdtemp(prefix="copies-", dir=TMPFS if to_memory else site.folder))
    try:
        if to_memory and shutil.disk_usage(folder).free < sum(image.size for image in images):
            raise PeerError(f"{TMPFS} is too small for a copy; try a smaller --size")
        yield [folder / image.name for image in images]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(
    site: Site,
    contender: Contender,
    conf: Path,
    images: Sequence[Image],
    mount: Served | None,
    targets: Sequence[Path] = (Path(os.devnull),),
) -> Run:
    """Run a contender's commands, all at the same time, and wait for the last."""
    commands = [
        shlex.split(
            contender.command.format(
                file=mount.file(image) if mount else "",
                folder=mount.file(image).parent if mount else "",
                pool=image.pool,
                image=image.name,
                size=image.size,
                target=target,
                conf=conf,
            )
        )
        for image, target in zip(images, targets, strict=True)
    ]
    cpu_before, started = _cpu_seconds(mount), time.monotonic()
    processes: list[subprocess.Popen[str]] = []
    logs = site.folder / "commands"
    logs.mkdir(exist_ok=True)
    try:
        for number, command in enumerate(commands):
            # What is exported to stdout is not to be kept.
            output = Path(os.devnull) if command[-1] == "-" else logs / f"{number}.out"
            with output.open("w") as stdout, (logs / f"{number}.err").open("w") as stderr:
                processes.append(
                    subprocess.Popen(
                        command,
                        env=environment(conf),
                        stdin=subprocess.DEVNULL,
                        stdout=stdout,
                        stderr=stderr,
                        text=True,
                    )
                )
        deadline = started + TIMEOUT_SECONDS
        peak_rss_bytes = max(_wait(process, deadline) for process in processes)
    except subprocess.TimeoutExpired:
        raise PeerError(f"gave up after {TIMEOUT_SECONDS:.0f} s") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    run = Run(
        images,
        targets,
        time.monotonic() - started,
        _cpu_seconds(mount) - cpu_before,
        [(logs / f"{number}.out").read_text() if command[-1] != "-" else "" for number, command in enumerate(commands)],
        [(logs / f"{number}.err").read_text() for number in range(len(commands))],
        site,
        mount,
        peak_rss_bytes,
    )
    for process, said, error in zip(processes, run.outputs, run.errors, strict=True):
        if process.returncode != 0:
            # fio says it first of all, and to stdout.
            reason = error.strip().splitlines()[-1:] or said.strip().splitlines()[:1] or ["no message"]
            raise PeerError(f"exit status {process.returncode}: {reason[0]}")
    return run


def _wait(process: subprocess.Popen[str], deadline: float) -> int:
    """Wait for a command. The most memory that it had, in bytes."""
    ended = os.pidfd_open(process.pid)
    try:
        if not select.select([ended], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise subprocess.TimeoutExpired(process.args, TIMEOUT_SECONDS)
    finally:
        os.close(ended)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * 1024


def _cpu_seconds(mount: Served | None) -> float:
    """Of the children that have ended, and of the mount."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime + (mount.cpu_seconds if mount else 0.0)


def _fio_job(run: Run) -> dict[str, dict[str, float]]:
    """The one group that fio reports."""
    report = run.outputs[0]
    job: dict[str, dict[str, float]] = json.loads(report[report.index("{") :])["jobs"][0]
    if job["error"]:
        raise PeerError(f"fio: error {job['error']}")
    return job
