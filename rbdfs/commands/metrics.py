"""The metrics of a mount, for Prometheus, by its own client library."""

import errno
from collections.abc import Iterable, Iterator
from itertools import accumulate

import trio
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from rbdfs import __version__
from rbdfs.commands.logs import in_utf8
from rbdfs.commands.running_mount import RunningMount
from rbdfs.errors import MountError
from rbdfs.fuse.protocol import OPERATIONS
from rbdfs.fuse.requests import BUCKET_SECONDS, Latency

BOUNDS = (*map(str, BUCKET_SECONDS), "+Inf")


def serve_metrics(address: str, port: int) -> CollectorRegistry:
    """Answer Prometheus until the process ends, in threads of its library. Returns the registry to put collectors in.

    Blocks, because the library resolves the address. Raises MountError.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    try:
        start_http_server(port, address, registry)
    except (OSError, UnicodeError) as error:
        shown = f"[{address}]" if ":" in address else address
        reason = error.strerror if isinstance(error, OSError) else error
        raise MountError(f"cannot serve metrics at {shown}:{port}: {reason}; choose another --metrics") from error
    return registry


class MountCollector(Collector):
    """Answers the threads of the library with figures that the trio thread collects."""

    def __init__(self, mount: RunningMount) -> None:
        """Call in the trio thread."""
        self._mount = mount
        self._token = trio.lowlevel.current_trio_token()

    def collect(self) -> Iterable[Metric]:
        """Call in any other thread."""
        try:
            return trio.from_thread.run_sync(lambda: list(metrics(self._mount)), trio_token=self._token)
        except trio.RunFinishedError:
            return ()


def metrics(mount: RunningMount) -> Iterator[Metric]:
    """All metrics, as of now."""
    requests, cache, health = mount.requests, mount.cache, mount.health

    info = GaugeMetricFamily(
        "rbdfs_info", "What is mounted; always 1", labels=["version", "mountpoint", "fsid", "client"]
    )
    info.add_metric([__version__, in_utf8(str(mount.mountpoint)), mount.fsid, in_utf8(mount.client)], 1)
    yield info
    yield GaugeMetricFamily("rbdfs_start_time_seconds", "When it was mounted, since the epoch", mount.started)
    yield GaugeMetricFamily("rbdfs_open_files", "Files that are open", len(mount.operations.files))

    latency = HistogramMetricFamily(
        "rbdfs_request_duration_seconds", "Time from the kernel's request to our answer", labels=["operation"]
    )
    for operation, each in _by_operation(requests.latency.items()).items():
        latency.add_metric([operation], list(zip(BOUNDS, accumulate(each.buckets), strict=True)), each.seconds)
    yield latency
    errors = CounterMetricFamily(
        "rbdfs_request_errors",
        "Answers that were errors; ENOENT and ENODATA are normal",
        labels=["operation", "errno"],
    )
    for (opcode, number), count in requests.errors.items():
        errors.add_metric([OPERATIONS.get(opcode, "other"), errno.errorcode.get(number, str(number))], count)
    yield errors
    yield GaugeMetricFamily(
        "rbdfs_requests_waiting", "Requests of the kernel that are not answered yet", len(requests.waiting)
    )
    yield GaugeMetricFamily("rbdfs_request_oldest_seconds", "Waiting time of the oldest of them", mount.oldest_seconds)
    yield CounterMetricFamily("rbdfs_read_bytes", "Bytes in answers to reads", requests.read_bytes)

    counts = cache.counts
    yield CounterMetricFamily("rbdfs_cache_hits", "Reads answered by the cache, or by a fetch in flight", counts.hits)
    yield CounterMetricFamily("rbdfs_cache_misses", "Reads that needed a new fetch from the cluster", counts.misses)
    yield CounterMetricFamily("rbdfs_cache_evictions", "Fetches dropped to make room", counts.evictions)
    yield GaugeMetricFamily("rbdfs_cache_bytes", "Memory for image data, cached or in flight", cache.cached_bytes)
    yield GaugeMetricFamily(
        "rbdfs_cache_budget_bytes", "The limit of rbdfs_cache_bytes: --cache-size", cache.budget_bytes
    )
    yield CounterMetricFamily("rbdfs_readahead_bytes", "Bytes fetched ahead of readers", counts.ahead_bytes)
    yield CounterMetricFamily(
        "rbdfs_readahead_used_bytes", "Of these, bytes that a reader reached, in whole fetches", counts.ahead_used_bytes
    )
    yield CounterMetricFamily(
        "rbdfs_readahead_wasted_bytes",
        "Of these, bytes dropped before a reader reached them",
        counts.ahead_wasted_bytes,
    )

    yield GaugeMetricFamily(
        "rbdfs_cluster_reads_in_flight", "Reads that the cluster has not answered yet", cache.reads_in_flight
    )
    yield GaugeMetricFamily("rbdfs_cluster_reads_in_flight_bytes", "Bytes of these reads", cache.in_flight.bytes)
    yield GaugeMetricFamily("rbdfs_cluster_reads_queued", "Reads that wait until others have ended", cache.reads_queued)
    yield CounterMetricFamily("rbdfs_revalidations", "Checks whether an open image has changed", health.revalidations)
    yield GaugeMetricFamily("rbdfs_cluster_connected", "0 if the cluster has blocklisted us", int(health.is_connected))
    yield GaugeMetricFamily("rbdfs_cluster_osds_answer", "0 if no OSD answers", int(mount.osds_answer))


def _by_operation(latencies: Iterable[tuple[int, Latency]]) -> dict[str, Latency]:
    """One latency per operation name: several opcodes can have the same name."""
    named: dict[str, Latency] = {}
    for opcode, latency in latencies:
        total = named.setdefault(OPERATIONS.get(opcode, "other"), Latency())
        total.buckets = [sum(pair) for pair in zip(total.buckets, latency.buckets, strict=True)]
        total.seconds += latency.seconds
    return named
