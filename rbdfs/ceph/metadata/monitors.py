"""Commands to the monitors, with answers in JSON."""

import json
from typing import Any

import rados

from rbdfs.ceph.errors import reason_of, translated
from rbdfs.errors import RbdfsError


def ask_monitors(client: rados.Rados, doing: str, prefix: str, *, timeout: int = 0, **arguments: str) -> Any:
    """The decoded answer to the command `prefix`. Blocks. Raises RbdfsError: `cannot <doing>: <reason>`.

    `timeout` is in seconds; 0 is `rados_mon_op_timeout`.
    """
    command = json.dumps({"prefix": prefix, "format": "json", **arguments})
    with translated(doing):
        status, answer, said = client.mon_command(command, b"", timeout)
    if status:
        raise RbdfsError(f"cannot {doing}: {said or reason_of(-status)}", -status)
    return json.loads(answer.decode(errors="surrogateescape"))
