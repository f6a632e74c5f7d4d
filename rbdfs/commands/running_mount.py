"""A running mount, as its status and its metrics see it. To be read in the trio thread only."""

from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from rbdfs.ceph.bindings.health import ConnectionHealth
from rbdfs.fuse.operations import Operations
from rbdfs.fuse.requests import Requests
from rbdfs.image.cache import ObjectCache


@dataclass(frozen=True, slots=True)
class RunningMount:
    """What is mounted, and the parts that count what it does."""

    mountpoint: Path
    fsid: str
    """The id of the cluster."""
    client: str
    """The name of our user there."""
    started: float
    """When it was mounted, in seconds since the epoch."""
    operations: Operations
    requests: Requests
    cache: ObjectCache
    health: ConnectionHealth

    @property
    def oldest_seconds(self) -> float:
        """How long the oldest request of the kernel has waited; 0 if none waits."""
        return max((monotonic() - oldest.began for oldest in self.requests.oldest(1)), default=0.0)

    @property
    def osds_answer(self) -> bool:
        """Whether OSDs answer, as far as their last answer and the oldest request tell."""
        return self.health.osds_answer(self.oldest_seconds, monotonic())
