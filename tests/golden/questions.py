"""All that rbdfs asks of the images of a cluster without opening any: of a real one, and of its kept replies."""

import errno
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import rados

from rbdfs.catalog import ImageRef, Namespace, Pool
from rbdfs.ceph.bindings import librados
from rbdfs.ceph.bindings.read_op import ReadOperations
from rbdfs.ceph.image.image_state import HeaderClient
from rbdfs.ceph.metadata import header, rbd_directory
from rbdfs.ceph.metadata.attributes import AttributeReader
from rbdfs.ceph.metadata.stat import StatReader
from rbdfs.errors import RbdfsError
from rbdfs.spec import ImageSpec
from tests.golden.replies import Place

OPENS = {"watchers", "lock_owner"}
OPENS_FORMAT_1 = OPENS | {"object_size", "stripe_unit", "block_name_prefix"}
"""Attributes that librbd is asked for."""


class Question(NamedTuple):
    """Of an image, a snapshot or a namespace: `spec`, and what is asked."""

    spec: str
    name: str
    ask: Callable[[], Awaitable[Any]]


class Questions:
    """Who asks."""

    def __init__(
        self, operations: ReadOperations, ioctx_of: Callable[[Namespace], Place], pools: Mapping[int, str]
    ) -> None:
        self.operations = operations
        self.ioctx_of = ioctx_of
        self.pools = pools
        self.stat_reader = StatReader(operations, ioctx_of)
        self.headers = HeaderClient(operations, ioctx_of, frozenset())
        self.attributes = AttributeReader(operations, ioctx_of, self._pool_name, _open)
        self.images: dict[str, ImageRef] = {}
        """All HEADs and snapshots, by spec; known once `all` was called."""

    async def all(self) -> list[Question]:
        """Every question; to know them, names and snapshots are asked for."""
        found = []
        for pool_id, name in self.pools.items():
            pool = Pool(pool_id, name)
            default = Namespace(pool)
            namespaces = partial(rbd_directory.namespaces, self.operations, self.ioctx_of(default))
            found.append(Question(name, "namespaces", namespaces))
            for namespace in (default, *(Namespace(pool, each) for each in await namespaces())):
                found += await self._of_namespace(namespace)
        return found

    async def _of_namespace(self, namespace: Namespace) -> list[Question]:
        arguments = self.operations, self.ioctx_of(namespace)
        names = partial(rbd_directory.image_names, *arguments, namespace)
        found = [
            Question(str(namespace), "image_names", names),
            Question(str(namespace), "changed_ns", partial(rbd_directory.changed_ns, *arguments)),
        ]
        for name, image in (await names()).items():
            spec = ImageSpec(namespace.pool.name, name, namespace.name)
            found.append(Question(str(spec), "image", partial(rbd_directory.image, *arguments, namespace, name)))
            found += await self._of_image(spec, image)
            snapshots = partial(_snapshots, *arguments, image)
            found.append(Question(str(spec), "snapshots", snapshots))
            for snapshot in await snapshots():
                found += await self._of_image(
                    replace(spec, snapshot=snapshot.name), replace(image, snapshot_id=snapshot.id)
                )
        return found

    async def _of_image(self, spec: ImageSpec, image: ImageRef) -> list[Question]:
        self.images[str(spec)] = image
        names = partial(self.attributes.names, image)
        opens = OPENS_FORMAT_1 if image.format == 1 else OPENS
        return [
            Question(str(spec), "facts", partial(self.stat_reader.stat, image)),
            Question(str(spec), "state", partial(self.headers.state, spec, image)),
            Question(str(spec), "attributes", names),
            *(
                Question(str(spec), name, partial(self.attributes.value, image, name))
                for name in await names()
                if name not in opens
            ),
        ]

    def _pool_name(self, pool_id: int) -> str:
        if pool_id not in self.pools:
            raise rados.ObjectNotFound(f"no pool {pool_id}")
        return self.pools[pool_id]


async def _open(image: ImageRef, _: object) -> str:
    raise RbdfsError(f"nothing is opened here, not even {image.id}", errno.ENOENT)


async def _snapshots(operations: ReadOperations, ioctx: librados.Ioctx, image: ImageRef) -> list[header.Snapshot]:
    return (await header.snapshots(operations, ioctx, image))[1]
