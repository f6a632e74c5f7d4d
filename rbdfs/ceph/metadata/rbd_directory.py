"""The images and namespaces of a pool, by name: the objects that RBD uses as directories.

Ceph's `rbd` binding cannot decode a name that is not UTF-8, so this calls the methods of the object class `rbd`
(src/cls/rbd/cls_rbd.cc). Images of format 1 are in the data of the same object, as a `tmap`, and have no id.
"""

import errno
import os
from dataclasses import replace

from rbdfs.catalog import ImageRef, Namespace
from rbdfs.ceph.bindings import librados
from rbdfs.ceph.bindings.encoding import Reader, encode_string, understood
from rbdfs.ceph.bindings.read_op import Call, ReadOperations, Request
from rbdfs.ceph.metadata import header
from rbdfs.ceph.metadata.paging import NO_PAGE, listed
from rbdfs.errors import RbdfsError

DIRECTORY = "rbd_directory"
NAMESPACES = "rbd_namespace"

NAMES_A_PAGE = 1024
"""As in librbd: the OSD has other work as well."""

_FORMAT_1_BYTES = 1 << 16
"""How much to read at first of the names of images of format 1: a few thousand names. Most pools have none."""


async def image_names(operations: ReadOperations, ioctx: librados.Ioctx, namespace: Namespace) -> dict[str, ImageRef]:
    """All images of a namespace, by name. Raises RbdfsError."""
    of_format_1: dict[str, ImageRef] = {}

    async def ask(last: str, argument: bytes) -> bytes:
        read_bytes = 0 if last else _FORMAT_1_BYTES
        reply = await operations.ask(Request(ioctx, DIRECTORY, [Call(b"dir_list", argument)], read_bytes=read_bytes))
        if reply.result == -errno.ENOENT:  # no image was ever created in it
            return NO_PAGE
        if len(reply.data) == _FORMAT_1_BYTES:
            of_format_1.update(await _many_of_format_1(operations, ioctx, namespace))
        elif reply.data:
            of_format_1.update(_of_format_1(reply.data, namespace))
        return reply.answer(0, f"list the images of {namespace}")

    with understood(f"the names of the images of {namespace}"):
        found = await listed(ask, NAMES_A_PAGE, lambda reader: ImageRef(namespace, reader.string()))
        return of_format_1 | found


async def image(operations: ReadOperations, ioctx: librados.Ioctx, namespace: Namespace, name: str) -> ImageRef:
    """One image by name. Raises RbdfsError: ENOENT."""
    call = Call(b"dir_get_id", encode_string(name))
    reply = await operations.ask(Request(ioctx, DIRECTORY, [call]))
    what = f"find {namespace}/{name}"
    try:
        with understood(f"the id of {namespace}/{name}"):
            return ImageRef(namespace, Reader(reply.answer(0, what)).string())
    except RbdfsError as error:
        if error.errno != errno.ENOENT:
            raise
    old = ImageRef(namespace, name, format=1)
    reply = await operations.ask(Request(ioctx, header.object_of(old), read_bytes=len(header.FORMAT_1_TEXT)))
    reply.check(what)
    if reply.data != header.FORMAT_1_TEXT:
        raise RbdfsError(f"cannot {what}: {os.strerror(errno.ENOENT)}", errno.ENOENT)
    return old


async def still_named(
    operations: ReadOperations, ioctx: librados.Ioctx, namespace: Namespace, images: list[ImageRef]
) -> set[ImageRef]:
    """Those of `images` that have a name in the pool. Raises RbdfsError."""
    names = None
    if any(each.format == 1 for each in images):
        names = set((await image_names(operations, ioctx, namespace)).values())
    calls = [Call(b"dir_get_name", encode_string(each.id)) for each in images]
    reply = await operations.ask(Request(ioctx, DIRECTORY, calls))
    reply.check(f"ask for the images of {namespace}")
    return {
        each
        for each, (result, _) in zip(images, reply.calls, strict=True)
        if (result >= 0 if each.format != 1 else names is not None and replace(each, snapshot_id=None) in names)
    }


async def namespaces(operations: ReadOperations, ioctx: librados.Ioctx) -> list[str]:
    """The names of all namespaces of a pool but the default one. Raises RbdfsError."""

    async def ask(_last: str, argument: bytes) -> bytes:
        reply = await operations.ask(Request(ioctx, NAMESPACES, [Call(b"namespace_list", argument)]))
        return NO_PAGE if reply.result == -errno.ENOENT else reply.answer(0, "list the namespaces of a pool")

    with understood("the names of the namespaces of a pool"):
        return list(await listed(ask, NAMES_A_PAGE, lambda _: None))


async def changed_ns(operations: ReadOperations, ioctx: librados.Ioctx) -> int | None:
    """When an image or a namespace was last created, renamed or removed; None if there never was one."""
    replies = await operations.operate([Request(ioctx, name, stat=True) for name in (DIRECTORY, NAMESPACES)])
    for reply in replies:
        if reply.result != -errno.ENOENT:
            reply.check("stat a pool's directory")
    return max((reply.modified_ns for reply in replies if reply.result >= 0), default=None)


async def _many_of_format_1(
    operations: ReadOperations, ioctx: librados.Ioctx, namespace: Namespace
) -> dict[str, ImageRef]:
    read_bytes = _FORMAT_1_BYTES
    while True:
        read_bytes *= 2
        reply = await operations.ask(Request(ioctx, DIRECTORY, read_bytes=read_bytes))
        reply.check(f"list the images of {namespace}")
        if len(reply.data) < read_bytes:
            return _of_format_1(reply.data, namespace)


def _of_format_1(tmap: bytes, namespace: Namespace) -> dict[str, ImageRef]:
    """Decode a `tmap`: a header, and a map of names to empty values."""
    reader = Reader(tmap)
    reader.bytes()
    found = {}
    for _ in range(reader.u32()):
        name = reader.string()
        reader.bytes()
        found[name] = ImageRef(namespace, name, format=1)
    return found
