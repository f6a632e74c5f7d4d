"""A mount's figures for Prometheus, by its own client library."""

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
    """Answer Prometheus, in threads of its library, until the process ends; what is answered is in the registry.

    Blocks, since the library looks up the address's name. Raises MountError.
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
    """What the threads of the library ask; the trio thread answers."""

    def __init__(self, mount: RunningMount) -> None:
        """To be made in the trio thread."""
        self._mount = mount
        self._token = trio.lowlevel.current_trio_token()

    def collect(self) -> Iterable[Metric]:
        """For any other thread."""
        try:
            return trio.from_thread.run_sync(lambda: list(metrics(self._mount)), trio_token=self._token)
        except trio.RunFinishedError:
            return ()


def metrics(mount: RunningMount) -> Iterator[Metric]:
    """All of them, as of now."""
    requests, cache, health = mount.requests, mount.cache, mount.health

    info = GaugeMetricFamily(
        "rbdfs_info", "What is mounted; always 1", labels=["version", "mountpoint", "fsid", "client"]
    )
    info.add_metric([__version__, in_utf8(str(mount.mountpoint)), mount.fsid, in_utf8(mount.client)], 1)
    yield info
    yield GaugeMetricFamily("rbdfs_start_time_seconds", "When it was mounted, since the epoch", mount.started)
    yield GaugeMetricFamily("rbdfs_open_files", "Files that are open", len(mount.operations.files))

    latency = HistogramMetricFamily(
        "rbdfs_request_duration_seconds", "How long the kernel has waited for answers", labels=["operation"]
    )
    for operation, each in _by_operation(requests.latency.items()).items():
        latency.add_metric([operation], list(zip(BOUNDS, accumulate(each.buckets), strict=True)), each.seconds)
    yield latency
    errors = CounterMetricFamily(
        "rbdfs_request_errors",
        "Answers that were errors; ENOENT and ENODATA are everyday",
        labels=["operation", "errno"],
    )
    for (opcode, number), count in requests.errors.items():
        errors.add_metric([OPERATIONS.get(opcode, "other"), errno.errorcode.get(number, str(number))], count)
    yield errors
    yield GaugeMetricFamily(
        "rbdfs_requests_waiting", "Requests of the kernel without an answer yet", len(requests.waiting)
    )
    yield GaugeMetricFamily(
        "rbdfs_request_oldest_seconds", "For how long the oldest of them waits", mount.oldest_seconds
    )
    yield CounterMetricFamily("rbdfs_read_bytes", "Bytes that reads were answered with", requests.read_bytes)

    counts = cache.counts
    yield CounterMetricFamily("rbdfs_cache_hits", "Reads that the cache answered, or a fetch under way", counts.hits)
    yield CounterMetricFamily("rbdfs_cache_misses", "Reads that had to ask the cluster", counts.misses)
    yield CounterMetricFamily("rbdfs_cache_evictions", "Fetches dropped to make room", counts.evictions)
    yield GaugeMetricFamily("rbdfs_cache_bytes", "Memory for image data, cached or in flight", cache.cached_bytes)
    yield GaugeMetricFamily("rbdfs_cache_budget_bytes", "The most that it may be: --cache-size", cache.budget_bytes)
    yield CounterMetricFamily("rbdfs_readahead_bytes", "Bytes asked for ahead of readers", counts.ahead_bytes)
    yield CounterMetricFamily(
        "rbdfs_readahead_used_bytes", "Of these, what a reader came to, by whole fetches", counts.ahead_used_bytes
    )
    yield CounterMetricFamily(
        "rbdfs_readahead_wasted_bytes", "Of these, what was dropped before a reader came", counts.ahead_wasted_bytes
    )

    yield GaugeMetricFamily(
        "rbdfs_cluster_reads_in_flight", "Reads that the cluster has yet to answer", cache.reads_in_flight
    )
    yield GaugeMetricFamily("rbdfs_cluster_reads_in_flight_bytes", "What they ask for", cache.in_flight.bytes)
    yield GaugeMetricFamily("rbdfs_cluster_reads_queued", "Reads that wait for others to end first", cache.reads_queued)
    yield CounterMetricFamily(
        "rbdfs_revalidations", "Questions whether an open image is still what it was", health.revalidations
    )
    yield GaugeMetricFamily("rbdfs_cluster_connected", "0 if the cluster has blocklisted us", int(health.is_connected))
    yield GaugeMetricFamily(
        "rbdfs_cluster_osds_answer", "0 if no OSD answers what it was asked last", int(mount.osds_answer)
    )


def _by_operation(latencies: Iterable[tuple[int, Latency]]) -> dict[str, Latency]:
    """One for each name: some kinds of requests are the same operation."""
    named: dict[str, Latency] = {}
    for opcode, latency in latencies:
        total = named.setdefault(OPERATIONS.get(opcode, "other"), Latency())
        total.buckets = [sum(pair) for pair in zip(total.buckets, latency.buckets, strict=True)]
        total.seconds += latency.seconds
    return named
