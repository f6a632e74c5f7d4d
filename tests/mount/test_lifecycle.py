"""How a mount starts, how it fails to start, and how it ends: on a real cluster, leaving nothing behind."""

import contextlib
import errno
import os
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rbd

from rbdfs import __version__
from tests.cluster import CHECKOUT, MIB, RBDFS, READ_ONLY_CAPS, Ceph, Mount, random_bytes, rbdfs, wait_until

Mounts = Callable[..., Mount]
STOP_SECONDS = 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A mount point."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    return folder


def refused(*arguments: str, conf: Path | None, folder: Path) -> str:
    """What `rbdfs mount` says when it fails: one line, and nothing mounted."""
    done = rbdfs("mount", *arguments, str(folder), conf=conf)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("rbdfs: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert str(folder) not in Path("/proc/self/mounts").read_text()
    return done.stderr


def test_without_a_ceph_conf_it_says_so(folder: Path) -> None:
    assert "no ceph.conf: /etc/ceph/ceph.conf" in refused(conf=None, folder=folder)
    assert "cannot read /nonexistent.conf: No such file" in refused("-c", "/nonexistent.conf", conf=None, folder=folder)


def test_an_unreachable_cluster_is_given_up_after_the_timeout(ceph: Ceph, folder: Path) -> None:
    began = time.monotonic()
    said = refused("-m", "127.0.0.1:1", "--connect-timeout", "2", conf=ceph.conf, folder=folder)
    assert "no monitor answered within 2 s (mon_host: 127.0.0.1:1)" in said
    assert time.monotonic() - began < 10


def test_a_missing_keyring_a_missing_key_and_a_wrong_key_are_told_apart(ceph: Ceph, folder: Path) -> None:
    said = refused("--keyring", "/nonexistent.keyring", conf=ceph.conf, folder=folder)
    assert "no key for client.admin: cannot read /nonexistent.keyring" in said
    assert "no key for client.nobody in" in refused("--id", "nobody", conf=ceph.conf, folder=folder)
    wrong = folder.parent / "wrong.keyring"
    wrong.write_text("[client.admin]\n    key = AQA7+yBfAAAAABAAQ0Xk0QKdqlQgLWfZ5nQ8xQ==\n")
    said = refused("--keyring", str(wrong), conf=ceph.conf, folder=folder)
    assert "the monitors refuse client.admin: its key is not the one the cluster has" in said


def test_missing_caps_are_named(ceph: Ceph, folder: Path) -> None:
    nothing = ceph.make_key("nothing")
    said = refused("--id", "nothing", "-k", str(nothing), conf=ceph.conf, folder=folder)
    assert "or it has no mon caps" in said
    mon_only = ceph.make_key("mononly", "mon", "profile rbd")
    # Ceph 16 answers such a key "permission denied", Ceph 18 nothing.
    said = refused("--connect-timeout", "5", "--id", "mononly", "-k", str(mon_only), conf=ceph.conf, folder=folder)
    assert re.search(
        "client.mononly may (not read pool .*rbd|have no OSD caps).*; it needs the caps mon 'profile rbd' osd", said
    )


def test_a_pool_that_is_not_there_is_named(ceph: Ceph, folder: Path) -> None:
    said = refused("--pool", "rbd", "--pool", "nope", conf=ceph.conf, folder=folder)
    assert "there is no pool nope with the application rbd" in said


def test_an_unusable_mount_point_is_refused_with_the_way_out(ceph: Ceph, folder: Path, mount: Mount) -> None:
    file = folder.parent / "file"
    file.touch()
    assert "does not exist; make it with: mkdir -p" in refused(conf=ceph.conf, folder=folder / "missing")
    assert "is not a directory" in refused(conf=ceph.conf, folder=file)
    done = rbdfs("mount", str(mount.path), conf=ceph.conf)
    assert done.returncode == 1
    assert "is an rbdfs mount already; end it with: umount" in done.stderr


def test_a_dead_mount_is_refused_with_the_command_that_frees_it(ceph: Ceph, mount: Mount) -> None:
    os.kill(mount.pid, signal.SIGKILL)
    wait_until(lambda: not mount.is_running)
    done = rbdfs("mount", str(mount.path), conf=ceph.conf)
    assert done.returncode == 1
    assert f"is a dead mount, left by a process that was killed; free it with: umount {mount.path}" in done.stderr
    subprocess.run(["umount", str(mount.path)], check=True)
    assert not mount.is_mounted


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("ro,no_such=1", "unknown mount option no_such; see rbdfs mount --help, for FUSE's own man mount.fuse3"),
        ("max_read=x", "the mount option max_read takes a value: max_read=BYTES"),
        ("rw", "images are shown read-only: there is no -o rw"),
    ],
)
def test_options_that_nobody_knows_and_writing_are_refused_before_anything_is_connected(
    folder: Path, option: str, reason: str
) -> None:
    done = rbdfs("mount", "-c", "/nonexistent.conf", "-o", option, str(folder))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"rbdfs: {reason}\n")
    assert str(folder) not in Path("/proc/self/mounts").read_text()


def test_options_after_o_are_the_options_of_the_same_name(ceph: Ceph, mounts: Mounts) -> None:
    mount = mounts("-o", r"ro,allow_other,fsname=a\,b,uid=1234,gid=55,umask=0007,noexec")
    line = next(line for line in Path("/proc/self/mounts").read_text().splitlines() if str(mount.path) in line)
    assert line.startswith("a,b ")
    assert "allow_other" in line
    assert "noexec" in line
    status = (mount.path / "rbd").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (1234, 55, 0o550)


def test_a_name_without_its_type_is_refused_with_the_right_option(folder: Path) -> None:
    done = rbdfs("mount", "--name", "backup", str(folder))
    assert done.returncode == 2
    assert done.stderr == "rbdfs: --name takes a type and an id, as client.backup; for the id alone there is --id\n"


def test_in_the_foreground_a_failure_is_one_line_too(ceph: Ceph, folder: Path) -> None:
    assert "there is no pool nope" in refused("--foreground", "--pool", "nope", conf=ceph.conf, folder=folder)


def test_the_version_is_printed() -> None:
    assert rbdfs("--version").stdout == f"rbdfs {__version__}\n"


@pytest.mark.parametrize(("module", "package"), [("pyfuse3", "python3-pyfuse3"), ("rados", "python3-rados")])
def test_a_missing_module_is_one_line_that_names_the_package(folder: Path, module: str, package: str) -> None:
    (folder.parent / "sitecustomize.py").write_text(f"import sys\nsys.modules[{module!r}] = None\n")
    environment = os.environ | {"PYTHONPATH": f"{folder.parent}:{CHECKOUT}"}
    done = subprocess.run(
        [*RBDFS, "mount", str(folder)], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"rbdfs: the module {module} is missing: apt install {package}")
    assert done.stderr.count("\n") == 1


def test_umount_ends_the_process_and_its_watches(ceph: Ceph, mount: Mount) -> None:
    name = ceph.unique("umount")
    ceph.make_image(name, random_bytes(MIB))
    assert mount.image(name).read_bytes() == random_bytes(MIB)
    subprocess.run(["umount", str(mount.path)], check=True)
    wait_until(lambda: not mount.is_running, STOP_SECONDS)
    assert ceph.watchers(name) == []


@contextlib.contextmanager
def reading(path: Path) -> Iterator[threading.Event]:
    """Somebody who reads the file again and again; the event is set once something came."""
    came, stop = threading.Event(), threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
            while not stop.is_set():
                file.seek(0)
                while file.read(MIB) and not stop.is_set():
                    came.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield came
    finally:
        stop.set()
        reader.join(30)
    assert not reader.is_alive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_within_5_s_also_while_files_are_read(ceph: Ceph, mount: Mount, number: int) -> None:
    name = ceph.unique("signal")
    ceph.make_image(name, random_bytes(64 * MIB))
    with reading(mount.image(name)) as came:
        assert came.wait(20)
        assert len(ceph.watchers(name)) == 1
        os.kill(mount.pid, number)
        wait_until(lambda: not mount.is_running, STOP_SECONDS)
    assert not mount.is_mounted
    assert ceph.watchers(name) == []


@contextlib.contextmanager
def in_the_foreground(ceph: Ceph, folder: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A mount that is usable, as a child of this process."""
    environment = os.environ | {"CEPH_CONF": str(ceph.conf), "PYTHONPATH": str(CHECKOUT)}
    command = [*RBDFS, "mount", "--foreground", *arguments, str(folder)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: (folder / "rbd").is_dir())
            yield process
        except BaseException:
            process.kill()
            subprocess.run(["umount", "-l", "-q", str(folder)], check=False)
            raise


def test_in_the_foreground_it_serves_until_sigint_and_logs_to_stderr(ceph: Ceph, folder: Path) -> None:
    with in_the_foreground(ceph, folder, "-v") as process:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=STOP_SECONDS)
        assert process.returncode == 0
    assert "stopping at SIGINT" in said
    assert list(folder.iterdir()) == []


def test_it_ends_in_good_order_with_images_that_were_just_closed(ceph: Ceph, folder: Path) -> None:
    names = [ceph.unique("closed") for _ in range(3)]
    for name in names:
        ceph.make_image(name, random_bytes(MIB))
    with in_the_foreground(ceph, folder) as process:
        for name in names:
            assert (folder / "rbd" / name).read_bytes() == random_bytes(MIB)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=STOP_SECONDS)
        assert (process.returncode, said) == (0, "")


@pytest.mark.parametrize(
    "ask",
    [lambda file: os.pread(file, MIB, 12 * MIB), lambda file: os.lseek(file, MIB, os.SEEK_DATA)],
    ids=["read", "seek"],
)
def test_sigterm_ends_it_within_5_s_also_while_no_osd_answers(
    ceph: Ceph, mount: Mount, ask: Callable[[int], object]
) -> None:
    name = ceph.unique("dead-osd")
    ceph.make_image(name, random_bytes(16 * MIB), features=rbd.RBD_FEATURE_LAYERING)
    mount.expect("WARNING")
    file = os.open(mount.image(name), os.O_RDONLY)
    assert os.read(file, 4096)
    ceph.devcluster.kill_daemon("osd.0")
    try:
        errors: list[int | None] = []

        def wait() -> None:
            try:
                ask(file)
            except OSError as error:
                errors.append(error.errno)

        reader = threading.Thread(target=wait)
        reader.start()
        os.kill(mount.pid, signal.SIGTERM)
        wait_until(lambda: not mount.is_running, STOP_SECONDS)
        reader.join(10)
        assert errors in ([errno.ENOTCONN], [errno.ECONNABORTED], [errno.EIO])
    finally:
        ceph.devcluster.start_daemon("osd.0")
        with contextlib.suppress(OSError):  # close() asks a file system that is gone
            os.close(file)
    assert not mount.is_mounted


@pytest.mark.parametrize("end", ["SIGTERM", "umount"])
def test_a_close_that_no_osd_answers_does_not_keep_the_process_alive(ceph: Ceph, mount: Mount, end: str) -> None:
    name = ceph.unique("dead-close")
    ceph.make_image(name, b"content")
    mount.expect("WARNING")
    file = os.open(mount.image(name), os.O_RDONLY)
    ceph.devcluster.kill_daemon("osd.0")
    try:
        os.close(file)
        if end == "SIGTERM":
            os.kill(mount.pid, signal.SIGTERM)
        else:
            subprocess.run(["umount", mount.path], check=True, timeout=STOP_SECONDS)
        wait_until(lambda: not mount.is_running, STOP_SECONDS)
        assert not mount.is_mounted
    finally:
        ceph.devcluster.start_daemon("osd.0")


def test_the_reader_key_of_the_documentation_is_enough(ceph: Ceph, mounts: Mounts) -> None:
    name = ceph.unique("caps")
    ceph.make_image(name, b"content")
    keyring = ceph.make_key("documented", *READ_ONLY_CAPS)
    assert mounts("--id", "documented", "-k", str(keyring)).image(name).read_bytes() == b"content"


def test_it_may_have_as_many_images_open_as_the_host_allows(mounts: Mounts) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024, hard - 1), hard))
    try:
        mount = mounts()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(mount.pid, resource.RLIMIT_NOFILE) == (hard, hard)
