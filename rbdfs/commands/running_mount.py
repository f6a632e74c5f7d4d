"""A mount that is served, as those see it who tell operators of it. All of it may be read in the trio thread only."""

from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from rbdfs.ceph.bindings.health import ConnectionHealth
from rbdfs.fuse.operations import Operations
from rbdfs.fuse.requests import Requests
from rbdfs.image.cache import ObjectCache


@dataclass(frozen=True, slots=True)
class RunningMount:
    """What it is, and where it counts what it does."""

    mountpoint: Path
    fsid: str
    """The cluster's."""
    client: str
    """Who we are there."""
    started: float
    """When, in seconds since the epoch."""
    operations: Operations
    requests: Requests
    cache: ObjectCache
    health: ConnectionHealth

    @property
    def oldest_seconds(self) -> float:
        """For how long the oldest request of the kernel has waited; 0 if none waits."""
        return max((monotonic() - oldest.began for oldest in self.requests.oldest(1)), default=0.0)

    @property
    def osds_answer(self) -> bool:
        """Whether OSDs answer, as far as they were asked."""
        return self.health.osds_answer(self.oldest_seconds, monotonic())
