"""`rbdfs`, but looking at an image called `explodes` raises what nobody expects: for a test of the last guard."""

import sys

from rbdfs.catalog import Namespace
from rbdfs.ceph.cluster import Cluster
from rbdfs.cli import main

find_image = Cluster.image


async def explode(self: Cluster, namespace: Namespace, name: str) -> object:
    """Find any image but one."""
    if name == "explodes":
        raise ZeroDivisionError("nobody expects this")
    return await find_image(self, namespace, name)


Cluster.image = explode  # type: ignore[assignment, method-assign]

if __name__ == "__main__":
    sys.exit(main())
