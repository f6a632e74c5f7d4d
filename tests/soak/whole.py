"""Readers that are programs of others, and that read whole images or all of them."""

import itertools
import os
import re
from abc import abstractmethod
from pathlib import Path

from tests.soak.changes import POOL as CHANGING_POOL
from tests.soak.fixed import POOL, compare
from tests.soak.ledger import FailedError, Ledger, WrongError, errnos_in
from tests.soak.reader import Reader
from tests.soak.site import Site

LISTED = re.compile(r"^-r--r--r-- +\d+ +\S+ +\S+ +(\d+) .* (\S+)$", re.MULTILINE)
VANISHED = frozenset({"ENOENT", "ESTALE"})

SHRANK = "File shrank"
"""tar 1.34 says so, and ends with 1, if it gets some of 10 KiB and then an error: it looks at no errno then."""


LOST = "getwd"
"""restic asks for the folder that it is in. The kernel drops one whose lookup fails, by ETIMEDOUT too."""


class OneByOne(Reader):
    """Takes the images one after the other."""

    def __init__(self, site: Site, ledger: Ledger, seed: int) -> None:
        super().__init__(site, ledger, seed)
        self._turns = itertools.cycle(site.fixed.values())

    def round(self) -> int:
        """One image."""
        fixed = next(self._turns)
        with self.site.room(self.name) as room:
            self.copy(self.site.path(fixed), room / "copy")
            return compare(f"{self.name} of {fixed.name}", room / "copy", fixed.reference)

    @abstractmethod
    def copy(self, image: Path, copy: Path) -> None:
        """By the program."""


class Cp(OneByOne):
    """It leaves holes out."""

    def copy(self, image: Path, copy: Path) -> None:
        """With SEEK_DATA and SEEK_HOLE."""
        self.site.programs.run("cp", image, copy)


class DirectDd(OneByOne):
    """It passes by the page cache."""

    def copy(self, image: Path, copy: Path) -> None:
        """Read in pieces of 1 MiB."""
        self.site.programs.run("dd", f"if={image}", f"of={copy}", "bs=1M", "iflag=direct", "status=none")


class WholePool(Reader):
    """Takes all images at once."""

    def round(self) -> int:
        """One copy of the pool."""
        with self.site.room(self.name) as room:
            self.copy(self.site.mount.path / POOL, room)
            return sum(
                compare(f"{self.name} of {fixed.name}", room / "copy" / fixed.name, fixed.reference)
                for fixed in self.site.fixed.values()
            )

    @abstractmethod
    def copy(self, pool: Path, room: Path) -> None:
        """To `copy` in this folder."""


class Tar(WholePool):
    """`tar -S`."""

    may_see = frozenset({"ETIMEDOUT", SHRANK})

    def copy(self, pool: Path, room: Path) -> None:
        """It asks for holes."""
        (room / "copy").mkdir()
        try:
            self.site.programs.run("tar", "-S", "-C", pool, "-cf", room / "archive", ".")
        except FailedError as error:
            if SHRANK in str(error):
                raise FailedError([SHRANK], str(error)) from error
            raise
        self.site.programs.run("tar", "-C", room / "copy", "-xf", room / "archive")


class Rsync(WholePool):
    """`rsync -a`."""

    def copy(self, pool: Path, room: Path) -> None:
        """It reads by large reads, in order."""
        self.site.programs.run("rsync", "-a", f"{pool}/", f"{room}/copy/")


class Restic(WholePool):
    """`restic backup` and `restic check`, and what it then restores."""

    may_see = frozenset({"ETIMEDOUT", LOST})

    def copy(self, pool: Path, room: Path) -> None:
        """To a new repository each time, so that it reads everything."""
        environment = os.environ | {"RESTIC_REPOSITORY": f"{room}/repository", "RESTIC_PASSWORD": "secret"}
        run = self.site.programs.run
        run("restic", "init", environment=environment)
        try:
            run("restic", "--no-cache", "backup", ".", folder=pool, environment=environment)
        except FailedError as error:
            if LOST in str(error):
                raise FailedError([LOST], str(error)) from error
            raise
        run("restic", "--no-cache", "check", "--read-data", environment=environment)
        run("restic", "--no-cache", "restore", "latest", "--target", room / "copy", environment=environment)


class Ls(Reader):
    """`ls -lR`: all images, each with its size."""

    def round(self) -> int:
        """One listing. Images of the other pool come and go while it runs."""
        try:
            said = self.site.programs.run("env", "LC_ALL=C", "ls", "-lR", self.site.mount.path)
        except FailedError as error:
            self._raise_unless_vanished(error)
            return 0
        sizes = {name: int(size) for size, name in LISTED.findall(said.decode())}
        for fixed in self.site.fixed.values():
            if sizes.get(fixed.name) != fixed.size:
                raise WrongError(f"ls: {fixed.name} has not {fixed.size} bytes:\n{said.decode()}")
        return 0

    def _raise_unless_vanished(self, error: FailedError) -> None:
        complaints = [line for line in str(error).splitlines() if "ls: " in line]
        for line in complaints:
            if f"/{CHANGING_POOL}/" not in line or not errnos_in(line) <= VANISHED:
                raise error
        if not complaints:
            raise error
