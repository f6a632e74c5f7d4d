"""What objects held, kept for as long as their version says that they are the same: whoever asks again asks for that
alone. Pure."""

from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Versioned(NamedTuple, Generic[V]):
    """What an object held at a version."""

    version: int
    value: V
    size: int


class VersionedCache(Generic[K, V]):
    """The newest, up to a size that all have together, in whatever unit the caller counts."""

    def __init__(self, at_most: int) -> None:
        self._at_most = at_most
        self._size = 0
        self._known: dict[K, Versioned[V]] = {}

    def get(self, key: K) -> Versioned[V] | None:
        """What is known, perhaps of an older version than there is now."""
        return self._known.get(key)

    def keep(self, key: K, version: int, value: V, size: int) -> None:
        """In place of what was known; what was kept first goes first."""
        self.drop(key)
        self._known[key] = Versioned(version, value, size)
        self._size += size
        while self._size > self._at_most:
            self.drop(next(iter(self._known)))

    def drop(self, key: K) -> None:
        """Nothing is known of it any more."""
        if (known := self._known.pop(key, None)) is not None:
            self._size -= known.size
