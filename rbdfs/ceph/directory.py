"""What a pool says of its images by name: the objects that RBD keeps as directories, read without Ceph's `rbd` binding.

That one cannot decode a name that is not UTF-8. The methods are those of Ceph's object class `rbd`
(src/cls/rbd/cls_rbd.cc). Images of format 1 are in the data of the same object, as a `tmap`, and have no id.
"""

import errno
import os
from dataclasses import replace

from rbdfs.catalog import ImageRef, Namespace
from rbdfs.ceph import header, librados
from rbdfs.ceph.encoding import Reader, encode_string
from rbdfs.ceph.read_op import Call, ReadOperations, Reply, Request
from rbdfs.errors import RbdfsError

DIRECTORY = "rbd_directory"
NAMESPACES = "rbd_namespace"

NAMES_A_PAGE = 1024
"""As librbd asks for them; the OSD has other work as well."""

_FORMAT_1_BYTES = 1 << 16
"""What is read of the names of images of format 1 at first: a few thousand; of most pools there are none."""


async def image_names(operations: ReadOperations, ioctx: librados.Ioctx, namespace: Namespace) -> dict[str, ImageRef]:
    """All images of a namespace, by name. Raises RbdfsError."""
    found: dict[str, ImageRef] = {}
    last, page = "", NAMES_A_PAGE
    while page == NAMES_A_PAGE:
        call = Call(b"dir_list", encode_string(last) + NAMES_A_PAGE.to_bytes(8, "little"))
        reply = await operations.ask(Request(ioctx, DIRECTORY, [call], read_bytes=0 if last else _FORMAT_1_BYTES))
        if reply.result == -errno.ENOENT:  # nothing was ever made in it
            return found
        if len(reply.data) == _FORMAT_1_BYTES:
            found |= await _many_of_format_1(operations, ioctx, namespace)
        elif reply.data:
            found |= _of_format_1(reply.data, namespace)
        reader = Reader(reply.answer(0, f"list the images of {namespace}"))
        page = reader.u32()
        for _ in range(page):
            last = reader.string()
            found[last] = ImageRef(namespace, reader.string())
    return found


async def image(operations: ReadOperations, ioctx: librados.Ioctx, namespace: Namespace, name: str) -> ImageRef:
    """One image by name. Raises RbdfsError: ENOENT."""
    call = Call(b"dir_get_id", encode_string(name))
    reply = await operations.ask(Request(ioctx, DIRECTORY, [call]))
    what = f"find {namespace}/{name}"
    try:
        return ImageRef(namespace, Reader(reply.answer(0, what)).string())
    except RbdfsError as error:
        if error.errno != errno.ENOENT:
            raise
    old = ImageRef(namespace, name, format=1)
    reply = await operations.ask(Request(ioctx, header.object_of(old), read_bytes=len(header.FORMAT_1_TEXT)))
    _check(reply, what)
    if reply.data != header.FORMAT_1_TEXT:
        raise RbdfsError(f"cannot {what}: {os.strerror(errno.ENOENT)}", errno.ENOENT)
    return old


async def still_named(
    operations: ReadOperations, ioctx: librados.Ioctx, namespace: Namespace, images: list[ImageRef]
) -> set[ImageRef]:
    """Those of `images` that the pool has a name for. Raises RbdfsError."""
    names = None
    if any(each.format == 1 for each in images):
        names = set((await image_names(operations, ioctx, namespace)).values())
    calls = [Call(b"dir_get_name", encode_string(each.id)) for each in images]
    reply = await operations.ask(Request(ioctx, DIRECTORY, calls))
    _check(reply, f"ask for the images of {namespace}")
    return {
        each
        for each, (result, _) in zip(images, reply.calls, strict=True)
        if (result >= 0 if each.format != 1 else names is not None and replace(each, snapshot_id=None) in names)
    }


async def namespaces(operations: ReadOperations, ioctx: librados.Ioctx) -> list[str]:
    """The names of all namespaces of a pool but the default one. Raises RbdfsError."""
    found: list[str] = []
    page = NAMES_A_PAGE
    while page == NAMES_A_PAGE:
        last = found[-1] if found else ""
        call = Call(b"namespace_list", encode_string(last) + NAMES_A_PAGE.to_bytes(8, "little"))
        reply = await operations.ask(Request(ioctx, NAMESPACES, [call]))
        if reply.result == -errno.ENOENT:
            return found
        reader = Reader(reply.answer(0, "list the namespaces of a pool"))
        page = reader.u32()
        found += [reader.string() for _ in range(page)]
    return found


async def changed_ns(operations: ReadOperations, ioctx: librados.Ioctx) -> int | None:
    """When an image or a namespace was last made, renamed or removed; None if there never was any."""
    replies = await operations.operate([Request(ioctx, name, stat=True) for name in (DIRECTORY, NAMESPACES)])
    for reply in replies:
        if reply.result != -errno.ENOENT:
            _check(reply, "look at a pool's directory")
    return max((reply.modified_ns for reply in replies if reply.result >= 0), default=None)


async def _many_of_format_1(
    operations: ReadOperations, ioctx: librados.Ioctx, namespace: Namespace
) -> dict[str, ImageRef]:
    read_bytes = _FORMAT_1_BYTES
    while True:
        read_bytes *= 2
        reply = await operations.ask(Request(ioctx, DIRECTORY, read_bytes=read_bytes))
        _check(reply, f"list the images of {namespace}")
        if len(reply.data) < read_bytes:
            return _of_format_1(reply.data, namespace)


def _of_format_1(tmap: bytes, namespace: Namespace) -> dict[str, ImageRef]:
    """A `tmap`: a header, and a map of names to nothing."""
    reader = Reader(tmap)
    reader.bytes()
    found = {}
    for _ in range(reader.u32()):
        name = reader.string()
        reader.bytes()
        found[name] = ImageRef(namespace, name, format=1)
    return found


def _check(reply: Reply, what: str) -> None:
    if reply.result < 0:
        raise RbdfsError(f"cannot {what}: {os.strerror(-reply.result)}", -reply.result)
