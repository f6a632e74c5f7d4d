"""Mounting and unmounting by ourselves: real mounts, as root and as another user, and no Ceph.

Each test runs in a fork of the test process that has mounts of its own, so nothing stays mounted, however it ends.
"""

import ctypes
import errno
import functools
import os
import pwd
import select
import shutil
import signal
import stat
import struct
import subprocess
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, ParamSpec

import pytest

from rbdfs.errors import MountError, UsageError
from rbdfs.fuse import mounting
from rbdfs.fuse.mount_options import FuseOptions, parse_options
from rbdfs.fuse.mounting import Mount, check_mountpoint, mount
from tests.cluster import wait_until

P = ParamSpec("P")

CLONE_NEWNS = 0x20000
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 4, 1 << 12, 1 << 14, 1 << 18
HUNG_SECONDS = 60

ROOT = 0
NOBODY = pwd.getpwnam("nobody").pw_uid
NAMELESS = 54321
"""A user whom /etc/passwd does not have."""

STRANGE = b"a b,c\\d\\040\n\t\r#\"'\xff\xc3\xa9"

GETATTR, STATFS, INIT = 3, 17, 26
IN_HEADER = struct.Struct("<IIQQIIIHH")  # fuse_in_header
OUT_HEADER = struct.Struct("<IiQ")  # fuse_out_header
INIT_OUT = struct.pack("<IIIIHHIIHHI7I", 7, 31, 0, 0, 0, 0, 4096, 1, 0, 0, 0, *[0] * 7)
ATTR_OUT = struct.pack("<QII6Q10I", 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 0, 0)
STATFS_OUT = struct.pack("<5Q10I", 1234, 0, 0, 0, 0, 512, 255, 512, 0, *[0] * 6)
ANSWERS = {INIT: INIT_OUT, GETATTR: ATTR_OUT, STATFS: STATFS_OUT}

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def in_a_child(test: Callable[P, None]) -> Callable[P, None]:
    """Run a test, as root, in a fork with mounts of its own, a /dev/fuse for everybody and the default fuse.conf."""

    @pytest.mark.skipif(os.geteuid() != ROOT, reason="needs root")
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with tempfile.TemporaryDirectory(prefix="rbdfs-mounting-") as folder:
            report, say = os.pipe()
            child = os.fork()
            if child == 0:
                _run_and_exit(functools.partial(test, *args, **kwargs), Path(folder), say)
            os.close(say)
            with os.fdopen(report) as pipe:
                hung = not select.select([pipe], [], [], HUNG_SECONDS)[0]
                if hung:
                    os.kill(child, signal.SIGKILL)
                said = pipe.read()
            _, status = os.waitpid(child, 0)
        assert not hung, "it hung"
        if status:
            pytest.fail(said or f"it ended with status {status}", pytrace=False)

    return run


def _run_and_exit(test: Callable[[], None], folder: Path, say: int) -> NoReturn:
    status = 1
    try:
        _own_mounts(folder)
        test()
        status = 0
    except BaseException:
        os.write(say, traceback.format_exc().encode(errors="backslashreplace"))
    finally:
        os._exit(status)


def call(function: str, *arguments: object) -> None:
    """A function of the C library that Python lacks."""
    assert getattr(LIBC, function)(*arguments) == 0, os.strerror(ctypes.get_errno())


def bind(source: Path, target: str) -> None:
    """Show a file in another's place."""
    call("mount", os.fsencode(source), target.encode(), None, MS_BIND, None)


def _own_mounts(folder: Path) -> None:
    call("unshare", CLONE_NEWNS)
    failed = LIBC.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
    assert " shared:" not in Path("/proc/self/mountinfo").read_text()
    if failed:  # in a chroot that is no mount point: make it one, since auto_unmount does as we did
        call("mount", b"/", b"/", None, MS_BIND | MS_REC, None)
        os.chroot("/..")
    call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, None)
    (folder / "fuse.conf").touch()
    make_device(folder / "fuse", 0o666)
    bind(folder / "fuse.conf", "/etc/fuse.conf")
    bind(folder / "fuse", "/dev/fuse")


def make_device(path: Path, mode: int) -> None:
    """Another /dev/fuse."""
    os.mknod(path, stat.S_IFCHR, os.makedev(10, 229))
    path.chmod(mode)


def become(user: int) -> None:
    """Be this user from now on."""
    if user != ROOT:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)


@pytest.fixture(params=[ROOT, NOBODY], ids=["root", "nobody"])
def user(request: pytest.FixtureRequest) -> int:
    """Who mounts."""
    return int(request.param)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user can reach: pytest's own is for one only."""
    folder = Path(tempfile.mkdtemp(prefix="rbdfs-mounting-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def mountpoint(place: Path, request: pytest.FixtureRequest) -> Path:
    """A mount point, which belongs to who mounts."""
    folder = place / "mnt"
    folder.mkdir()
    owner = request.getfixturevalue("user") if "user" in request.fixturenames else NOBODY
    os.chown(folder, owner, owner)
    return folder


def answer(device: int) -> int:
    """Answer one request of the kernel; its opcode."""
    _, opcode, unique, *_ = IN_HEADER.unpack_from(os.read(device, 1 << 16))
    body = ANSWERS.get(opcode)
    if body is None:
        os.write(device, OUT_HEADER.pack(OUT_HEADER.size, -errno.ENOSYS, unique))
    else:
        os.write(device, OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body)
    return int(opcode)


@contextmanager
def serving(mounted: Mount) -> Iterator[None]:
    """Answer the kernel until the end of the block."""
    end, stop = os.pipe()

    def serve() -> None:
        poll = select.poll()
        poll.register(mounted.device, select.POLLIN)
        poll.register(end, select.POLLIN)
        while end not in (ready := dict(poll.poll())) and ready[mounted.device] != select.POLLERR:
            with suppress(BlockingIOError, FileNotFoundError):  # the kernel has taken a request back
                answer(mounted.device)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        os.close(stop)
        thread.join()
        os.close(end)


def mounts_on(path: Path) -> list[list[str]]:
    """Lines of /proc/self/mounts: source, path, type, options..."""
    lines = [line.split(" ") for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [line for line in lines if line[1] == str(path)]


def options_of(path: Path) -> set[str]:
    """The options of what is mounted there."""
    return set(mounts_on(path)[0][3].split(","))


def descriptors() -> list[str]:
    """What this process has open."""
    return os.listdir("/proc/self/fd")


def assert_no_children() -> None:
    """None is running, and none is a zombie."""
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def refused(mountpoint: Path, *options: str) -> str:
    """Why it cannot be mounted: one line. Nothing stays behind."""
    before, mounts = descriptors(), Path("/proc/self/mounts").read_text()
    with pytest.raises(MountError) as caught:
        mount(mountpoint, parse_options(options))
    assert (descriptors(), Path("/proc/self/mounts").read_text()) == (before, mounts)
    assert_no_children()
    said = str(caught.value)
    assert said.startswith(f"cannot mount {mountpoint}: ")
    assert said.isprintable()
    return said.removeprefix(f"cannot mount {mountpoint}: ")


FLAGS = FuseOptions().flags
KERNEL = FuseOptions().kernel


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", FuseOptions()),
        ("ro,nosuid,nodev,default_permissions", FuseOptions()),
        ("suid,dev", FuseOptions(flags=frozenset({"ro"}))),
        ("suid,nosuid,noexec,exec,sync,async,atime,noatime,atime", FuseOptions()),
        ("noexec,noatime,dirsync", FuseOptions(flags=FLAGS | {"noexec", "noatime", "dirsync"})),
        ("nodiratime,relatime,norelatime,strictatime", FuseOptions(flags=FLAGS | {"nodiratime", "strictatime"})),
        ("lazytime,nolazytime,diratime,nostrictatime", FuseOptions()),
        ("allow_other,allow_other", FuseOptions(kernel=(*KERNEL, "allow_other"))),
        ("max_read=4096,max_read=65536", FuseOptions(kernel=(*KERNEL, "max_read=65536"))),
        ("context=system_u:object_r:nfs_t:s0", FuseOptions(kernel=(*KERNEL, "context=system_u:object_r:nfs_t:s0"))),
        ("fsname=ceph,subtype=images,auto_unmount", FuseOptions(fsname="ceph", subtype="images", auto_unmount=True)),
        ("fsname=a=b", FuseOptions(fsname="a=b")),
        ("auto,noauto,user,users,nouser,owner,group,_netdev,nofail,defaults,nousers,noowner,nogroup", FuseOptions()),
        ("x-systemd.automount,x-systemd.idle-timeout=1min,x-gvfs-show,X-mount.mkdir=0755,comment=x", FuseOptions()),
        ("user=joe,uhelper=udisks2,helper=x,nobootwait,silent,loud,nonempty", FuseOptions()),
    ],
)
def test_options_are_sorted_by_the_program_that_takes_them(options: str, expected: FuseOptions) -> None:
    assert parse_options(option for option in options.split(",") if option) == expected


def test_a_label_with_a_comma_is_quoted_once() -> None:
    for option in ("context=s0:c1,c2", 'context="s0:c1,c2"'):
        assert parse_options([option]).kernel[1] == 'context="s0:c1,c2"'


@pytest.mark.parametrize(
    "option", ["no_such", "fd=3", "rootmode=0", "user_id=0", "remount", "ro=1", "allow_root", "noro", "xnofail", ""]
)
def test_an_option_that_nobody_knows_is_named(option: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options(["ro", option])
    name = option.partition("=")[0]
    assert str(caught.value) == f"unknown mount option {name}; see rbdfs mount --help, for FUSE's own man mount.fuse3"


@pytest.mark.parametrize("option", ["max_read", "max_read=", "max_read=4k", "fsname", "fsname=", "subtype=", "context"])
def test_an_option_without_its_value_is_named(option: str) -> None:
    name = option.partition("=")[0]
    with pytest.raises(UsageError, match=f"^the mount option {name} takes a value: {name}=[A-Z]+$"):
        parse_options([option])


def test_writing_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no -o rw"):
        parse_options(["rw"])


@in_a_child
def test_a_mount_is_there_until_it_is_unmounted(mountpoint: Path, user: int) -> None:
    become(user)
    mounted = mount(mountpoint, parse_options([]))
    number = mounted.device_number()
    assert number is not None
    assert (os.get_blocking(mounted.device), os.get_inheritable(mounted.device)) == (False, False)
    with serving(mounted):
        assert mountpoint.stat().st_dev == os.makedev(*number)
        assert os.statvfs(mountpoint).f_blocks == 1234
    assert mounts_on(mountpoint)[0][:3] == ["rbdfs", str(mountpoint), mounting.TYPE]
    assert options_of(mountpoint) >= {"ro", "nosuid", "nodev", "default_permissions", f"user_id={user}"}
    mounted.unmount()
    assert mounts_on(mountpoint) == []
    assert (mounted.device, mounted.device_number()) == (-1, None)
    mounted.unmount()


@in_a_child
def test_no_method_asks_the_file_system(mountpoint: Path, user: int) -> None:
    become(user)
    mounted = mount(mountpoint, parse_options([]))
    assert answer(mounted.device) == INIT
    assert mounted.device_number() is not None
    with pytest.raises(BlockingIOError):
        os.read(mounted.device, 1 << 16)
    mounted.unmount()
    assert mounts_on(mountpoint) == []


@pytest.mark.parametrize("way", [[], ["auto_unmount"]], ids=["mount", "fusermount3"])
@in_a_child
def test_root_can_set_every_option(place: Path, way: list[str]) -> None:
    given = ["suid", "dev", "noexec", "sync", "dirsync", "noatime", "allow_other", "max_read=65536", "subtype=images"]
    mounted = mount(place, parse_options([*given, "fsname=a,b\\c d", *way]))
    assert mounts_on(place)[0][:3] == ["a,b\\134c\\040d", str(place), "fuse.images"]
    options = options_of(place)
    assert options >= {"ro", "noexec", "sync", "dirsync", "noatime", "allow_other", "max_read=65536"}
    assert not options & {"nosuid", "nodev"}
    mounted.unmount()
    assert mounts_on(place) == []


@in_a_child
def test_another_user_can_set_the_options_that_are_safe(mountpoint: Path) -> None:
    Path("/etc/fuse.conf").write_text("user_allow_other\n")
    become(NOBODY)
    given = ["suid", "dev", "noexec", "relatime", "nodiratime", "allow_other", "max_read=65536", "fsname=a,b\\c d"]
    mounted = mount(mountpoint, parse_options(given))
    assert mounts_on(mountpoint)[0][:3] == ["a,b\\134c\\040d", str(mountpoint), mounting.TYPE]
    assert options_of(mountpoint) >= {"ro", "nosuid", "nodev", "noexec", "allow_other", "max_read=65536"}
    mounted.unmount()
    assert mounts_on(mountpoint) == []


@in_a_child
def test_allow_other_without_root_needs_user_allow_other(mountpoint: Path) -> None:
    become(NOBODY)
    assert "needs the line user_allow_other in /etc/fuse.conf" in refused(mountpoint, "allow_other")


@in_a_child
def test_labels_without_root_are_refused(mountpoint: Path, user: int) -> None:
    become(user)
    assert "need root, and go without auto_unmount" in refused(mountpoint, "context=s0", "auto_unmount")


@in_a_child
def test_a_mount_point_of_somebody_else_is_refused(place: Path) -> None:
    (place / "sticky").mkdir()
    (place / "sticky").chmod(0o1777)
    become(NOBODY)
    assert refused(place).startswith("without root, the mount point must be yours and writable; ")
    assert refused(place / "sticky").startswith("without root, the mount point must be yours and writable; ")


@in_a_child
def test_without_dev_fuse_it_says_how_to_get_it(mountpoint: Path, user: int) -> None:
    call("mount", b"tmpfs", b"/dev", b"tmpfs", 0, None)
    os.mknod("/dev/null", stat.S_IFCHR, os.makedev(1, 3))
    Path("/dev/null").chmod(0o666)
    become(user)
    assert "there is no /dev/fuse; load it with: modprobe fuse (a container needs" in refused(mountpoint)


@in_a_child
def test_a_dev_fuse_that_may_not_be_opened_is_named(mountpoint: Path, place: Path, user: int) -> None:
    if user == ROOT:
        call("mount", b"tmpfs", os.fsencode(place), b"tmpfs", MS_NODEV, None)
        mountpoint.mkdir()
        make_device(place / "fuse", 0o666)
        bind(place / "fuse", "/dev/fuse")
        assert "/dev/fuse may not be opened; a container needs --device /dev/fuse" in refused(mountpoint)
    else:
        Path("/dev/fuse").chmod(0o600)
        become(user)
        assert "this user may not open /dev/fuse; permit it with: chmod 0666" in refused(mountpoint)


@in_a_child
def test_without_fusermount3_it_says_what_to_install(mountpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    become(NOBODY)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert refused(mountpoint) == "fusermount3 is missing: apt install fuse3"


@in_a_child
def test_a_fusermount3_that_is_not_setuid_is_named(
    mountpoint: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fusermount3 = shutil.which("fusermount3")
    assert fusermount3
    shutil.copyfile(fusermount3, place / "fusermount3")
    monkeypatch.setenv("PATH", str(place))
    become(NOBODY)
    assert "fusermount3 cannot be run: Permission denied" in refused(mountpoint)


@in_a_child
def test_a_fusermount3_without_its_rights_is_named(
    mountpoint: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fusermount3 = shutil.which("fusermount3")
    assert fusermount3
    shutil.copyfile(fusermount3, place / "fusermount3")
    (place / "fusermount3").chmod(0o755)
    monkeypatch.setenv("PATH", str(place))
    become(NOBODY)
    assert "make it setuid root with: chmod u+s $(command -v fusermount3)" in refused(mountpoint)


@in_a_child
def test_a_user_without_a_name_is_an_error_that_says_so(mountpoint: Path) -> None:
    os.chown(mountpoint, NAMELESS, NAMELESS)
    become(NAMELESS)
    assert "add one to /etc/passwd" in refused(mountpoint)


@in_a_child
def test_for_root_without_its_rights_the_error_says_what_a_container_needs(place: Path) -> None:
    call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    assert "the kernel permits no mount; a container needs --cap-add SYS_ADMIN" in refused(place)


@in_a_child
def test_options_that_the_kernel_refuses_are_listed(mountpoint: Path, user: int) -> None:
    become(user)
    said = refused(mountpoint, "noexec", "max_read=99999999999")
    assert "one of these options: nodev,noexec,nosuid,ro,default_permissions,max_read=99999999999; leave" in said


@in_a_child
def test_options_that_the_kernel_would_cut_off_are_refused(place: Path) -> None:
    assert refused(place, f"context={'x' * 4096}") == "the options are longer than 4096 bytes; leave some out"


@in_a_child
def test_any_name_of_a_mount_point_works(place: Path, user: int) -> None:
    mountpoint = Path(os.fsdecode(os.path.join(os.fsencode(place), STRANGE)))  # noqa: PTH118
    mountpoint.mkdir()
    os.chown(mountpoint, user, user)
    become(user)
    mounted = mount(mountpoint, parse_options([]))
    with serving(mounted):
        number = mounted.device_number()
        assert number is not None
        assert mountpoint.stat().st_dev == os.makedev(*number)
        with pytest.raises(MountError, match="is an rbdfs mount already; end it with: ") as caught:
            check_mountpoint(mountpoint)
        assert str(caught.value).isprintable()
    mounted.unmount()
    assert mountpoint.stat().st_dev == place.stat().st_dev
    check_mountpoint(mountpoint)


@in_a_child
def test_a_symbolic_link_is_mounted_and_unmounted_where_it_leads(mountpoint: Path, place: Path, user: int) -> None:
    (place / "link").symlink_to(mountpoint)
    become(user)
    mounted = mount(place / "link", parse_options([]))
    assert mounted.mountpoint == mountpoint
    assert len(mounts_on(mountpoint)) == 1
    mounted.unmount()
    assert mounts_on(mountpoint) == []


@in_a_child
def test_a_mount_that_was_moved_is_unmounted_where_it_is(place: Path, user: int) -> None:
    (place / "above").mkdir()
    (place / "above/mnt").mkdir()
    for folder in (place, place / "above", place / "above/mnt"):
        os.chown(folder, user, user)
    become(user)
    mounted = mount(place / "above/mnt", parse_options([]))
    (place / "above").rename(place / "renamed")
    assert len(mounts_on(place / "renamed/mnt")) == 1
    assert mounted.device_number() is not None
    mounted.unmount()
    assert mounts_on(place / "renamed/mnt") == []


def someone_unmounts(mounted: Mount, *lazily: str) -> None:
    """As a user does by hand: umount asks the file system."""
    command = ["umount"] if os.geteuid() == ROOT else ["fusermount3", "-u"]
    with serving(mounted):
        subprocess.run([*command, *lazily, mounted.mountpoint], check=True)


@in_a_child
def test_what_somebody_has_unmounted_needs_nothing_more(
    mountpoint: Path, user: int, caplog: pytest.LogCaptureFixture
) -> None:
    become(user)
    mounted = mount(mountpoint, parse_options([]))
    someone_unmounts(mounted)
    assert mounted.device_number() is None
    mounted.unmount()
    assert (mounted.device, caplog.records) == (-1, [])


@in_a_child
def test_what_somebody_has_unmounted_while_it_is_used_is_only_closed(
    mountpoint: Path, user: int, caplog: pytest.LogCaptureFixture
) -> None:
    become(user)
    mounted = mount(mountpoint, parse_options([]))
    user_of_it = os.open(mountpoint, os.O_PATH)
    someone_unmounts(mounted, "-l" if user == ROOT else "-z")
    assert mounted.device_number() is None
    mounted.unmount()
    assert caplog.records == []
    with pytest.raises(OSError, match=os.strerror(errno.ENOTCONN)):
        os.stat("x", dir_fd=user_of_it)


@in_a_child
def test_a_mount_that_has_taken_its_place_stays(mountpoint: Path, user: int, caplog: pytest.LogCaptureFixture) -> None:
    become(user)
    for _ in range(50):
        first = mount(mountpoint, parse_options([]))
        number = first.device_number()
        someone_unmounts(first)
        second = mount(mountpoint, parse_options(["fsname=second"]))
        if second.device_number() == number:  # the kernel uses numbers again
            break
        # Something else on this machine was mounted or unmounted in between.
        second.unmount()
        first.unmount()
    assert second.device_number() == number
    assert first.device_number() is None
    first.unmount()
    assert [line[0] for line in mounts_on(mountpoint)] == ["second"]
    assert second.device_number() == number
    second.unmount()
    assert (mounts_on(mountpoint), caplog.records) == ([], [])


@pytest.mark.parametrize("kind", ["tmpfs", mounting.TYPE])
@in_a_child
def test_a_mount_that_lies_over_it_stays_and_is_named(place: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    mounted = mount(place, parse_options([]))
    if kind == "tmpfs":
        call("mount", b"second", os.fsencode(place), b"tmpfs", 0, None)
    else:
        with serving(mounted):
            mount(place, parse_options(["fsname=second"]))
    mounted.unmount()
    assert [line[0] for line in mounts_on(place)] == ["rbdfs", "second"]
    assert f"cannot unmount {place}: something else is mounted over it; free it with: umount -l" in caplog.text


@in_a_child
def test_an_unmount_that_fails_is_a_warning(
    mountpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(NOBODY)
    mounted = mount(mountpoint, parse_options([]))
    monkeypatch.setenv("PATH", "/nonexistent")
    mounted.unmount()
    assert len(mounts_on(mountpoint)) == 1
    assert "fusermount3 is missing: apt install fuse3; free it with: fusermount3 -u -z" in caplog.text


@in_a_child
def test_a_request_without_an_answer_gets_an_error_at_the_unmount(mountpoint: Path, user: int) -> None:
    become(user)
    mounted = mount(mountpoint, parse_options([]))
    assert answer(mounted.device) == INIT
    errors: list[int | None] = []

    def wait() -> None:
        try:
            os.statvfs(mountpoint)
        except OSError as error:
            errors.append(error.errno)

    waiting = threading.Thread(target=wait)
    waiting.start()
    select.select([mounted.device], [], [])
    os.read(mounted.device, 1 << 16)
    mounted.unmount()
    waiting.join(HUNG_SECONDS)
    assert errors in ([errno.ENOTCONN], [errno.ECONNABORTED])
    assert mounts_on(mountpoint) == []


@in_a_child
def test_the_device_is_closed_before_the_unmount(mountpoint: Path, user: int, monkeypatch: pytest.MonkeyPatch) -> None:
    become(user)
    mounted = mount(mountpoint, parse_options([]))
    device, close = mounted.device, os.close
    mounted_at_its_close: list[bool] = []

    def note_and_close(descriptor: int) -> None:
        if descriptor == device and not mounted_at_its_close:
            mounted_at_its_close.append(mounts_on(mountpoint) != [])
        close(descriptor)

    monkeypatch.setattr(os, "close", note_and_close)
    mounted.unmount()
    assert mounted_at_its_close == [True]
    assert mounts_on(mountpoint) == []


@in_a_child
def test_auto_unmount_leaves_nothing_of_a_mount_that_was_killed(mountpoint: Path, user: int) -> None:
    Path("/etc/fuse.conf").write_text("user_allow_other\n")
    become(user)
    ready, say = os.pipe()
    child = os.fork()
    if child == 0:
        mount(mountpoint, parse_options(["auto_unmount", "allow_other"]))
        os.write(say, b"ready")
        signal.pause()
    os.close(say)
    try:
        assert os.read(ready, 5) == b"ready"
        assert len(mounts_on(mountpoint)) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    wait_until(lambda: not mounts_on(mountpoint))


@in_a_child
def test_auto_unmount_that_cannot_work_is_warned_of(mountpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    become(NOBODY)
    mount(mountpoint, parse_options(["auto_unmount"])).unmount()
    assert caplog.messages == ["auto_unmount without root works only together with allow_other"]
    assert mounts_on(mountpoint) == []


@in_a_child
def test_with_auto_unmount_an_unmount_ends_fusermount3_and_spares_other_mounts(mountpoint: Path, user: int) -> None:
    become(user)
    first = mount(mountpoint, parse_options(["auto_unmount"]))
    someone_unmounts(first)
    second = mount(mountpoint, parse_options([]))
    os.close(second.device)  # dead, and of the same type: what fusermount3 would take for its own
    first.unmount()
    assert_no_children()
    assert len(mounts_on(mountpoint)) == 1


@in_a_child
def test_nothing_is_left_open_by_50_mounts(mountpoint: Path, user: int) -> None:
    become(user)
    before = descriptors()
    for number in range(50):
        options = parse_options(["auto_unmount"] if number % 2 else [])
        mounted = mount(mountpoint, options)
        assert len(mounts_on(mountpoint)) == 1
        mounted.unmount()
        assert_no_children()
    assert descriptors() == before
    assert mounts_on(mountpoint) == []


@in_a_child
def test_an_unusable_mount_point_is_refused_with_the_way_out(mountpoint: Path, user: int) -> None:
    become(user)

    def why_not(path: Path) -> str:
        with pytest.raises(MountError) as caught:
            check_mountpoint(path)
        return str(caught.value)

    check_mountpoint(mountpoint)
    free = "umount" if user == ROOT else "fusermount3 -u"
    missing, loop = mountpoint / "missing", mountpoint / "loop"
    loop.symlink_to(loop)
    assert why_not(missing) == f"{missing} does not exist; make it with: mkdir -p {missing}"
    assert why_not(loop) == f"cannot use {loop}: {os.strerror(errno.ELOOP)}"
    assert why_not(Path("/etc/passwd")) == "/etc/passwd is not a directory"
    mounted = mount(mountpoint, parse_options([]))
    with serving(mounted):
        assert why_not(mountpoint) == f"{mountpoint} is an rbdfs mount already; end it with: {free} {mountpoint}"
    os.close(mounted.device)
    assert why_not(mountpoint).endswith(f"left by a process that was killed; free it with: {free} {mountpoint}")


@pytest.mark.skipif("autofs" not in Path("/proc/filesystems").read_text(), reason="the kernel has no autofs")
@in_a_child
def test_an_automount_point_is_checked_and_mounted_without_waiting_for_itself(place: Path) -> None:
    asked, ask = os.pipe()
    os.set_blocking(asked, False)
    options = f"fd={ask},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
    call("mount", b"systemd-1", os.fsencode(place), b"autofs", 0, options.encode())
    os.setsid()  # whoever is not in the automounter's process group waits for the mount
    check_mountpoint(place)
    mounted = mount(place, parse_options([]))
    mounted.unmount()
    assert [line[2] for line in mounts_on(place)] == ["autofs"]
    with pytest.raises(BlockingIOError):
        os.read(asked, 1)
