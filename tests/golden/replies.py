"""What a cluster replied to rbdfs, kept in a file, and given again without a cluster.

Of each object the file has what was asked of it: the answer of each call of an object class by its argument, values
of its omap, its first bytes. So it does not matter which questions go together in one message.
"""

import errno
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from rbdfs.catalog import Namespace
from rbdfs.ceph.bindings import librados
from rbdfs.ceph.bindings.read_op import Call, ReadOperations, Reply, Request
from rbdfs.errors import RbdfsError

FOLDER: Final = Path(__file__).parent
RELEASES: Final = ("ceph-16", "ceph-18")

Answers: TypeAlias = dict[str, bytes | int | None]
"""By what was asked, "call …", "value …" or "data": bytes, a negative errno, or None for a value that is not there. The
numbers "version" and "modified" of the object."""
Key: TypeAlias = tuple[str, str]
"""An object, as POOL-ID/NAMESPACE/NAME, and what was asked of it."""


class Place(librados.Ioctx):
    """A pool and a namespace that know what they are; with an ioctx if there is a cluster."""

    def __init__(self, namespace: Namespace, ioctx: librados.Ioctx | None = None) -> None:
        self.namespace = namespace
        self.ioctx = ioctx

    def object(self, name: str) -> str:
        """An object in it, as the file names it."""
        return f"{self.namespace.pool.id}/{self.namespace.name}/{name}"


def asked(call: Call) -> str:
    """A call, as the file names it."""
    return f"call {call.object_class.decode()}.{call.method.decode()}({call.argument.hex()})"


def _object_of(request: Request) -> str:
    assert isinstance(request.ioctx, Place)
    return request.ioctx.object(request.object_name)


class Recorder(ReadOperations):
    """Asks a cluster, and keeps what it replies."""

    def __init__(self, operations: ReadOperations) -> None:
        self.objects: dict[str, Answers | None] = {}
        """None: there is no such object."""
        self._operations = operations

    async def operate(self, requests: Sequence[Request]) -> Sequence[Reply]:
        real = []
        for request in requests:
            assert isinstance(request.ioctx, Place)
            assert request.ioctx.ioctx is not None
            real.append(request._replace(ioctx=request.ioctx.ioctx))
        replies = await self._operations.operate(real)
        for request, reply in zip(requests, replies, strict=True):
            self._keep(request, reply)
        return replies

    def _keep(self, request: Request, reply: Reply) -> None:
        name = _object_of(request)
        if reply.result == -errno.ENOENT:
            assert self.objects.setdefault(name, None) is None
            return
        assert reply.result >= 0, (request, reply)
        found: Answers = {"version": reply.version}
        for call, (result, answer) in zip(request.calls, reply.calls, strict=True):
            found[asked(call)] = answer if result >= 0 else result
        for key in request.keys:
            found[f"value {key.decode()}"] = reply.values.get(key)
        if request.stat:
            found["modified"] = reply.modified_ns
        kept = self.objects.setdefault(name, {})
        assert kept is not None
        if request.read_bytes and len(reply.data) >= len(_bytes(kept.get("data", b""))):
            found["data"] = reply.data
        changed = [what for what, answer in found.items() if what != "data" and kept.get(what, answer) != answer]
        assert not changed, f"{name} changed while it was asked: {changed}"
        kept |= found


class Replay(ReadOperations):
    """Replies as a cluster did."""

    def __init__(self, objects: Mapping[str, Answers | None]) -> None:
        self.consulted: set[Key] = set()
        """What was asked."""
        self.changed: dict[Key, bytes] = {}
        """What to reply instead. Then all that no cluster was asked for is not there; else that fails the test."""
        self._objects = objects

    async def operate(self, requests: Sequence[Request]) -> Sequence[Reply]:
        return [self._reply(request) for request in requests]

    def _reply(self, request: Request) -> Reply:
        name = _object_of(request)
        if name not in self._objects and not self.changed:
            raise LookupError(f"{name} was never asked for: capture again")
        answers = self._objects.get(name)
        if answers is None:
            return Reply(-errno.ENOENT)

        def answer(what: str) -> bytes | int | None:
            self.consulted.add((name, what))
            if (name, what) in self.changed:
                return self.changed[name, what]
            if what not in answers and not self.changed:
                raise LookupError(f"{name} was never asked for {what}: capture again")
            return answers.get(what, -errno.ENOENT)

        calls = []
        for call in request.calls:
            found = answer(asked(call))
            calls.append((found, b"") if isinstance(found, int) else (0, found or b""))
        values = {key: found for key in request.keys if isinstance(found := answer(f"value {key.decode()}"), bytes)}
        return Reply(
            0,
            calls,
            values,
            _number(answer("modified")) if request.stat else 0,
            _bytes(answer("data"))[: request.read_bytes] if request.read_bytes else b"",
            _number(answers["version"]),
        )


def save(path: Path, objects: Mapping[str, Answers | None], **more: object) -> None:
    """An answer a line, so that the difference between two captures can be read."""

    def plain(answer: bytes | int | None) -> str | int | None:
        return answer.hex() if isinstance(answer, bytes) else answer

    shown = {
        name: None if answers is None else {what: plain(answer) for what, answer in sorted(answers.items())}
        for name, answers in sorted(objects.items())
    }
    path.write_text(json.dumps({**more, "objects": shown}, indent=1) + "\n")


def load(path: Path) -> tuple[dict[str, Answers | None], dict[str, Any]]:
    """The objects, and all else that is in the file."""
    more = json.loads(path.read_text())
    objects = {
        name: None
        if answers is None
        else {what: bytes.fromhex(answer) if isinstance(answer, str) else answer for what, answer in answers.items()}
        for name, answers in more.pop("objects").items()
    }
    return objects, more


def places(
    pools: Mapping[int, str], ioctx_of: Callable[[Namespace], librados.Ioctx] | None = None
) -> Callable[[Namespace], Place]:
    """An `ioctx_of`. Raises RbdfsError for a pool that there is not."""

    def place(namespace: Namespace) -> Place:
        if namespace.pool.id not in pools:
            raise RbdfsError(f"cannot use pool {namespace.pool.id}", errno.ENOENT)
        return Place(namespace, ioctx_of(namespace) if ioctx_of else None)

    return place


def _bytes(answer: bytes | int | None) -> bytes:
    assert isinstance(answer, bytes)
    return answer


def _number(answer: bytes | int | None) -> int:
    assert isinstance(answer, int)
    return answer
