"""Errors of Ceph's bindings → RbdfsError. Theirs share names with Python's own and are none of them."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import rados
import rbd

from rbdfs.errors import RbdfsError

_FAMILIES = (rados.Error, rbd.Error)


def errno_of(error: Exception) -> int:
    """The positive errno that an exception of rados or rbd stands for; EIO where it has none."""
    number = getattr(error, "errno", None)
    return abs(number) if isinstance(number, int) and number else errno.EIO


def reason_of(number: int) -> str:
    """An errno of Ceph's in words."""
    if number == errno.ESHUTDOWN:  # EBLOCKLISTED
        return "the cluster has blocklisted this client (see 'ceph osd blocklist ls')"
    return os.strerror(number)


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn errors of the bindings into `cannot <doing>: <reason>`, with their errno.

    They decode every string, and raise UnicodeDecodeError for what is not UTF-8.
    """
    try:
        yield
    except _FAMILIES as error:
        number = errno_of(error)
        raise RbdfsError(f"cannot {doing}: {reason_of(number)}", number) from error
    except UnicodeDecodeError as error:
        raise RbdfsError(f"cannot {doing}: a name there is not UTF-8", errno.EILSEQ) from error
