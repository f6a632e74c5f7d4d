"""Lists of names with values that an object class returns page by page."""

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from rbdfs.ceph.bindings.encoding import MalformedError, Reader, encode_string

T = TypeVar("T")

NO_PAGE: Final = bytes(4)
"""A page with no name on it."""


async def listed(
    ask: Callable[[str, bytes], Awaitable[bytes]], names_a_page: int, value: Callable[[Reader], T]
) -> dict[str, T]:
    """All names, each with the value that `value` reads after it. Raises MalformedError, and what `ask` raises.

    `ask` gets one page: it takes the last name so far, and the argument for the method.
    """
    found: dict[str, T] = {}
    last, page = "", names_a_page
    while page == names_a_page:
        reader = Reader(await ask(last, encode_string(last) + names_a_page.to_bytes(8, "little")))
        known = len(found)
        page = reader.u32()
        for _ in range(page):
            last = reader.string()
            found[last] = value(reader)
        if page and len(found) == known:  # or it would never end
            raise MalformedError(f"after {known} names, the same again")
    return found
