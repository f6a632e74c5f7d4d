"""A file system in an image: checked, and its files compared."""

import contextlib
import subprocess
from pathlib import Path
from typing import ClassVar

from tests.cluster import wait_until
from tests.soak.fixed import DISK, compare
from tests.soak.ledger import FailedError
from tests.soak.reader import Reader


class LoopMount(Reader):
    """`e2fsck -n` of a read-only loop device, and a read-only mount of it."""

    may_see: ClassVar[frozenset[str]] = frozenset({"ETIMEDOUT", "EIO", "EBADMSG", "EUCLEAN", "e2fsck", "mount"})
    """A block device has no ETIMEDOUT of a file: it is EIO there, and the programs say it in words of their own."""

    def round(self) -> int:
        """All files of the file system."""
        run = self.site.programs.run
        with self.site.room(self.name) as room, contextlib.ExitStack() as stack:
            image = self.site.path(self.site.fixed[DISK])
            device = run("losetup", "--find", "--show", "--read-only", image).decode().strip()
            stack.callback(undo, "losetup", "--detach", device)
            for program in (("e2fsck", "-fn", device), ("mount", "-t", "ext4", "-o", "ro,noload", device, room)):
                try:
                    run(*program)
                except FailedError as error:
                    raise FailedError([program[0]], str(error)) from error
            stack.callback(undo, "umount", room)
            return self._compare(room)

    def _compare(self, inside: Path) -> int:
        names = [path.relative_to(self.site.files) for path in self.site.files.rglob("*") if path.is_file()]
        return sum(compare(f"{name} in a loop mount", inside / name, self.site.files / name) for name in names)


def undo(*command: str | Path) -> None:
    """Also if all is called off, or if it is busy for a moment."""
    wait_until(lambda: subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0, 60)
