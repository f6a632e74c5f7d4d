"""A cache of what was read from objects: an entry is valid as long as the object has the same version. Pure."""

from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Versioned(NamedTuple, Generic[V]):
    """What was read from an object, at a version of it."""

    version: int
    value: V
    size: int


class VersionedCache(Generic[K, V]):
    """Holds the newest entries, up to a total size in a unit of the caller's choice."""

    def __init__(self, at_most: int) -> None:
        self._at_most = at_most
        self._size = 0
        self._entries: dict[K, Versioned[V]] = {}

    def get(self, key: K) -> Versioned[V] | None:
        """The entry, perhaps of an older version than the present one."""
        return self._entries.get(key)

    def put(self, key: K, version: int, value: V, size: int) -> None:
        """Add or replace an entry; the oldest entries are dropped first."""
        self.drop(key)
        self._entries[key] = Versioned(version, value, size)
        self._size += size
        while self._size > self._at_most:
            self.drop(next(iter(self._entries)))

    def drop(self, key: K) -> None:
        """Remove an entry if there is one."""
        if (known := self._entries.pop(key, None)) is not None:
            self._size -= known.size
