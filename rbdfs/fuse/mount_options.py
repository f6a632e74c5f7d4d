"""Parses the options after `-o` that are not rbdfs's own: flags of mount(2), options of FUSE, names, fstab. Pure."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from rbdfs.errors import UsageError

FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "sync": 1 << 4, "dirsync": 1 << 7, "noatime": 1 << 10} | {
    name: 1 << bit for name, bit in (("nodiratime", 11), ("relatime", 21), ("strictatime", 24), ("lazytime", 25))
}
"""Options that mount(2) takes as bits (linux/mount.h)."""

OPPOSITES = {"async": "sync"} | {
    **{name[2:]: name for name in ("nosuid", "nodev", "noexec", "noatime", "nodiratime")},
    **{f"no{name}": name for name in ("relatime", "strictatime", "lazytime")},
}
"""Options that switch off one of FLAGS."""

FUSERMOUNT3_FLAGS = ("ro", "nosuid", "nodev", "noexec", "sync", "dirsync", "noatime")
"""Those that fusermount3 3.14 knows. The others change nothing: a read-only mount does not update access times."""

LABELS = ("context", "fscontext", "defcontext", "rootcontext")
"""SELinux's options. fusermount3 does not take them."""

VALUES = {"fsname": "NAME", "subtype": "NAME", "max_read": "BYTES", **dict.fromkeys(LABELS, "LABEL")}
"""Options that take a value, and the kind of value."""

IGNORED = re.compile(
    "(no)?(auto|user|users|owner|group|fail|bootwait)|defaults|_netdev|silent|loud|nonempty"
    "|(x-|X-|comment=|user=|helper=|uhelper=).*",
    re.DOTALL,
)
"""Options in fstab for mount(8), systemd and others, and options that are always on."""


@dataclass(frozen=True, slots=True)
class FuseOptions:
    """The options after `-o`, sorted by where they go."""

    flags: frozenset[str] = frozenset({"ro", "nosuid", "nodev"})
    """Names of FLAGS."""
    kernel: tuple[str, ...] = ("default_permissions",)
    """For the kernel's FUSE, unchanged: allow_other, max_read=131072."""
    fsname: str = "rbdfs"
    """The source that `mount` and `df` show."""
    subtype: str = "rbdfs"
    """The type, after its "fuse."."""
    auto_unmount: bool = False
    """fusermount3 stays, and unmounts if this process is killed."""


def parse_options(options: Iterable[str]) -> FuseOptions:
    """Sort the options after `-o` that are not rbdfs's own. Raises UsageError that names an option nobody knows."""
    default = FuseOptions()
    flags = set(default.flags)
    kernel = {option: option for option in default.kernel}
    names = {"fsname": default.fsname, "subtype": default.subtype}
    auto_unmount = False
    for option in options:
        name, _, value = option.partition("=")
        if option == "rw":
            raise UsageError("images are shown read-only: there is no -o rw")
        if option in FLAGS:
            flags.add(option)
        elif option in OPPOSITES:
            flags.discard(OPPOSITES[option])
        elif option in ("allow_other", "default_permissions"):
            kernel[option] = option
        elif option == "auto_unmount":
            auto_unmount = True
        elif name in VALUES:
            if not value or (name == "max_read" and not re.fullmatch("[0-9]+", value)):
                raise UsageError(f"the mount option {name} takes a value: {name}={VALUES[name]}")
            if name in names:
                names[name] = value
            else:  # a label with a comma must be quoted
                kernel[name] = f'{name}="{value}"' if "," in value and value[0] != '"' else option
        elif not IGNORED.fullmatch(option):
            raise UsageError(f"unknown mount option {name}; see rbdfs mount --help, for FUSE's own man mount.fuse3")
    return FuseOptions(frozenset(flags), tuple(kernel.values()), names["fsname"], names["subtype"], auto_unmount)
