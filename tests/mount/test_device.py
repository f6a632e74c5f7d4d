"""Callers that are hostile, unusual or killed, and mounts that are torn away: nobody hangs, and the mount lives on."""

import ctypes
import errno
import fcntl
import mmap
import os
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest
import rbd

from rbdfs.ceph.bindings.encoding import encode_string
from rbdfs.ceph.metadata import header
from tests.cluster import CHECKOUT, MIB, READ_ONLY_CAPS, Ceph, Mount, random_bytes, wait_until
from tests.mount.test_mounting import NOBODY, become, bind, call, in_a_child

P = ParamSpec("P")
T = TypeVar("T")
Mounts = Callable[..., Mount]

KIB = 1024
LAYERING = rbd.RBD_FEATURE_LAYERING
PROMPT_SECONDS = 10.0
"""A call that nothing holds up returns within this, on a busy machine."""
STOP_SECONDS = 5.0
"""Within this a mount ends."""
CLOSE_SECONDS = 2.0
"""How long a close() may wait to hear whether the image is still there (open_image.FLUSH_SECONDS)."""
LOAD_SECONDS = 8.0
"""How long what is hostile goes on."""

OSD_TIMEOUT = 8
"""Seconds; librados takes whole ones."""
LATE_SECONDS = 1.8 * OSD_TIMEOUT
"""Who waits for the deadline of another, and then for its own, waits longer."""
GROWTH_BYTES = 8 * MIB
"""What a process may have grown by in 1,000 opens, with the caches of libraries and the gaps in a heap. Seen: 3 MB, and
after 6,000 opens no more. Of an image that librbd has open, each time would add 0.4 MiB."""

PIPE_MAX_SIZE = Path("/proc/sys/fs/pipe-max-size")
LARGE_PIPE = 4 * MIB
"""With 2 MiB and more, libfuse receives what is longer than a page by splice, also for other users than root."""

ATTRIBUTE_BYTES = 64 * KIB
"""The longest value that the kernel takes and gives (XATTR_SIZE_MAX)."""
IOCTL_BYTES = (8 * KIB, 16 * KIB - 1)
"""The second is the most that an ioctl's number can tell."""
WRITES, READS = 1, 2
"""Of an ioctl: directions, as seen by the caller (asm-generic/ioctl.h)."""
MANY = 2000
"""Images, of which the names fill several listings, and the FORGETs one message of 32 KiB."""

GONE = {errno.ENOTCONN, errno.ECONNABORTED}
"""What a call gets of a mount that is no longer served."""

MNT_FORCE, MNT_DETACH = 1, 2
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32

_libc = ctypes.CDLL(None, use_errno=True)


class Calls:
    """Calls into a mount, from threads. One that hangs there cannot be killed, but the mount can: then it fails."""

    def __init__(self, mount: Mount, threads: ThreadPoolExecutor) -> None:
        self._mount = mount
        self._threads = threads
        self._started: list[Future[object]] = []

    def start(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Call it in a thread."""
        future = self._threads.submit(function, *args, **kwargs)
        self._started.append(future)  # type: ignore[arg-type]
        return future

    def result(self, future: "Future[T]", seconds: float = PROMPT_SECONDS) -> T:
        """What it returns or raises, within this time."""
        if not wait([future], seconds).done:
            self._end("a call hangs")
        return future.result()

    def do(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it, and fail if it takes long."""
        return self.result(self.start(function, *args, **kwargs))

    def errno_of(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> int:
        """The error of a call that must fail."""
        with pytest.raises(OSError) as caught:  # noqa: PT011  (the errno is what is looked at)
            self.do(function, *args, **kwargs)
        return caught.value.errno or 0

    def close(self) -> None:
        """All that was started has returned."""
        if wait(self._started, PROMPT_SECONDS).not_done:
            self._end("calls hang at the end")

    def _end(self, reason: str) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._mount.pid, signal.SIGKILL)
        pytest.fail(f"{reason}; {self._mount.log}")


@contextmanager
def calling(mount: Mount, threads: int = 16) -> Iterator[Calls]:
    """Calls into a mount, all of which must have returned at the end."""
    with ThreadPoolExecutor(threads) as executor:
        calls = Calls(mount, executor)
        try:
            yield calls
        except BaseException:
            with suppress(ProcessLookupError):
                os.kill(mount.pid, signal.SIGKILL)
            raise
        calls.close()


def waits_for_a_mount(process: int | str) -> bool:
    """Whether a process, or thread (self/task/TID), waits for a request to a mount, or for a page of one."""
    try:
        return re.search("fuse|folio_wait|wait_on_page", Path(f"/proc/{process}/stack").read_text()) is not None
    except (FileNotFoundError, ProcessLookupError):
        return False


def threads_that_wait() -> int:
    """How many of this process's threads wait for a mount."""
    return sum(waits_for_a_mount(f"self/task/{thread}") for thread in os.listdir("/proc/self/task"))


@contextmanager
def without_osd(ceph: Ceph) -> Iterator[None]:
    """No OSD answers."""
    ceph.devcluster.kill_daemon("osd.0")
    try:
        yield
    finally:
        ceph.devcluster.start_daemon("osd.0")


def read_direct(file: int, offset: int, length: int = 4 * KIB) -> bytes:
    """By direct I/O: one request, of just this."""
    with mmap.mmap(-1, length) as buffer:
        return buffer[: os.preadv(file, [buffer], offset)]


@contextmanager
def opened(path: Path | str, flags: int = 0) -> Iterator[int]:
    """A descriptor; that close() fails once the mount is gone says nothing."""
    file = os.open(path, os.O_RDONLY | flags)
    try:
        yield file
    finally:
        with suppress(OSError):
            os.close(file)


class Load:
    """Readers of one file, three here and there by direct I/O, two from end to end; each reads until an error."""

    def __init__(self, calls: Calls, path: Path, content: bytes) -> None:
        self.reads = 0
        self.wrong: list[int] = []
        self.errors: list[int] = []
        self._stop = threading.Event()
        self._path = path
        self._content = content
        self._calls = calls
        self._readers = [
            *(calls.start(self._read, os.O_DIRECT, self._here_and_there(seed)) for seed in range(3)),
            *(calls.start(self._read, 0, self._end_to_end()) for _ in range(2)),
        ]
        wait_until(lambda: self.reads > 50)

    def end(self) -> None:
        """Stop, and wait for all readers."""
        self._stop.set()
        self.wait()

    def wait(self) -> None:
        """All readers come to an end, each by itself if they were not stopped."""
        for reader in self._readers:
            self._calls.result(reader)

    def _here_and_there(self, seed: int) -> Iterator[tuple[int, int]]:
        chance = random.Random(seed)
        while True:
            yield chance.randrange(len(self._content) // (4 * KIB)) * 4 * KIB, 4 * KIB

    def _end_to_end(self) -> Iterator[tuple[int, int]]:
        while True:
            yield from ((offset, 256 * KIB) for offset in range(0, len(self._content), 256 * KIB))

    def _is_cut_off_by_an_error(self, file: int, offset: int, data: bytes) -> bool:
        """Whether a read() has returned the pages that were there, as the kernel does, and the next one fails."""
        end = offset + len(data)
        try:
            os.pread(file, 1, end)
        except OSError as error:
            self.errors.append(error.errno or 0)
            return len(data) > 0 and data == self._content[offset:end]
        return False

    def _read(self, flags: int, ranges: Iterator[tuple[int, int]]) -> None:
        try:
            with opened(self._path, flags) as file:
                self._read_all(file, flags, ranges)
        except OSError as error:  # also of the open(), for a reader that begins when all is over
            self.errors.append(error.errno or 0)

    def _read_all(self, file: int, flags: int, ranges: Iterator[tuple[int, int]]) -> None:
        for offset, length in ranges:
            data = read_direct(file, offset, length) if flags else os.pread(file, length, offset)
            if data != self._content[offset : offset + length]:
                if not self._is_cut_off_by_an_error(file, offset, data):
                    self.wrong.append(offset)
                return
            self.reads += 1
            if self._stop.is_set():
                return


def last_error() -> OSError:
    """What a function of the C library has failed with."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def ioctl(file: int, direction: int, length: int) -> None:
    """One that nobody knows, with so many bytes. (With so many, fcntl.ioctl holds the GIL: what hangs hangs us all.)"""
    number = ctypes.c_ulong(direction << 30 | length << 16 | 0x7201)
    if _libc.ioctl(file, number, ctypes.create_string_buffer(length)):
        raise last_error()


def attribute(path: Path, name: str) -> bytes:
    """getxattr(2) into the largest buffer; os.getxattr begins with a small one."""
    buffer = ctypes.create_string_buffer(ATTRIBUTE_BYTES)
    length = _libc.getxattr(os.fsencode(path), name.encode(), buffer, ATTRIBUTE_BYTES)
    if length < 0:
        raise last_error()
    return buffer.raw[:length]


def attribute_names(path: Path) -> bytes:
    """As `attribute`."""
    buffer = ctypes.create_string_buffer(ATTRIBUTE_BYTES)
    length = _libc.listxattr(os.fsencode(path), buffer, ATTRIBUTE_BYTES)
    if length < 0:
        raise last_error()
    return buffer.raw[:length]


def remount(mount: Mount, flags: int) -> None:
    """Mount with other flags. The kernel forgets, first of all, every inode there that nobody uses. Root only."""
    call("mount", None, os.fsencode(mount.path), None, MS_REMOUNT | MS_NOSUID | MS_NODEV | flags, None)


def forget_all_at_once(mount: Mount) -> None:
    """Have the kernel forget what it has looked up; the mount is told when all of it is forgotten, in one message."""
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        remount(mount, MS_RDONLY)
    finally:
        os.kill(mount.pid, signal.SIGCONT)


@pytest.fixture
def large_pipes() -> Iterator[None]:
    """Pipes that may be large, for other users as well; one run of tests at a time, since it is the machine's."""
    with PIPE_MAX_SIZE.open() as setting:
        fcntl.flock(setting, fcntl.LOCK_EX)
        before = setting.read()
        PIPE_MAX_SIZE.write_text(str(LARGE_PIPE))
        try:
            yield
        finally:
            PIPE_MAX_SIZE.write_text(before)


@pytest.fixture(scope="module")
def many_images(ceph: Ceph) -> Iterator[str]:
    """A pool with so many images, empty ones; made by what librbd would ask of an OSD, all at once (cls_rbd.h)."""
    pool = ceph.unique("many")
    ceph.make_pool(pool)
    with ceph.ioctx(pool) as ioctx:
        completions = []
        for number in range(MANY):
            image_id = f"{number:08x}"
            create = (
                struct.pack("<QBQ", 0, 22, LAYERING) + encode_string(f"rbd_data.{image_id}") + struct.pack("<q", -1)
            )
            entry = encode_string(f"image{number}") + encode_string(image_id)
            completions.append(ioctx.aio_execute(header.object_name(image_id), "rbd", "create", create))
            completions.append(ioctx.aio_execute("rbd_directory", "rbd", "dir_add_image", entry))
        for completion in completions:
            completion.wait_for_complete()
            assert completion.get_return_value() == 0
    yield pool
    ceph.remove_pool(pool)


def test_large_requests_of_any_user_and_thousands_of_forgets_hold_nobody_up(
    ceph: Ceph, mounts: Mounts, large_pipes: None, many_images: str
) -> None:
    name, content = ceph.unique("hostile"), random_bytes(48 * MIB)
    ceph.make_image(name, content)
    ceph.run("rbd", "image-meta", "set", f"rbd/{name}", "long", "v" * ATTRIBUTE_BYTES)
    mount = mounts()
    path, folder = mount.image(name), mount.path / "rbd"
    names = {f"image{number}" for number in range(MANY)}
    rounds = 0
    with calling(mount) as calls, opened(path) as file, opened(folder) as directory:
        load = Load(calls, path, content)
        load_also = Load(calls, path, content)
        end = time.monotonic() + LOAD_SECONDS
        while time.monotonic() < end or rounds < 3:
            for length in IOCTL_BYTES:
                for direction in (0, WRITES, READS, WRITES | READS):
                    for descriptor in (file, directory):
                        assert calls.errno_of(ioctl, descriptor, direction, length) == errno.ENOTTY
            assert calls.do(attribute, path, "user.rbd.object_size") == str(4 * MIB).encode()
            assert calls.do(attribute, path, "user.rbd.meta.long") == b"v" * ATTRIBUTE_BYTES
            assert b"user.rbd.features\0" in calls.do(attribute_names, path)
            assert calls.do(attribute_names, folder) == b""
            assert calls.errno_of(attribute, folder, "user.x") == errno.ENODATA
            assert calls.errno_of(os.setxattr, path, "user.x", bytes(ATTRIBUTE_BYTES)) == errno.EROFS
            listed = calls.do(
                lambda: {entry.name: entry.stat().st_size for entry in os.scandir(mount.path / many_images)}
            )
            assert listed == dict.fromkeys(names, 0)
            forget_all_at_once(mount)
            rounds += 1
        load.end()
        load_also.end()
        assert not load.wrong + load_also.wrong
        assert not load.errors + load_also.errors
        assert calls.do(path.read_bytes) == content


def refusals(path: Path) -> dict[str, Callable[[], object]]:
    """What would change a file, or its folder."""
    folder, new = path.parent, path.parent / "new"
    return {
        "setxattr": lambda: os.setxattr(path, "user.x", bytes(ATTRIBUTE_BYTES)),
        "removexattr": lambda: os.removexattr(path, "user.x"),
        "open for writing": lambda: os.open(path, os.O_WRONLY | os.O_APPEND),
        "create": lambda: os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY),
        "tmpfile": lambda: os.open(folder, os.O_TMPFILE | os.O_RDWR),
        "truncate": lambda: os.truncate(path, 0),
        "chmod": lambda: path.chmod(0o777),
        "chown": lambda: os.chown(path, 1, 1),
        "utime": lambda: os.utime(path, (0, 0)),
        "unlink": path.unlink,
        "rename": lambda: path.rename(folder / ("x" * 255)),
        "link": lambda: new.hardlink_to(path),
        "symlink": lambda: new.symlink_to("x" * 4095),
        "mkdir": new.mkdir,
        "rmdir": folder.rmdir,
        "mknod": lambda: os.mknod(new),
        "mkfifo": lambda: os.mkfifo(new),
    }


def test_whatever_a_program_asks_of_a_file_is_answered(ceph: Ceph, mount: Mount) -> None:
    name, content = ceph.unique("asked"), random_bytes(MIB)
    ceph.make_image(name, content)
    path, folder = mount.image(name), mount.path / "rbd"
    with calling(mount) as calls, opened(path) as file, opened(folder) as directory:
        is_readable = select.POLLIN | select.POLLOUT

        def poll(descriptor: int) -> list[tuple[int, int]]:
            polling = select.poll()
            polling.register(descriptor, is_readable)
            return polling.poll(0)

        def mapped() -> bytes:
            with mmap.mmap(file, MIB, prot=mmap.PROT_READ) as view:
                return view[:]

        for descriptor in (file, directory):
            assert calls.do(poll, descriptor) == [(descriptor, is_readable)]
            calls.do(os.fsync, descriptor)
            calls.do(os.fdatasync, descriptor)
            assert calls.do(_libc.syncfs, descriptor) == 0
            calls.do(fcntl.flock, descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert calls.errno_of(os.ftruncate, descriptor, 0) == errno.EINVAL
            assert calls.errno_of(os.lseek, descriptor, 0, 5) == errno.EINVAL
            for number in (0x80086601, 0xC0185879, 0x12345678):  # FS_IOC_GETFLAGS (lsattr), FITRIM, unknown
                assert calls.errno_of(fcntl.ioctl, descriptor, number, bytearray(256)) == errno.ENOTTY
        calls.do(fcntl.lockf, file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        calls.do(os.posix_fadvise, file, 0, MIB, os.POSIX_FADV_WILLNEED)
        assert calls.do(_libc.readahead, file, ctypes.c_long(0), ctypes.c_size_t(MIB)) == 0
        assert calls.do(mapped) == content
        assert calls.do(os.preadv, file, [bytearray(1) for _ in range(1024)], 5) == 1024
        assert calls.do(os.pread, file, 10, 2**62) == b""
        for offset in (MIB, 2**40 + 1, 2**63 - 1):
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                assert calls.errno_of(os.lseek, file, offset, whence) == errno.ENXIO
        with tempfile.TemporaryFile() as copy:
            assert calls.do(os.sendfile, copy.fileno(), file, 0, MIB) == MIB
            assert os.pread(copy.fileno(), MIB, 0) == content
        read, write = os.pipe()
        try:
            assert calls.do(os.splice, file, write, 4096, offset_src=4096) == 4096
            assert os.read(read, 4096) == content[4096:8192]
        finally:
            os.close(read)
            os.close(write)
        assert calls.errno_of(os.readlink, path) == errno.EINVAL
        assert calls.errno_of(os.listdir, path) == errno.ENOTDIR
        assert calls.errno_of(os.open, path, os.O_DIRECTORY) == errno.ENOTDIR
        assert calls.errno_of(os.stat, folder / ("x" * 255)) == errno.ENOENT
        assert calls.errno_of(os.stat, folder / ("x" * 256)) in {errno.ENOENT, errno.ENAMETOOLONG}
        with opened(path, os.O_PATH) as handle:
            assert calls.do(os.fstat, handle).st_size == MIB
        for what, refused in refusals(path).items():
            assert calls.errno_of(refused) == errno.EROFS, what
        # Root can mount it writable all the same; then what writes comes through, to be refused.
        remount(mount, 0)
        for what, refused in refusals(path).items():
            assert calls.errno_of(refused) in {errno.EROFS, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP, errno.EBUSY}, (
                what
            )
        assert calls.do(path.read_bytes) == content
    assert ceph.exported(name) == content


READER = """
import mmap, os, sys
flags, offset = os.O_DIRECT if sys.argv[2] == "direct" else 0, int(sys.argv[3])
file = os.open(sys.argv[1], os.O_RDONLY | flags)
print("opened", flush=True)
sys.stdin.readline()
os.preadv(file, [mmap.mmap(-1, 4096)], offset)
"""


@contextmanager
def reader(path: Path, way: str, offset: int) -> Iterator["subprocess.Popen[str]"]:
    """A process that has opened a file, and reads 4 KiB there when it is told a line."""
    command = [sys.executable, "-I", "-c", READER, str(path), way, str(offset)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "opened\n"
            yield process
        finally:
            process.kill()


def test_a_reader_that_is_killed_while_it_waits_is_gone_at_once(ceph: Ceph, mounts: Mounts) -> None:
    mount = mounts("--osd-timeout", "30")
    name, content = ceph.unique("killed"), random_bytes(24 * MIB)
    ceph.make_image(name, content)
    ceph.resize_image(name, 32 * MIB)  # where the file ends is asked at each seek, where a known hole begins is not
    path = mount.image(name)
    with calling(mount) as calls, opened(path) as file, ExitStack() as readers:
        assert calls.do(os.lseek, file, 0, os.SEEK_HOLE) == len(content)
        cached, direct = (
            readers.enter_context(reader(path, way, offset))
            for way, offset in (("page cache", 12 * MIB), ("direct", 20 * MIB))
        )
        with without_osd(ceph):
            for process in (cached, direct):
                assert process.stdin is not None
                print(file=process.stdin, flush=True)
            wait_until(lambda: waits_for_a_mount(cached.pid) and waits_for_a_mount(direct.pid))
            cached.kill()
            direct.kill()
            # Its read ends at once; that its files are closed is what takes time.
            for process in (cached, direct):
                assert process.wait(CLOSE_SECONDS + STOP_SECONDS) == -signal.SIGKILL
            assert calls.do(os.lseek, file, MIB, os.SEEK_HOLE) == len(content)
            assert calls.do(attribute_names, mount.path) == b""
        assert calls.result(calls.start(path.read_bytes), 60) == content + bytes(8 * MIB)


def test_a_lazy_unmount_under_load_lets_readers_read_on_and_ends_with_the_last_close(ceph: Ceph, mount: Mount) -> None:
    name, content = ceph.unique("lazy"), random_bytes(32 * MIB)
    ceph.make_image(name, content)
    with calling(mount) as calls:
        load = Load(calls, mount.image(name), content)
        subprocess.run(["umount", "-l", mount.path], check=True, timeout=PROMPT_SECONDS)
        assert not mount.is_mounted
        reads = load.reads
        wait_until(lambda: load.reads > reads + 100)
        assert mount.is_running
        load.end()
    wait_until(lambda: not mount.is_running, STOP_SECONDS)
    assert (load.wrong, load.errors) == ([], [])


def test_a_forced_unmount_under_load_ends_the_process_and_every_read_with_an_error(ceph: Ceph, mount: Mount) -> None:
    name, content = ceph.unique("forced"), random_bytes(32 * MIB)
    ceph.make_image(name, content)
    with calling(mount) as calls:
        load = Load(calls, mount.image(name), content)
        subprocess.run(["umount", "-f", "-l", mount.path], check=True, timeout=PROMPT_SECONDS)
        load.wait()
    wait_until(lambda: not mount.is_running, STOP_SECONDS)
    assert not mount.is_mounted
    assert not load.wrong
    assert len(load.errors) == 5
    assert set(load.errors) <= GONE


@pytest.mark.parametrize("free", [["umount"], ["fusermount3", "-u"]], ids=["umount", "fusermount3"])
def test_a_mount_that_is_killed_under_load_leaves_nobody_hanging_and_can_be_freed(
    ceph: Ceph, mount: Mount, free: list[str]
) -> None:
    name, content = ceph.unique("shot"), random_bytes(32 * MIB)
    ceph.make_image(name, content)
    with calling(mount) as calls:
        load = Load(calls, mount.image(name), content)
        os.kill(mount.pid, signal.SIGKILL)
        load.wait()
        assert calls.errno_of(os.listdir, mount.path) in GONE
    assert not load.wrong
    assert len(load.errors) == 5
    assert set(load.errors) <= GONE
    subprocess.run([*free, mount.path], check=True, timeout=PROMPT_SECONDS)
    assert not mount.is_mounted
    assert os.listdir(mount.path) == []


@pytest.mark.parametrize("end", ["forced unmount", "SIGKILL"])
def test_whatever_waits_gets_an_error_when_its_mount_is_torn_away(ceph: Ceph, mount: Mount, end: str) -> None:
    mount.expect("WARNING", "ERROR")
    names = [ceph.unique("torn") for _ in range(3)]
    for name in names:
        ceph.make_image(name, random_bytes(16 * MIB), features=LAYERING)
    read, sought, asked = (mount.image(name) for name in names)
    with calling(mount) as calls, opened(read) as file, opened(read, os.O_DIRECT) as direct, opened(sought) as other:
        asked.stat()
        with without_osd(ceph):
            waiting: list[Future[object]] = [
                calls.start(os.pread, file, 4096, 12 * MIB),
                calls.start(read_direct, direct, 8 * MIB),
                calls.start(os.lseek, other, 4 * MIB, os.SEEK_HOLE),
                calls.start(attribute, asked, "user.rbd.features"),
                calls.start(os.listdir, mount.path / "rbd"),
            ]
            wait_until(lambda: threads_that_wait() == len(waiting))
            if end == "SIGKILL":
                os.kill(mount.pid, signal.SIGKILL)
            else:
                # A process that is started closes its copies of our descriptors, and each close() waits without an OSD.
                call("umount2", os.fsencode(mount.path), MNT_FORCE | MNT_DETACH)
            for each in waiting:
                with pytest.raises(OSError) as caught:  # noqa: PT011  (the errno is what is looked at)
                    calls.result(each)
                assert caught.value.errno in {*GONE, errno.EIO}  # EIO: a page of the page cache
            wait_until(lambda: not mount.is_running, STOP_SECONDS)


def test_reads_and_seeks_are_served_while_a_seek_waits_which_fails_in_the_end(ceph: Ceph, mounts: Mounts) -> None:
    # Through the page cache, a read asks for the file's size first, once a second.
    mount = mounts("--direct-io", "--osd-timeout", str(OSD_TIMEOUT))
    mount.expect("WARNING", "ERROR")
    name, other = ceph.unique("sought"), ceph.unique("beside")
    content = random_bytes(4 * MIB)
    for each in (name, other):
        ceph.make_image(each, content, features=LAYERING)
        ceph.resize_image(each, 16 * MIB)
    path = mount.image(name)
    with calling(mount) as calls, opened(path, os.O_DIRECT) as file, opened(mount.image(other)) as known:
        assert calls.do(os.lseek, known, 0, os.SEEK_HOLE) == 4 * MIB
        assert calls.do(read_direct, file, 2 * MIB, MIB) == content[2 * MIB : 3 * MIB]
        with without_osd(ceph):
            began = time.monotonic()
            waiting = calls.start(os.lseek, file, MIB, os.SEEK_HOLE)
            wait_until(lambda: threads_that_wait() == 1)
            assert calls.do(os.lseek, known, MIB, os.SEEK_HOLE) == 4 * MIB
            assert calls.do(read_direct, file, 2 * MIB, MIB) == content[2 * MIB : 3 * MIB]
            assert calls.do(attribute_names, mount.path) == b""
            assert not waiting.done()
            with pytest.raises(TimeoutError):
                calls.result(waiting, OSD_TIMEOUT + PROMPT_SECONDS)
            # librados's timer goes by a coarse clock, and may be a tick early.
            assert OSD_TIMEOUT - 0.1 < time.monotonic() - began < LATE_SECONDS

        def seeks_again() -> bool:
            try:
                return (
                    calls.result(calls.start(os.lseek, file, MIB, os.SEEK_HOLE), OSD_TIMEOUT + PROMPT_SECONDS)
                    == 4 * MIB
                )
            except TimeoutError:  # the placement group of this object is not active yet
                return False

        wait_until(seeks_again, 180)
        assert calls.do(path.read_bytes) == content + bytes(12 * MIB)


def descriptors(mount: Mount) -> list[str]:
    """What the mount's process has open; of sockets and pipes, which may be made again, not which."""
    found = []
    for entry in Path(f"/proc/{mount.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(re.sub("[0-9]+", "N", str(entry.readlink())))
    return sorted(found)


def resident_bytes(mount: Mount) -> int:
    """Memory of the mount's process."""
    return int(Path(f"/proc/{mount.pid}/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_a_thousand_opens_and_closes_leave_nothing_open_and_take_no_memory(ceph: Ceph, mount: Mount) -> None:
    names = [ceph.unique("opened") for _ in range(5)]
    content = random_bytes(MIB)
    for name in names:
        ceph.make_image(name, content, MIB)
        ceph.run("rbd", "snap", "create", "--no-progress", f"rbd/{name}@s")
    paths = [mount.image(spec) for name in names for spec in (name, f"{name}@s")]

    def open_and_close(count: int) -> None:
        for number in range(count):
            with opened(paths[number % len(paths)]) as file:
                if number % 7 == 0:
                    offset = number * 4099 % MIB
                    assert os.pread(file, 10_000, offset) == content[offset : offset + 10_000]
                if number % 11 == 0:
                    assert os.lseek(file, 0, os.SEEK_HOLE) == MIB

    assert set(names) <= set(os.listdir(mount.path / "rbd"))  # it has a connection to the OSD by now
    before = descriptors(mount)
    with calling(mount) as calls:
        calls.result(calls.start(open_and_close, 200), 60)
        memory = resident_bytes(mount)
        for each in [calls.start(open_and_close, 250) for _ in range(4)]:
            calls.result(each, 60)
    assert resident_bytes(mount) - memory < GROWTH_BYTES
    # What was closed a moment ago, librbd has open for 5 s more.
    wait_until(lambda: descriptors(mount) == before)
    for name in names:
        assert ceph.watchers(name) == []


def test_twenty_mounts_in_a_row_leave_no_process_no_mount_and_no_file(
    ceph: Ceph, mounts: Mounts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    name = ceph.unique("again")
    ceph.make_image(name, b"content")
    run, ours = ceph.conf.parent / "run", "/proc/self/fd"
    files, open_here = sorted(run.iterdir()), len(os.listdir(ours))
    for number in range(20):
        mount = mounts()
        assert mount.image(name).read_bytes() == b"content"
        if number % 2:
            subprocess.run(["umount", mount.path], check=True, timeout=PROMPT_SECONDS)
        else:
            os.kill(mount.pid, signal.SIGTERM)
        wait_until(lambda mount=mount: not mount.is_running, STOP_SECONDS)  # type: ignore[misc]
        assert not mount.is_mounted
    assert list(temporary.iterdir()) == []
    assert sorted(run.iterdir()) == files
    assert len(os.listdir(ours)) == open_here
    assert ceph.watchers(name) == []


@pytest.fixture
def place(ceph: Ceph) -> Iterator[Path]:
    """A folder of the user nobody, with the cluster's ceph.conf, a key and a mount point; and nothing is left of it."""
    folder = Path(tempfile.mkdtemp(prefix="rbdfs-nobody-"))
    log = folder / "log"
    try:
        keyring = ceph.make_key(ceph.unique("nobody"), *READ_ONLY_CAPS)
        shutil.copyfile(ceph.conf, folder / "ceph.conf")
        shutil.copyfile(keyring, folder / keyring.name)
        for name in ("mnt", "checkout", "venv"):
            (folder / name).mkdir()
        for path in (folder, *folder.iterdir()):
            os.chown(path, NOBODY, NOBODY)
        folder.chmod(0o755)
        yield folder
    finally:
        for pid in set(re.findall(r"rbdfs\[([0-9]+)\]", log.read_text() if log.exists() else "")):
            with suppress(FileNotFoundError, ProcessLookupError):
                if str(folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)
        shutil.rmtree(folder)


@pytest.fixture
def sparse_image(ceph: Ceph) -> tuple[str, bytes]:
    """An image with data, a hole, and data; and what `rbd export` reads."""
    name = ceph.unique("sparse")
    ceph.make_image(name, random_bytes(4 * MIB))
    ceph.resize_image(name, 20 * MIB)
    ceph.write_image(name, random_bytes(4 * MIB, seed=2), 12 * MIB)
    return name, ceph.exported(name)


@in_a_child
def test_another_user_than_root_mounts_lists_reads_seeks_and_unmounts(
    place: Path, sparse_image: tuple[str, bytes], large_pipes: None
) -> None:
    name, exported = sparse_image
    # Neither the checkout nor its Python need be in a folder that others may enter.
    bind(CHECKOUT, str(place / "checkout"))
    bind(Path(sys.prefix), str(place / "venv"))
    become(NOBODY)
    (keyring,) = place.glob("*.keyring")
    mountpoint, log = place / "mnt", place / "log"
    command = [str(place / "venv/bin/python"), "-m", "rbdfs", "mount", "-v", "--log-file", str(log)]
    command += ["--conf", str(place / "ceph.conf"), "--id", keyring.name.split(".")[1], "--keyring", str(keyring)]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(place / "checkout"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, str(mountpoint)], env=environment, cwd=place, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    pid = int(log.read_text().split("rbdfs[", 1)[1].split("]", 1)[0])
    assert Path(f"/proc/{pid}").stat().st_uid == NOBODY

    def open_there() -> int:
        return len(os.listdir(f"/proc/{pid}/fd"))

    path = mountpoint / "rbd" / name
    assert name in os.listdir(mountpoint / "rbd")
    before = open_there()
    assert path.stat().st_size == len(exported)
    assert path.read_bytes() == exported
    with opened(path) as file, opened(path, os.O_DIRECT) as direct:
        for offset in range(0, len(exported), 512 * KIB):
            assert read_direct(direct, offset, 512 * KIB) == exported[offset : offset + 512 * KIB]
        for position, whence, found in (
            (0, os.SEEK_DATA, 0),
            (0, os.SEEK_HOLE, 4 * MIB),
            (5 * MIB, os.SEEK_DATA, 12 * MIB),
            (5 * MIB, os.SEEK_HOLE, 5 * MIB),
            (13 * MIB, os.SEEK_HOLE, 16 * MIB),
        ):
            assert os.lseek(file, position, whence) == found
        with pytest.raises(OSError, match="No such device or address"):
            os.lseek(file, 17 * MIB, os.SEEK_DATA)
        for length in IOCTL_BYTES:
            with pytest.raises(OSError, match="Inappropriate ioctl"):
                ioctl(file, WRITES, length)
        assert b"user.rbd.features\0" in attribute_names(path)
    wait_until(lambda: open_there() <= before)
    subprocess.run(["fusermount3", "-u", mountpoint], check=True, timeout=PROMPT_SECONDS)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), STOP_SECONDS)
    assert os.listdir(mountpoint) == []
    assert not re.search(" (WARNING|ERROR|CRITICAL) |Traceback", log.read_text()), log.read_text()
