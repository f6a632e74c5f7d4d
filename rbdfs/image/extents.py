"""Asks the cluster where an image holds data, one window at a time, and enters the answers in a hole map."""

import logging

from rbdfs.errors import RbdfsError
from rbdfs.image.backend import ImageBackend
from rbdfs.image.holes import HoleMap

log = logging.getLogger(__name__)


async def learn_window(holes: HoleMap, backend: ImageBackend, position: int) -> int:
    """Learn what the window around the image offset `position` holds. Returns where that window ends.

    Raises RbdfsError: BeyondEndError if others have shrunk the image.
    """
    window = await backend.extents_window()
    start = position - position % window
    end = min(start + window, holes.size)
    holes.learn(start, end, await backend.extents(start, end - start))
    return end


def assume_data(holes: HoleMap, position: int, error: RbdfsError) -> None:
    """Take all from `position` to the end for data, since the cluster refuses to say what is a hole."""
    log.warning("from %d on, holes are read like data: %s", position, error)
    holes.learn(position, holes.size, [(position, holes.size - position)])
