"""Opens /dev/fuse, mounts it and unmounts it: as root by mount(2), else through fusermount3."""

import ctypes
import errno
import logging
import os
import re
import select
import socket
import stat
import subprocess
from contextlib import ExitStack, suppress
from mmap import PAGESIZE
from pathlib import Path

from rbdfs.errors import MountError
from rbdfs.fuse.mount_options import FLAGS, FUSERMOUNT3_FLAGS, LABELS, OPPOSITES, FuseOptions
from rbdfs.fuse.mountinfo import MountInfo, mounted_on, mountinfo

log = logging.getLogger(__name__)

TYPE = "fuse.rbdfs"
"""The file system type that `mount`, `df -T` and /proc/mounts show."""

MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

NO_DEVICE = "there is no /dev/fuse; load it with: modprobe fuse (a container needs --device /dev/fuse)"
DENIED_DEVICE = "/dev/fuse may not be opened; a container needs --device /dev/fuse"
OPEN_REASONS = {
    **dict.fromkeys((errno.ENOENT, errno.ENODEV, errno.ENXIO), NO_DEVICE),
    **dict.fromkeys((errno.EACCES, errno.EPERM), DENIED_DEVICE),
}

DENIED_MOUNT = "the kernel permits no mount; a container needs --cap-add SYS_ADMIN --security-opt apparmor=unconfined"
BAD_OPTIONS = "the kernel does not take one of these options: OPTIONS; leave out what you gave after -o"
MOUNT_REASONS = {
    errno.EPERM: DENIED_MOUNT,
    errno.EACCES: DENIED_MOUNT,
    errno.EINVAL: BAD_OPTIONS,
}

NOT_YOURS = "without root, the mount point must be yours and writable; choose a directory of your own"
FUSERMOUNT3_REASONS = {
    "fuse device not found": NO_DEVICE,
    "failed to open /dev/fuse": "this user may not open /dev/fuse; permit it with: chmod 0666 /dev/fuse",
    "'user_allow_other' is set": "allow_other without root needs the line user_allow_other in /etc/fuse.conf",
    "not owned by user": NOT_YOURS,
    "no write access to mountpoint": NOT_YOURS,
    "failed to open /etc/mtab": "fusermount3 reads /etc/mtab; make it with: ln -s /proc/self/mounts /etc/mtab",
    "could not determine username": "fusermount3 needs a name for this user; add one to /etc/passwd",
    "mount failed: Operation not permitted": "fusermount3 may not mount; make it setuid root with: "
    "chmod u+s $(command -v fusermount3), and see that no_new_privs is off; a container needs --cap-add SYS_ADMIN",
    "mount failed: Invalid argument": BAD_OPTIONS,
}
"""Parts of fusermount3's messages on stderr (libfuse's util/fusermount.c), and what to do about them."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def check_mountpoint(mountpoint: Path) -> None:
    """Raise MountError, with what to do about it, if nothing can be mounted there."""
    shown = printable(mountpoint)
    free = f"{'umount' if os.geteuid() == 0 else 'fusermount3 -u'} {shown}"
    try:
        found = mounted_on(Path(os.path.realpath(mountpoint)))
        # statvfs, since stat() of a dead mount can still come from the kernel's cache. But on an automount point it
        # would wait for the very mount that we are asked to make.
        if found is None or found.type != "autofs":
            os.statvfs(mountpoint)
        mode = mountpoint.stat().st_mode
    except FileNotFoundError:
        raise MountError(f"{shown} does not exist; make it with: mkdir -p {shown}", errno.ENOENT) from None
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            raise MountError(
                f"{shown} is a dead mount, left by a process that was killed; free it with: {free}"
            ) from None
        raise MountError(f"cannot use {shown}: {error.strerror}", error.errno) from None
    if not stat.S_ISDIR(mode):
        raise MountError(f"{shown} is not a directory", errno.ENOTDIR)
    if found is not None and found.type == TYPE:
        raise MountError(f"{shown} is an rbdfs mount already; end it with: {free}", errno.EBUSY)


class Mount:
    """A mounted file system. No method sends it a request, so its own server may call them."""

    def __init__(self, device: int, mountpoint: Path, fusermount3: ExitStack) -> None:
        self.device = device
        """The descriptor of /dev/fuse: non-blocking, close-on-exec; -1 after `unmount`."""
        self.mountpoint = mountpoint
        """Absolute, without symbolic links."""
        self._fusermount3 = fusermount3
        self._mounted = mounted_on(mountpoint)

    def device_number(self) -> tuple[int, int] | None:
        """(major, minor) of the file system; None if it is unmounted."""
        found = None if self.device < 0 or _is_disconnected(self.device) else self._find()
        return found.device_number if found else None

    def reachable(self) -> Path | None:
        """Return the path where it can be reached now; None if it is covered, or unmounted lazily while in use."""
        try:
            found = None if self.device < 0 or _is_disconnected(self.device) else self._find()
            path = Path(os.fsdecode(found.path)) if found else None
            return path if path and found == mounted_on(path) else None
        except OSError:
            return None

    def unmount(self) -> None:
        """Close the device, so that waiting readers get an error; then unmount lazily, unless somebody else has.

        Never raises; logs a warning if the file system stays mounted.
        """
        if self.device < 0:
            return
        # Numbers are reused: once it is unmounted, another mount may have its path, its id and its device number.
        was_disconnected = _is_disconnected(self.device)
        os.close(self.device)
        self.device = -1
        with self._fusermount3:
            reason = None if was_disconnected else self._unmount()
        if reason:
            free = f"{'umount -l' if os.geteuid() == 0 else 'fusermount3 -u -z'} {printable(self.mountpoint)}"
            log.warning("cannot unmount %s: %s; free it with: %s", printable(self.mountpoint), reason, free)

    def _unmount(self) -> str | None:
        """Return the reason if it stays mounted."""
        try:
            found = self._find()
            if found is None:  # somebody unmounted it lazily, and somebody still uses it
                return None
            if found != mounted_on(Path(os.fsdecode(found.path))):
                return "something else is mounted over it"
            reason = _unmount(found.path)
            return reason if self._find() else None
        except OSError as error:
            return error.strerror or str(error)

    def _find(self) -> MountInfo | None:
        """Find the mount now: its path changes if somebody renames a directory above it."""
        was = self._mounted
        return next((entry for entry in mountinfo() if was is not None and entry[:2] == was[:2]), None)


def mount(mountpoint: Path, options: FuseOptions) -> Mount:
    """Mount. Raises MountError; then nothing stays behind."""
    try:
        path = Path(os.path.realpath(mountpoint, strict=True))
        if os.geteuid() == 0 and not options.auto_unmount:
            device, fusermount3 = _mount(os.fsencode(path), options), ExitStack()
        else:
            device, fusermount3 = _mount_by_fusermount3(os.fsencode(path), options)
        try:
            return Mount(device, path, fusermount3)
        except OSError:
            with fusermount3:
                os.close(device)
                _unmount(os.fsencode(path))
            raise
    except OSError as error:
        given = ",".join([*sorted(options.flags), *options.kernel])
        reason = str(error.strerror).replace("OPTIONS", given)
        raise MountError(f"cannot mount {printable(mountpoint)}: {reason}", error.errno) from error


def _mount(path: bytes, options: FuseOptions) -> int:
    """Call mount(2) and return the descriptor of /dev/fuse. Raises OSError with the reason in a sentence."""
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, OPEN_REASONS.get(error.errno or 0, f"/dev/fuse: {error.strerror}")) from error
    try:
        numbers = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
        data = os.fsencode(",".join([numbers, *options.kernel]))
        if len(data) >= PAGESIZE:  # the kernel would cut them off
            raise OSError(errno.E2BIG, f"the options are longer than {PAGESIZE} bytes; leave some out")
        source, kind = os.fsencode(options.fsname), os.fsencode(f"fuse.{options.subtype}")
        if _libc.mount(source, path, kind, sum(FLAGS[flag] for flag in options.flags), data):
            number = ctypes.get_errno()
            raise OSError(number, MOUNT_REASONS.get(number, os.strerror(number)))
    except BaseException:
        os.close(device)
        raise
    return device


def _mount_by_fusermount3(path: bytes, options: FuseOptions) -> tuple[int, ExitStack]:
    """Return the descriptor, and how to end the fusermount3 that auto_unmount leaves running. Raises as `_mount`."""
    if any(option.startswith(LABELS) for option in options.kernel):
        raise OSError(errno.EPERM, f"the options {', '.join(LABELS)} need root, and go without auto_unmount")
    if options.auto_unmount and os.geteuid() and "allow_other" not in options.kernel:
        # fusermount3 looks into the dead mount as root, whom FUSE does not let in.
        log.warning("auto_unmount without root works only together with allow_other")
    with ExitStack() as stack:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        stack.enter_context(ours)
        with theirs:
            process = stack.enter_context(
                _fusermount3(["-o", _fusermount3_options(options), "--", path], theirs.fileno())
            )
        stack.callback(ours.close)
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        if not descriptors:
            raise OSError(errno.EPERM, _said(process))
        os.set_inheritable(descriptors[0], False)  # recv_fds passes no flags on (Python 3.11)
        os.set_blocking(descriptors[0], False)
        if options.auto_unmount:
            # When its socket closes it unmounts a dead mount of this type there, which may be somebody else's.
            stack.callback(_kill, process)
            return descriptors[0], stack.pop_all()
        return descriptors[0], ExitStack()


def _fusermount3_options(options: FuseOptions) -> str:
    flags = [flag for flag in FUSERMOUNT3_FLAGS if flag in options.flags]
    allowed = [flag for flag in ("suid", "dev") if OPPOSITES[flag] not in options.flags]
    fsname, subtype = (re.sub(r"([,\\])", r"\\\1", name) for name in (options.fsname, options.subtype))
    stays = ["auto_unmount"] if options.auto_unmount else []
    return ",".join([*flags, *allowed, *options.kernel, f"fsname={fsname}", f"subtype={subtype}", *stays])


def _fusermount3(arguments: list[str | bytes], socket_fd: int | None = None) -> subprocess.Popen[bytes]:
    """Start it in a session of its own, so that a Ctrl-C does not end it. Raises OSError as `_mount`."""
    environment = os.environ if socket_fd is None else os.environ | {"_FUSE_COMMFD": str(socket_fd)}
    try:
        return subprocess.Popen(
            ["fusermount3", *arguments],
            env=environment,
            pass_fds=() if socket_fd is None else (socket_fd,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise OSError(error.errno, "fusermount3 is missing: apt install fuse3") from error
    except OSError as error:
        raise OSError(error.errno, f"fusermount3 cannot be run: {error.strerror}") from error


def _said(process: subprocess.Popen[bytes]) -> str:
    """Return in one line why it failed."""
    _, stderr = process.communicate()
    said = os.fsdecode(stderr)
    for part, reason in FUSERMOUNT3_REASONS.items():
        if part in said:
            return reason
    said = printable(" ".join(said.replace("fusermount3: ", "").split()))
    return said or f"fusermount3 ended with status {process.returncode}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(PermissionError):
        process.kill()


def _unmount(path: bytes) -> str | None:
    """Unmount lazily. Return the reason if that fails. Raises OSError if fusermount3 cannot be run."""
    if os.geteuid() == 0:
        failed = _libc.umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW)
        return os.strerror(ctypes.get_errno()) if failed else None
    with _fusermount3(["-u", "-z", "-q", "--", path]) as process:
        return _said(process) if process.wait() else None


def _is_disconnected(device: int) -> bool:
    """Return whether it was unmounted, or aborted in /sys/fs/fuse/connections."""
    poll = select.poll()
    poll.register(device, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def printable(text: object) -> str:
    """Return a text in one line, with only characters that every terminal and log takes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in str(text))
