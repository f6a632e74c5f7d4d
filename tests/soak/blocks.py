"""Blocks that say by themselves which write they are of: so a reader can tell old from new, and both from wrong."""

import random
import struct
from collections.abc import Sequence

BLOCK_BYTES = 4096
HEAD = struct.Struct("<QQ")
BODY_BYTES = BLOCK_BYTES - HEAD.size
BODIES = random.Random(14).randbytes(1 << 20)
ZEROS = bytes(BLOCK_BYTES)
UNWRITTEN = 0
"""The generation of a block that nobody has written, or that was cut off: zeros."""


def block(generation: int, number: int) -> bytes:
    """What the write of this generation puts into the block of this number."""
    if generation == UNWRITTEN:
        return ZEROS
    start = (generation * 7919 + number * 104_729) % (len(BODIES) - BODY_BYTES)
    return HEAD.pack(generation, number) + BODIES[start : start + BODY_BYTES]


def content(generations: Sequence[int], first: int = 0) -> bytes:
    """An image, or a part of it."""
    return b"".join(block(generation, number) for number, generation in enumerate(generations, first))


def generation_of(data: bytes, number: int) -> int | None:
    """Which write a block is of; None if it is no block that ever was."""
    if data == ZEROS:
        return UNWRITTEN
    if len(data) != BLOCK_BYTES:
        return None
    generation, _ = HEAD.unpack_from(data)
    return generation if data == block(generation, number) else None


def wrong_blocks(data: bytes, oldest: Sequence[int], newest: Sequence[int]) -> list[str]:
    """What is wrong with what was read of a whole image: each block may be as old and as new as this."""
    if data == content(oldest):
        return []
    wrong = []
    for number, (old, new) in enumerate(zip(oldest, newest, strict=True)):
        there = generation_of(data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES], number)
        if there is None or not old <= there <= new:
            what = "garbage" if there is None else f"generation {there}" if there else "zeros"
            wrong.append(f"block {number} is {what}, not {old} to {new}")
    return wrong


def garbage(data: bytes) -> list[int]:
    """Blocks that never were anybody's."""
    starts = range(0, len(data), BLOCK_BYTES)
    return [
        start // BLOCK_BYTES
        for start in starts
        if generation_of(data[start : start + BLOCK_BYTES], start // BLOCK_BYTES) is None
    ]
