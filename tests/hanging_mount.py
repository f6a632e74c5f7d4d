"""`rbdfs`, but looking at an image called `hangs` keeps the thread that answers everything until a FIFO is written."""

import os
import sys
from pathlib import Path

from rbdfs.catalog import Namespace
from rbdfs.ceph.cluster import Cluster
from rbdfs.cli import main

find_image = Cluster.image


async def hang(self: Cluster, namespace: Namespace, name: str) -> object:
    """Find any image, but one not soon."""
    if name == "hangs":
        Path(os.environ["HANGS_UNTIL_WRITTEN"]).read_text()  # noqa: ASYNC240  (nothing else may run)
    return await find_image(self, namespace, name)


Cluster.image = hang  # type: ignore[assignment, method-assign]

if __name__ == "__main__":
    sys.exit(main())
