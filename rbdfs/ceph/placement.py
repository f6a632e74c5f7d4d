"""From an object's name to its placement group, and to the OSDs that store that.

The first step is arithmetic, the same as Ceph's: `pg_pool_t::hash_key` and `raw_pg_to_pg` (src/osd/osd_types.cc),
`ceph_str_hash_rjenkins` (src/common/ceph_hash.cc). Only the monitors know the second (CRUSH, and the exceptions to it):
they are asked once for each placement group, not for each object as `ceph osd map` does.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import rados

from rbdfs.ceph.metadata.monitors import ask_monitors

MONITOR_SECONDS = 30
"""How long to wait for an answer of the monitors."""

NO_OSD = 0x7FFFFFFF
"""The place of a shard that no OSD has, in an acting set (CRUSH_ITEM_NONE)."""

_MASK = 0xFFFFFFFF
_GOLDEN_RATIO = 0x9E3779B9
_NAMESPACE_SEPARATOR = b"\x1f"


@dataclass(frozen=True, slots=True)
class PlacementGroups:
    """The placement groups of a pool."""

    pool_id: int
    pg_num: int

    def of(self, object_name: str, namespace: str = "") -> str:
        """The placement group of an object, as `ceph osd map` shows it."""
        key = object_name.encode(errors="surrogateescape")
        if namespace:
            key = namespace.encode(errors="surrogateescape") + _NAMESPACE_SEPARATOR + key
        return f"{self.pool_id}.{stable_mod(rjenkins(key), self.pg_num):x}"


def stable_mod(value: int, count: int) -> int:
    """`ceph_stable_mod`: most values keep their group when groups are added."""
    mask = (1 << (count - 1).bit_length()) - 1
    return value & mask if value & mask < count else value & (mask >> 1)


def rjenkins(key: bytes) -> int:
    """Robert Jenkins' hash of 1996, by which Ceph places objects: 32 bits."""
    a, b, c = _GOLDEN_RATIO, _GOLDEN_RATIO, 0
    whole = len(key) - len(key) % 12
    for i in range(0, whole, 12):
        a = (a + int.from_bytes(key[i : i + 4], "little")) & _MASK
        b = (b + int.from_bytes(key[i + 4 : i + 8], "little")) & _MASK
        c = (c + int.from_bytes(key[i + 8 : i + 12], "little")) & _MASK
        a, b, c = _mix(a, b, c)
    rest = key[whole:]
    a = (a + int.from_bytes(rest[:4], "little")) & _MASK
    b = (b + int.from_bytes(rest[4:8], "little")) & _MASK
    # The lowest byte of c is the length.
    c = (c + len(key) + (int.from_bytes(rest[8:], "little") << 8)) & _MASK
    return _mix(a, b, c)[2]


def _mix(a: int, b: int, c: int) -> tuple[int, int, int]:
    a = (a - b - c) & _MASK ^ c >> 13
    b = (b - c - a) & _MASK ^ a << 8 & _MASK
    c = (c - a - b) & _MASK ^ b >> 13
    a = (a - b - c) & _MASK ^ c >> 12
    b = (b - c - a) & _MASK ^ a << 16 & _MASK
    c = (c - a - b) & _MASK ^ b >> 5
    a = (a - b - c) & _MASK ^ c >> 3
    b = (b - c - a) & _MASK ^ a << 10 & _MASK
    c = (c - a - b) & _MASK ^ b >> 15
    return a, b, c


def placements(
    client: rados.Rados, pool_id: int, namespace: str, object_names: AbstractSet[str]
) -> Mapping[str, tuple[str, list[int]]]:
    """The placement group and the acting set of each object, whether it exists or not.

    The first OSD of an acting set is the primary. If the pool is erasure-coded, the n-th OSD has the n-th shard, or is
    NO_OSD.

    Blocks. `mon 'profile rbd'` may ask this. Raises RbdfsError.
    """
    pools = _ask(client, "osd dump")["pools"]
    groups = PlacementGroups(pool_id, next(pool["pg_num"] for pool in pools if pool["pool"] == pool_id))
    group_of = {name: groups.of(name, namespace) for name in object_names}
    acting = {group: _ask(client, "pg map", pgid=group)["acting"] for group in set(group_of.values())}
    return {name: (group, acting[group]) for name, group in group_of.items()}


def _ask(client: rados.Rados, command: str, **arguments: str) -> Any:
    return ask_monitors(client, f"ask the monitors '{command}'", command, timeout=MONITOR_SECONDS, **arguments)
