"""What tests of the cluster's side share."""

from contextlib import AbstractAsyncContextManager

import pytest

from rbdfs.ceph.cluster import Cluster
from tests.cluster import Ceph, connected


@pytest.fixture
def cluster(ceph: Ceph) -> AbstractAsyncContextManager[Cluster]:
    """A connection of rbdfs, which `in_trio` makes and ends."""
    return connected(ceph)
