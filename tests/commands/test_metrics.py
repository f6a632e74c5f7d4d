"""What Prometheus is told of a mount: exact counts, and the names that the README and the dashboard know."""

import errno
import json
import os
import re
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from rbdfs.ceph.bindings.health import SILENT_SECONDS, ConnectionHealth
from rbdfs.ceph.bindings.lifetime import Lifetime
from rbdfs.ceph.connection.recovery import Recovery
from rbdfs.cli import make_parser
from rbdfs.commands.metrics import MountCollector, metrics
from rbdfs.commands.running_mount import RunningMount
from rbdfs.fuse.operations import Operations
from rbdfs.fuse.protocol import READ, READDIR, READDIRPLUS
from rbdfs.fuse.requests import Requests
from rbdfs.image.cache import ObjectCache
from tests.cluster import CHECKOUT, MIB, Ceph, Mount, random_bytes, rbdfs, wait_until
from tests.fake_image import Site
from tests.in_trio import in_trio

Mounts = Callable[..., Mount]
KIB = 1024
READS = 20


def running_mount(mountpoint: str = "/mnt/rbdfs") -> RunningMount:
    """One of which nothing has been asked."""
    operations = cast(Operations, SimpleNamespace(files={}))
    cache = ObjectCache(MIB, 64, MIB)
    return RunningMount(
        Path(mountpoint), "489effc2", "client.backup", 1e9, operations, Requests(), cache, ConnectionHealth()
    )


def told(mount: RunningMount) -> dict[tuple[str, ...], float]:
    """Each sample by its name and the values of its labels."""
    return {(sample.name, *sample.labels.values()): sample.value for each in metrics(mount) for sample in each.samples}


class Scrape(dict[tuple[str, ...], float]):
    """What a mount tells Prometheus now; 0 of what it does not know."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):  # type: ignore[no-untyped-call, unused-ignore]
            for sample in family.samples:
                labels = [value for label, value in sorted(sample.labels.items()) if label != "le"]
                self[(sample.name, *labels)] = sample.value

    def __missing__(self, _: tuple[str, ...]) -> float:
        return 0.0

    def since(self, before: "Scrape", *name: str) -> float:
        """By how much it has grown."""
        return self[name] - before[name]


@pytest.fixture
def port() -> int:
    """One that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# What is told.


def test_all_metrics_that_the_readme_lists_exist_and_the_other_way_round() -> None:
    table = (CHECKOUT / "README.md").read_text().split("| metric |", 1)[1].split("\n\n", 1)[0]
    listed = set(re.findall(r"`(rbdfs_\w+)", table))
    assert listed == {
        f"{each.name}_total" if each.type == "counter" else each.name for each in metrics(running_mount())
    }


def test_all_metrics_that_the_dashboard_asks_for_exist() -> None:
    mount = running_mount()
    mount.requests.waiting[1] = (0.0, READ, 1, 0, 2, 0)
    mount.requests.end(1, 0, 1.0)
    names = {sample.name for each in metrics(mount) for sample in each.samples}
    standard = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total"}
    dashboard = json.loads((CHECKOUT / "examples" / "rbdfs-dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for text in expressions for name in re.findall(r"\b(?:up|(?:rbdfs|process)_\w+)(?=[{[])", text)}
    assert len(expressions) >= 20
    assert asked - standard <= names
    assert {name.removesuffix("_sum").removesuffix("_count").removesuffix("_bucket") for name in names} == {
        name.removesuffix("_sum").removesuffix("_count").removesuffix("_bucket") for name in asked - standard
    }, "each is on the dashboard"


def test_kinds_of_requests_that_are_one_operation_are_counted_together() -> None:
    mount = running_mount()
    for unique, opcode in enumerate((READDIR, READDIRPLUS, READDIRPLUS, 4096)):
        mount.requests.waiting[unique] = (0.0, opcode, 1, 0, 2, 0)
        mount.requests.end(unique, errno.EIO if opcode == READDIR else 0, 0.002)
    samples = told(mount)
    assert samples["rbdfs_request_duration_seconds_count", "readdir"] == 3
    assert samples["rbdfs_request_duration_seconds_count", "other"] == 1
    assert samples["rbdfs_request_duration_seconds_bucket", "readdir", "0.001"] == 0
    assert samples["rbdfs_request_duration_seconds_bucket", "readdir", "0.003"] == 3
    assert samples["rbdfs_request_duration_seconds_bucket", "readdir", "+Inf"] == 3
    assert samples["rbdfs_request_errors_total", "readdir", "EIO"] == 1
    assert samples["rbdfs_request_errors_total", "read", "EIO"] == 0, "there before the first error"


def test_a_mount_point_that_is_not_utf8_is_shown_all_the_same() -> None:
    registry = CollectorRegistry()

    async def tell() -> bytes:
        registry.register(MountCollector(running_mount("/mnt/\udcff")))
        return await trio.to_thread.run_sync(generate_latest, registry)

    assert rb'mountpoint="/mnt/\\udcff"' in trio.run(tell)
    assert generate_latest(registry) == b"", "the mount has ended"


@pytest.mark.parametrize(
    ("result", "answered_ago", "waited", "answers"),
    [
        (0, 1e6, 0.0, True),  # idle
        (0, 1e6, SILENT_SECONDS - 1, True),  # not yet late
        (0, 1e6, SILENT_SECONDS + 1, False),
        (0, 1.0, SILENT_SECONDS + 1, True),  # one placement group is dead, others answer
        (-errno.ENOENT, 1e6, 0.0, True),
        (-errno.ETIMEDOUT, 1e6, 0.0, False),
        (-errno.ETIMEDOUT, 1.0, SILENT_SECONDS + 1, True),
    ],
)
def test_osds_answer_if_any_does(*, result: int, answered_ago: float, waited: float, answers: bool) -> None:
    state = ConnectionHealth()
    state.note(0, 2e6 - answered_ago)
    state.note(result, 2e6 - answered_ago)
    assert state.osds_answer(waited, 2e6) is answers


def test_librados_giving_up_is_no_answer() -> None:
    state = ConnectionHealth()
    state.note(0, 1000.0)
    state.note(-errno.ETIMEDOUT, 2000.0)
    assert not state.osds_answer(SILENT_SECONDS + 1, 2001.0)
    assert state.is_connected
    state.note(-errno.ESHUTDOWN, 2002.0)
    assert not state.is_connected


@in_trio
async def test_each_read_of_the_cluster_says_whether_it_answers() -> None:
    nobody = cast(Any, None)
    site = Site(b"data")
    image = await site.opened()
    health, handle = site.portal.health, site.handles[0]
    handle.lifetime = Lifetime(Recovery(health, nobody, nobody))
    results: list[object] = []
    for result, answer in ((-errno.ETIMEDOUT, False), (4, True), (-errno.EIO, True), (-errno.ETIMEDOUT, False)):
        handle.results.append(result)
        image.start_read(0, 4, results.append)
        await trio.testing.wait_all_tasks_blocked()
        assert health.osds_answer(0.0, monotonic()) is answer
    assert health.osds_answer(SILENT_SECONDS + 1, monotonic()), "one did just now"
    assert len(results) == 4


# Where it is told.


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("9283", ("127.0.0.1", 9283)),
        ("0.0.0.0:9283", ("0.0.0.0", 9283)),  # noqa: S104
        ("localhost:1", ("localhost", 1)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_an_address_is_loopback_unless_it_says_otherwise(text: str, wanted: tuple[str, int]) -> None:
    assert make_parser().parse_args(["mount", "--metrics", text, "/mnt"]).metrics == wanted


@pytest.mark.parametrize("text", ["0", "65536", "", "x", ":9283", "::1:9283", "[::1]", "-1"])
def test_what_is_no_address_is_wrong_usage(text: str, tmp_path: Path) -> None:
    done = rbdfs("mount", f"--metrics={text}", str(tmp_path))
    assert done.returncode == 2
    assert f"argument --metrics: {text} is no address" in done.stderr


@pytest.mark.parametrize("flags", [(), ("-f",)])
def test_an_address_that_is_taken_is_one_line_and_no_mount(
    ceph: Ceph, tmp_path: Path, port: int, flags: tuple[str, ...]
) -> None:
    with socket.create_server(("127.0.0.1", port)):
        done = rbdfs("mount", *flags, "--metrics", str(port), str(tmp_path), conf=ceph.conf)
    assert done.returncode == 1
    reason = "Address already in use; choose another --metrics"
    assert done.stderr == f"rbdfs: cannot serve metrics at 127.0.0.1:{port}: {reason}\n"
    assert f" {tmp_path} " not in Path("/proc/self/mounts").read_text()


# A real mount.


def test_counts_are_exact(ceph: Ceph, mounts: Mounts, port: int) -> None:
    name = ceph.unique("counted")
    content = random_bytes(32 * MIB)
    ceph.make_image(name, content)
    mount = mounts("--direct-io", "--metrics", str(port))
    first = Scrape(port)
    assert [value for key, value in first.items() if key[0] == "rbdfs_info"] == [1]
    assert first["rbdfs_cluster_connected",] == first["rbdfs_cluster_osds_answer",] == 1
    assert first["rbdfs_open_files",] == 0
    file = os.open(mount.image(name), os.O_RDONLY)
    try:
        for _ in range(2):
            for number in range(READS):  # backwards and far apart: no sequential reader, so nothing is read ahead
                offset = (READS - number) * 1500 * KIB
                assert os.pread(file, 100 * KIB, offset) == content[offset : offset + 100 * KIB]
        assert os.pread(file, 100 * KIB, 32 * MIB) == b""
        while_open = Scrape(port)
    finally:
        os.close(file)
    assert while_open["rbdfs_open_files",] == 1
    wait_until(lambda: Scrape(port)["rbdfs_open_files",] == 0)
    at_the_end = 1
    assert while_open.since(first, "rbdfs_request_duration_seconds_count", "read") == 2 * READS + at_the_end
    assert while_open.since(first, "rbdfs_read_bytes_total") == 2 * READS * 100 * KIB
    assert while_open.since(first, "rbdfs_cache_misses_total") == READS
    assert while_open.since(first, "rbdfs_cache_hits_total") == READS
    assert while_open.since(first, "rbdfs_readahead_bytes_total") == 0
    assert while_open.since(first, "rbdfs_request_duration_seconds_count", "open") == 1
    assert while_open["rbdfs_cache_bytes",] >= READS * 100 * KIB
    assert while_open["rbdfs_cache_budget_bytes",] == 256 * MIB
    assert while_open["rbdfs_requests_waiting",] == while_open["rbdfs_cluster_reads_in_flight",] == 0
    assert while_open["process_resident_memory_bytes",] > 10 * MIB


def test_a_sequential_reader_uses_what_is_read_ahead(ceph: Ceph, mounts: Mounts, port: int) -> None:
    name = ceph.unique("ahead")
    content = random_bytes(32 * MIB)
    ceph.make_image(name, content)
    mount = mounts("--direct-io", "--metrics", str(port))  # with a page cache, the kernel may ask for a page twice
    assert mount.image(name).read_bytes() == content
    scrape = Scrape(port)
    assert scrape["rbdfs_read_bytes_total",] == 32 * MIB
    assert 28 * MIB <= scrape["rbdfs_readahead_bytes_total",] <= 32 * MIB
    assert scrape["rbdfs_readahead_used_bytes_total",] == scrape["rbdfs_readahead_bytes_total",]
    assert scrape["rbdfs_readahead_wasted_bytes_total",] == 0


def test_errors_are_counted_by_errno_while_the_osd_is_dead_and_it_is_logged(
    ceph: Ceph, mounts: Mounts, port: int
) -> None:
    name = ceph.unique("silent")
    ceph.make_image(name, random_bytes(4 * MIB))
    mount = mounts("--osd-timeout", "2", "--direct-io", "--cache-size", "0", "--metrics", str(port))
    mount.expect("ERROR", "WARNING")
    with mount.image(name).open("rb", buffering=0) as file:
        ceph.devcluster.kill_daemon("osd.0")
        try:
            for number in range(2):
                with pytest.raises(TimeoutError):
                    os.pread(file.fileno(), 4096, number * MIB)
            scrape = Scrape(port)
        finally:
            ceph.devcluster.start_daemon("osd.0")
        assert scrape["rbdfs_request_errors_total", "ETIMEDOUT", "read"] == 2
        assert scrape["rbdfs_cluster_osds_answer",] == 0
        assert scrape["rbdfs_request_duration_seconds_sum", "read"] >= 2 * 1.5

        def works() -> bool:
            try:
                return len(os.pread(file.fileno(), 4096, 0)) == 4096
            except TimeoutError:
                return False

        wait_until(works, 60)
    assert Scrape(port)["rbdfs_cluster_osds_answer",] == 1

    def is_missing() -> bool:
        try:
            (mount.path / "rbd" / "no such image").stat()
        except TimeoutError:  # another placement group
            return False
        except FileNotFoundError:
            return True
        pytest.fail("it is there")

    wait_until(is_missing, 60)
    assert Scrape(port)["rbdfs_request_errors_total", "ENOENT", "lookup"] == 1


def test_the_option_goes_into_fstab_as_well(mounts: Mounts, port: int) -> None:
    mounts("-o", f"metrics=[::1]:{port}")
    assert Scrape(port, "[::1]")["rbdfs_start_time_seconds",] > 1e9
