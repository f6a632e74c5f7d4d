"""Capture the replies of the Ceph that is installed here, and what its `rbd` command says of the same images.

python -m tests.golden.capture      # a devcluster for a minute; writes tests/golden/ceph-MAJOR.json
"""

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from rbdfs.ceph.bindings.aio import Portal
from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.ceph.connection.connections import Connections
from rbdfs.errors import RbdfsError
from tests.cluster import Ceph, running_ceph
from tests.golden.images import HELD, POOLS, make_images, opened, said
from tests.golden.questions import Questions
from tests.golden.replies import FOLDER, Recorder, places, save


def main() -> None:
    """Bring up a cluster, and take it down again."""
    os.environ["TZ"] = "UTC"
    time.tzset()
    with running_ceph() as ceph:
        make_images(ceph)
        with opened(ceph, HELD) as image:
            image.write(b"held", 0)
            capture(ceph)


def capture(ceph: Ceph) -> None:
    """Write the file."""
    version = ceph.run("rbd", "--version").split()[2]
    truth = {pool: truth_of_namespace(ceph, pool) for pool in POOLS}
    pools = {ceph.rados.pool_lookup(name): name for name in ceph.rados.list_pools()}
    objects = trio.run(ask, ceph.conf, pools)
    path = FOLDER / f"ceph-{version.partition('.')[0]}.json"
    save(path, objects, ceph=version, pools=pools, truth=truth)
    print(f"{path}: {len(objects)} objects, {path.stat().st_size >> 10} KiB")


@asynccontextmanager
async def asked_directly(conf: Path) -> AsyncIterator[Connections]:
    """A connection without what a `Cluster` knows of pools and rights."""
    connections = Connections(ClusterOptions(conf=conf), frozenset(), Portal())
    await connections.open()
    try:
        yield connections
    finally:
        await connections.aclose()


async def ask(conf: Path, pools: dict[int, str]) -> dict[str, Any]:
    """All that rbdfs asks."""
    async with asked_directly(conf) as connections:
        recorder = Recorder(connections.operations)
        questions = Questions(recorder, places(pools, connections.read_ioctx), pools)
        for question in await questions.all():
            try:
                await question.ask()
            except RbdfsError as error:
                print(f"{question.spec!a} {question.name}: {error!a}")
        return recorder.objects


def truth_of_namespace(ceph: Ceph, where: str) -> dict[str, Any]:
    """What `rbd` says of a pool, or of a namespace of one."""
    found: dict[str, Any] = {"images": {}}
    for name in said(ceph, "ls", where):
        found["images"][name] = truth_of_image(ceph, f"{where}/{name}")
    if "/" not in where:
        names = [each["name"] for each in said(ceph, "namespace", "ls", where)]
        found["namespaces"] = {name: truth_of_namespace(ceph, f"{where}/{name}") for name in names}
    return found


def truth_of_image(ceph: Ceph, spec: str) -> dict[str, Any]:
    """What `rbd` says of an image and its snapshots."""
    info = said(ceph, "info", "--image", spec)
    snapshots = said(ceph, "snap", "ls", "--all", "--image", spec)
    return {
        "info": info,
        "diff": diff(ceph, info["size"], "--image", spec),
        "locks": said(ceph, "lock", "ls", "--image", spec),
        "metadata": said(ceph, "image-meta", "ls", "--image", spec) if info["format"] != 1 else None,
        "snapshots": snapshots,
        "of_snapshots": {
            each["name"]: {
                "info": said(ceph, "info", "--image", spec, "--snap", each["name"]),
                "diff": diff(ceph, each["size"], "--image", spec, "--snap", each["name"]),
            }
            for each in snapshots
            if each.get("namespace", {"type": "user"})["type"] == "user"
        },
    }


def diff(ceph: Ceph, size: int, *which: str) -> Any:
    """Which objects hold data. Of an image without bytes `rbd diff` aborts."""
    return said(ceph, "diff", "--whole-object", *which) if size else []


if __name__ == "__main__":
    main()
