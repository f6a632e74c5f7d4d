"""Our own connection to the cluster, through ctypes: Ceph's Python binding does not export its `rados_t`.

librbd.py opens images through it, and read_op.py sends read operations. All calls block and release the GIL: make them
in a worker thread. Close in the order image, ioctx, cluster: an image closed after `shutdown` hangs for ever.
"""

import ctypes
import os
from collections.abc import Callable, Mapping
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from rbdfs.catalog import Namespace
from rbdfs.ceph.bindings.lifetime import Lifetime
from rbdfs.ceph.errors import reason_of
from rbdfs.errors import ConnectError, RbdfsError

READ_OPTIONS: Mapping[str, str] = {
    "librados_thread_count": "1",
    "objecter_inflight_ops": str(1 << 20),
    "objecter_inflight_op_bytes": str(1 << 40),
    "rbd_atime_update_interval": "0",
}
"""Ceph options for a connection that only reads; the user's configuration overrides them.

One librados thread, not two: with 16 reads of 4 KiB in flight it saves a fifth to a quarter of the CPU time a read
and half of the context switches (Ceph 16.2.15, 2 cores, another program busy), and large reads are as fast. With the
callbacks of Ceph's own binding it is slower, so it is not for that connection. We limit what is in flight
ourselves, by pool: librados, at 1,024 operations or 100 MiB, would block the calling thread. Interval 0: a read must
not write an access timestamp. Beyond these, `rbd_cache=false`, `rbd_io_scheduler=none` and `ms_async_op_threads=1`
made no measurable difference.
"""


HANDLE = POINTER(c_void_p)


def load(name: str, how: type[ctypes.CDLL] = ctypes.CDLL) -> ctypes.CDLL:
    """Load one of Ceph's libraries; a PyDLL keeps the GIL in calls. Raises ImportError."""
    try:
        return how(name)
    except OSError as error:
        raise ImportError(str(error), name=name.partition(".")[0]) from error


def bind(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of a library, with its types."""
    function = library[name]  # a fresh function object, so that the types set here are ours alone
    function.restype = result
    function.argtypes = arguments
    return function


_librados = load("librados.so.2")

_rados_create2 = bind(_librados, "rados_create2", c_int, HANDLE, c_char_p, c_char_p, c_uint64)
_rados_conf_read_file = bind(_librados, "rados_conf_read_file", c_int, c_void_p, c_char_p)
_rados_conf_parse_env = bind(_librados, "rados_conf_parse_env", c_int, c_void_p, c_char_p)
_rados_conf_set = bind(_librados, "rados_conf_set", c_int, c_void_p, c_char_p, c_char_p)
_rados_connect = bind(_librados, "rados_connect", c_int, c_void_p)
_rados_get_instance_id = bind(_librados, "rados_get_instance_id", c_uint64, c_void_p)
_rados_watch_flush = bind(_librados, "rados_watch_flush", c_int, c_void_p)
_rados_shutdown = bind(_librados, "rados_shutdown", None, c_void_p)
_rados_ioctx_create2 = bind(_librados, "rados_ioctx_create2", c_int, c_void_p, c_int64, HANDLE)
_rados_ioctx_set_namespace = bind(_librados, "rados_ioctx_set_namespace", None, c_void_p, c_char_p)
_rados_ioctx_destroy = bind(_librados, "rados_ioctx_destroy", None, c_void_p)


def check(result: int, what: str, error: type[RbdfsError] = RbdfsError) -> None:
    """Raise an error for a negative errno."""
    if result < 0:
        raise error(f"{what}: {reason_of(-result)}", -result)


class Cluster:
    """A connection of our own to the cluster: a `rados_t`."""

    def __init__(self, handle: c_void_p, lifetime: Lifetime) -> None:
        self._handle = handle
        self._lifetime = lifetime

    def open_ioctx(self, namespace: Namespace) -> "Ioctx":
        """Open an ioctx. Waits for an OSD map if the pool is not in the present one."""
        handle, pool_id = c_void_p(), namespace.pool.id
        check(_rados_ioctx_create2(self._handle, pool_id, byref(handle)), f"cannot use pool {pool_id}")
        if namespace.name:
            _rados_ioctx_set_namespace(handle, namespace.name.encode(errors="surrogateescape"))
        return Ioctx(handle, namespace, self._lifetime)

    @property
    def client_id(self) -> int:
        """The id by which others see our watches."""
        return int(_rados_get_instance_id(self._handle))

    def flush_watches(self) -> None:
        """Wait until no callback of a watch runs. Watches that were given back start no new ones."""
        _rados_watch_flush(self._handle)

    def shutdown(self) -> None:
        """Disconnect. All ioctxs and images must be closed."""
        _rados_shutdown(self._handle)


def connect(
    options: Mapping[str, str],
    *,
    conf_file: Path | None = None,
    read_conf: bool = True,
    cluster_name: str,
    client_name: str,
    lifetime: Lifetime,
) -> Cluster:
    """Connect: first `conf_file` is read (None: where Ceph looks by default), then the environment (CEPH_ARGS,
    CEPH_KEYRING), then `options` are set. Without `read_conf` there is no file.

    Blocks for up to the option `client_mount_timeout` (300 s by default) if no monitor answers.
    """
    handle = c_void_p()
    result = _rados_create2(byref(handle), cluster_name.encode(), client_name.encode(), 0)
    check(result, "cannot create a cluster handle", ConnectError)
    try:
        if read_conf:
            result = _rados_conf_read_file(handle, None if conf_file is None else os.fsencode(conf_file))
            check(result, f"cannot read {conf_file or 'a Ceph configuration file'}", ConnectError)
        check(_rados_conf_parse_env(handle, None), "cannot read CEPH_ARGS", ConnectError)
        for name, value in options.items():
            result = _rados_conf_set(handle, name.encode(), value.encode())
            check(result, f"Ceph does not accept {name}={value}", ConnectError)
        check(_rados_connect(handle), f"cannot connect as {client_name}", ConnectError)
    except ConnectError:
        _rados_shutdown(handle)
        raise
    return Cluster(handle, lifetime)


class Ioctx:
    """A pool and a namespace in it: a `rados_ioctx_t`."""

    def __init__(self, handle: c_void_p, namespace: Namespace, lifetime: Lifetime) -> None:
        self._handle = handle
        self.namespace = namespace
        self.pool_id = namespace.pool.id
        self.lifetime = lifetime
        """Of the connection. Hold it while using the ioctx."""
        self.lane = lifetime.lane(self.pool_id)
        """For the threads that wait for this pool by this connection."""

    @property
    def pointer(self) -> c_void_p:
        """The `rados_ioctx_t`, for calls that are bound in other files. Invalid after `destroy`."""
        return self._handle

    def destroy(self) -> None:
        """Close it. All images that were opened through it must be closed."""
        _rados_ioctx_destroy(self._handle)
