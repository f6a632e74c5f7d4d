"""A directory that somebody reads: names as of opendir(), attributes as fresh as `ls -l` may expect."""

import math
import os
from collections.abc import Mapping, Sequence

import pyfuse3
import trio

from rbdfs.fuse.attributes import ENTRY_SECONDS, KernelAttributes, KnownStat
from rbdfs.fuse.tree import DirEntry, Stat, Tree

LISTING_SECONDS = ENTRY_SECONDS / 2
"""How old the attributes in a listing may be when the kernel gets them; older if the cluster took that long."""

LISTED_AT_ONCE = 2048
"""Entries to ask the cluster about at once: 2,000 images take 0.2 s."""


class Listing:
    """An open directory. It asks the cluster for attributes in windows, as the reader gets there."""

    def __init__(self, entries: Sequence[DirEntry], tree: Tree, attributes: KernelAttributes) -> None:
        self._entries = entries
        self._tree = tree
        self._attributes = attributes
        self._window = range(0)
        """Positions of the entries in `_stats`; those that it lacks are gone."""
        self._stats: Mapping[int, Stat | None] = {}
        """By inode."""
        self._asked = -math.inf
        self._fresh_until = -math.inf

    async def reply(self, token: pyfuse3.ReaddirToken, start: int) -> None:
        """Give the kernel the entries from `start` on, as many as it takes, without those that are gone."""
        is_begun = False
        for position in range(start, len(self._entries)):
            if position not in self._window or trio.current_time() > self._fresh_until:
                if is_begun:
                    return  # the kernel asks for the rest: an error would take back what it was given
                await self._ask_window(position)
            name, node = self._entries[position]
            if node.inode not in self._stats:
                continue
            known = await self._attributes.newest(node, KnownStat(self._asked, self._stats[node.inode]))
            if not pyfuse3.readdir_reply(token, os.fsencode(name), self._attributes.entry(node, known), position + 1):
                return
            is_begun = True
            self._tree.add_lookup(node)
            self._attributes.add(node, known)

    async def _ask_window(self, position: int) -> None:
        """Ask the cluster about the entries from `position` on. The answer stays fresh long enough to give out many."""
        self._asked = trio.current_time()
        self._window = range(position, min(position + LISTED_AT_ONCE, len(self._entries)))
        self._stats = await self._tree.stat_all(self._entries[number].node for number in self._window)
        self._fresh_until = max(self._asked, trio.current_time() - LISTING_SECONDS / 2) + LISTING_SECONDS
