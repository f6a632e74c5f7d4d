"""What the folder records of its cluster, and the lock under which that changes."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rbdfs.errors import UsageError

STATE_FILE = "devcluster.json"
NEW_STATE_FILE = f"{STATE_FILE}.new"

Store = Literal["bluestore", "memstore"]


@dataclass(frozen=True, slots=True)
class State:
    """What the folder records of its cluster. The configuration is written from it."""

    fsid: str
    port: int
    osds: int
    store: Store
    block_bytes: int
    run_dir: str
    """Of sockets."""
    ready: bool = False
    """False until the first start succeeded: what is there is then of no use to anyone."""

    @property
    def daemons(self) -> list[str]:
        """By name, as `status` lists them."""
        return ["mon.a", "mgr.x", *(f"osd.{i}" for i in range(self.osds))]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One change of the folder at a time. The lock is the folder itself: no file is left behind."""
    while True:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise UsageError(f"{folder}: cannot be used as a folder: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            held = os.fstat(descriptor)
            if held.st_uid != os.geteuid():
                raise UsageError(f"{folder}: belongs to another user")
            # Another's `down` may have removed the folder while we waited: then we locked a folder without a name.
            if folder.is_dir() and os.path.samestat(held, folder.stat()):
                yield
                return
        finally:
            os.close(descriptor)


def load(folder: Path) -> State | None:
    """None if there is no cluster. UsageError if the folder holds something else."""
    try:
        return State(**json.loads((folder / STATE_FILE).read_text()))
    except FileNotFoundError:
        if any(folder.glob("*")):  # none either if another's `down` was faster
            raise UsageError(f"{folder}: not empty, and not a devcluster; choose another folder") from None
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{folder / STATE_FILE}: cannot be read: {error}") from None


def save(folder: Path, state: State) -> State:
    """Replaces the record as a whole; the same state, for the caller to go on with."""
    new = folder / NEW_STATE_FILE
    new.write_text(json.dumps(dataclasses.asdict(state), indent=1))
    new.replace(folder / STATE_FILE)
    return state
