"""Translate errors of Ceph's bindings to RbdfsError. They share names with Python's own errors, and are not theirs."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import rados
import rbd

from rbdfs.errors import RbdfsError

_FAMILIES = (rados.Error, rbd.Error)


def errno_of(error: Exception) -> int:
    """The positive errno of an exception of rados or rbd; EIO if it has none."""
    number = getattr(error, "errno", None)
    return abs(number) if isinstance(number, int) and number else errno.EIO


def reason_of(number: int) -> str:
    """The message for an errno of Ceph."""
    if number == errno.ESHUTDOWN:  # EBLOCKLISTED
        return "the cluster has blocklisted this client (see 'ceph osd blocklist ls')"
    return os.strerror(number)


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn errors of the bindings into `cannot <doing>: <reason>`, with their errno.

    They decode every string, and raise UnicodeDecodeError for one that is not UTF-8.
    """
    try:
        yield
    except _FAMILIES as error:
        number = errno_of(error)
        raise RbdfsError(f"cannot {doing}: {reason_of(number)}", number) from error
    except UnicodeDecodeError as error:
        raise RbdfsError(f"cannot {doing}: a name there is not UTF-8", errno.EILSEQ) from error
