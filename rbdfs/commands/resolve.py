"""From an image spec to what the cluster calls the image."""

import errno

from rbdfs.catalog import ImageRef, Namespace
from rbdfs.ceph.cluster import Cluster
from rbdfs.errors import RbdfsError
from rbdfs.spec import ImageSpec


async def resolve(cluster: Cluster, spec: ImageSpec) -> ImageRef:
    """The image or snapshot. Raises RbdfsError that says which part of the spec does not exist."""
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
