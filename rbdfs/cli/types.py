"""Types of values on the command line: text → value."""

import argparse
import hashlib
import re


def positive(text: str) -> int:
    """A whole number above 0."""
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def octal(text: str) -> int:
    """Permission bits."""
    return int(text, 8)


def size(text: str) -> int:
    """Bytes: a number with K, M, G or T, as the rbd command takes it."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not a size; write 0, 512M, 2G")
    number, unit = match.groups()
    return int(number) << (10 * " KMGT".index(unit.upper() or " "))


def rate(text: str) -> int:
    """Bytes per second, more than 0; a trailing /s is allowed."""
    bytes_per_second = size(text.removesuffix("/s"))
    if not bytes_per_second:
        raise argparse.ArgumentTypeError(f"{text} would never end")
    return bytes_per_second


def digest(text: str) -> str:
    """The name of a digest of fixed length, as hashlib knows it."""
    try:
        known = hashlib.new(text).digest_size > 0
    except ValueError:
        known = False
    if not known:
        raise argparse.ArgumentTypeError(f"no such digest: {text}; there are sha256, sha512, blake2b, md5 and others")
    return text


def address(text: str) -> tuple[str, int]:
    """An address to listen on: PORT, or ADDRESS:PORT; an IPv6 address stands in brackets."""
    match = re.fullmatch(r"(?:(?:\[([^]]+)\]|([^:]+)):)?(\d+)", text)
    if match is None or not 0 < int(match[3]) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is no address; write 9283, 0.0.0.0:9283, [::1]:9283")
    return match[1] or match[2] or "127.0.0.1", int(match[3])
