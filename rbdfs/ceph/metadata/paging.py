"""What an object class lists page by page: names, each with a value."""

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from rbdfs.ceph.bindings.encoding import MalformedError, Reader, encode_string

T = TypeVar("T")

NO_PAGE: Final = bytes(4)
"""A page with no name on it."""


async def listed(
    ask: Callable[[str, bytes], Awaitable[bytes]], names_a_page: int, value: Callable[[Reader], T]
) -> dict[str, T]:
    """All names, with what `value` takes of the answer after each. Raises MalformedError, and what `ask` raises.

    `ask` asks for one page: after which name, and that with `names_a_page` as the argument of a method.
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
        if page and len(found) == known:  # it would go on for ever
            raise MalformedError(f"after {known} names, the same again")
    return found
