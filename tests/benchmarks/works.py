"""`python -m tests.benchmarks.works`: what no program does that is there already."""

import mmap
import os
import random
import subprocess
import sys
import time
from pathlib import Path

PAGE = 4096


def main(arguments: list[str]) -> int:
    """Do one of them. The exit status."""
    work, path, *rest = arguments
    if work == "open":
        return open_all(Path(path), rest[0], int(rest[1]))
    if work == "seek":
        return seek_all(path)
    return beside(path, rest)


def open_all(folder: Path, prefix: str, count: int) -> int:
    """Have so many files open at a time, and read a page of each."""
    files = [os.open(folder / f"{prefix}{number}", os.O_RDONLY) for number in range(count)]
    for file in files:
        os.pread(file, PAGE, 0)
    for file in files:
        os.close(file)
    return 0


def seek_all(path: str) -> int:
    """Find all data and all holes of a file; prints how many pieces of data it has."""
    pieces = end = 0
    file = os.open(path, os.O_RDONLY)
    size = os.fstat(file).st_size
    while end < size:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError:  # ENXIO
            break
        end = os.lseek(file, start, os.SEEK_HOLE)
        pieces += 1
    print(pieces)
    return 0


def beside(path: str, command: list[str]) -> int:
    """Run a command, and read pages of a file meanwhile, past the page cache; prints the longest read, in seconds."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    pages = os.fstat(file).st_size // PAGE
    buffer, longest = mmap.mmap(-1, PAGE), 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            began = time.monotonic()
            os.preadv(file, [buffer], random.randrange(pages) * PAGE)
            longest = max(longest, time.monotonic() - began)
    print(longest)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
