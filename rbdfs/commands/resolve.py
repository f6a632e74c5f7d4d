"""From what a person calls an image to what the cluster calls it."""

import errno
import sys
from dataclasses import replace

from rbdfs.catalog import ImageRef, Namespace
from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.errors import RbdfsError
from rbdfs.spec import ImageSpec


def tell(sentence: str) -> None:
    """A line for a person, beside what the command prints."""
    print(f"rbdfs: {sentence}", file=sys.stderr, flush=True)


async def connect_for(options: ClusterOptions, spec: ImageSpec) -> Cluster:
    """The cluster, by what one image needs of it. Raises ConnectError."""
    return await Cluster.connect(options, (spec.pool,) if spec.pool else ())


def with_pool(cluster: Cluster, spec: ImageSpec) -> ImageSpec:
    """The spec with the pool that is meant where none is named."""
    return spec if spec.pool else replace(spec, pool=cluster.setting("rbd_default_pool"))


async def tell_of_writers(cluster: Cluster, spec: ImageSpec, image: ImageRef, command: str) -> None:
    """Warn where somebody may write to a HEAD while it is read. Raises RbdfsError."""
    writers = await cluster.writers(image)
    if writers:
        snapshot = f"{spec}@NAME"
        tell(
            f"warning: {spec} may be written to, by {', '.join(writers)}, so that what is read is of no one moment; "
            f"'rbd snap create {snapshot}' and {command} {snapshot}"
        )


async def find(cluster: Cluster, spec: ImageSpec) -> ImageRef:
    """The image or snapshot. Raises RbdfsError, which says what of the spec is not there."""
    pool = await cluster.pool(spec.pool)
    namespace = await cluster.namespace(pool, spec.namespace) if spec.namespace else Namespace(pool)
    try:
        image = await cluster.image(namespace, spec.image)
    except RbdfsError as error:
        if error.errno != errno.ENOENT:
            raise
        raise RbdfsError(
            f"there is no image {spec.image} in {namespace}; 'rbd ls {namespace}' lists them", errno.ENOENT
        ) from error
    if not spec.snapshot:
        return image
    try:
        return await cluster.snapshot(image, spec.snapshot)
    except RbdfsError as error:
        if error.errno != errno.ENOENT:
            raise
        head = f"{namespace}/{spec.image}"
        raise RbdfsError(
            f"{head} has no snapshot {spec.snapshot}; 'rbd snap ls {head}' lists them", errno.ENOENT
        ) from error
