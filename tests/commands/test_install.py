"""`install.sh --system` and `--remove`, in a mount namespace with its own /opt, /sbin, /usr/local and /etc/fish."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import rbd

from tests.cluster import CHECKOUT, MIB, Ceph, random_bytes, wait_until

SOURCE = ("pyproject.toml", "README.md", "LICENSE", "rbdfs", "examples")

NAMESPACE = r"""
set -euo pipefail
mount -t tmpfs tmpfs "$1"
mkdir "$1/opt"
for folder in /etc/fish /usr/local /usr/sbin; do
    mkdir -p "$1/upper$folder" "$1/work$folder"
    mount -t overlay -o "lowerdir=$folder,upperdir=$1/upper$folder,workdir=$1/work$folder" overlay "$folder"
done
if [[ -e /opt/rbdfs/manifest ]]; then # this host has rbdfs installed
    tac /opt/rbdfs/manifest | xargs rm -df 2>/dev/null || true
fi
for folder in /opt/*/; do # with what is mounted in it
    [[ $folder != /opt/rbdfs/ && -d $folder ]] || continue
    mkdir "$1$folder"
    mount --rbind "$folder" "$1$folder"
done
mount --rbind "$1/opt" /opt
echo ready
exec cat
"""
PLACES = ("/etc/fish", "/opt/rbdfs", "/usr/local", "/usr/sbin")

SHELLS = {
    "bash": ("bash", "--rcfile", "{folder}/rc", "-i"),
    "zsh": ("env", "ZDOTDIR={folder}", "zsh", "-i"),
}
SHELL_FILES = {
    "rc": "source /usr/share/bash-completion/bash_completion",
    ".zshrc": "autoload -Uz compinit; compinit -u -d $ZDOTDIR/dump",
}
"""What the user's own file has at least, so that completion works."""


class Host:
    """This host, as it is for processes in the namespace."""

    def __init__(self, folder: Path) -> None:
        unshare = ["unshare", "--mount", "bash", "-c", NAMESPACE, "bash", str(folder)]
        pipe = subprocess.PIPE
        self._holder = subprocess.Popen(unshare, stdin=pipe, stdout=pipe, text=True, cwd="/")
        self.pid = self._holder.pid
        self.before: list[str] = []
        """The files of the host without rbdfs."""
        # --root and --wd: the tests may run in a chroot.
        self.prefix = ("nsenter", f"--target={self.pid}", "--mount", "--root", "--wd")

    def wait(self) -> None:
        """Until all is as it should be in there."""
        assert self._holder.stdout
        assert self._holder.stdout.readline() == "ready\n"

    def close(self) -> None:
        """The namespace goes with its last process."""
        for process in self.processes:
            os.kill(process, signal.SIGKILL)
        self._holder.communicate()

    def run(self, *command: object, status: int = 0, **environment: str) -> str:
        """What a command wrote, errors included."""
        done = subprocess.run(
            [*self.prefix, *(str(word) for word in command)],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def files(self) -> list[str]:
        """All that is where an installation puts things, with types, permissions and where links point."""
        found = self.run("find", *PLACES, "-printf", r"%p %M %l\n", status=0 if self.is_installed else 1)
        return sorted(line for line in found.splitlines() if "No such file" not in line)

    @property
    def is_installed(self) -> bool:
        """Whether the installation's folder is there."""
        return "rbdfs" in self.run("ls", "/opt").split()

    @property
    def version(self) -> str:
        """The folder of the version that new commands run."""
        return self.run("readlink", "/usr/local/bin/rbdfs").removesuffix("/bin/rbdfs\n")

    @property
    def processes(self) -> list[int]:
        """Those that run an installed rbdfs here."""
        namespace = Path(f"/proc/{self.pid}/ns/mnt").readlink()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(FileNotFoundError, ProcessLookupError):
                if (process / "cmdline").read_bytes().startswith(b"/opt/rbdfs/"):
                    found += [int(process.name)] * ((process / "ns" / "mnt").readlink() == namespace)
        return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installation needs of this checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCE:
        if (CHECKOUT / name).is_dir():
            shutil.copytree(CHECKOUT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(CHECKOUT / name, folder)
    return folder


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host without rbdfs."""
    host = Host(tmp_path_factory.mktemp("host"))
    try:
        host.wait()
        yield host
    finally:
        host.close()


@pytest.fixture(scope="module")
def installed(host: Host, checkout: Path) -> Host:
    """A host with rbdfs, installed from a checkout that is not where it was any more."""
    host.run("mkdir", "-p", "/usr/local/share/bash-completion/completions")
    host.run("touch", "/usr/local/share/bash-completion/completions/other")
    host.before = host.files()
    moved = checkout.with_name("moved")
    shutil.copytree(checkout, moved)
    said = host.run(moved / "examples" / "install.sh", "--system")
    assert "Installed rbdfs 0." in said
    files = {path.relative_to(moved) for path in moved.rglob("*")}
    assert files == {path.relative_to(checkout) for path in checkout.rglob("*")}
    shutil.rmtree(moved)
    return host


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    """An empty directory."""
    (tmp_path / "mnt").mkdir()
    return tmp_path / "mnt"


def completed(host: Host, shell: str, line: str, folder: Path) -> str:
    """What a shell makes of a line when TAB is pressed: `rbdfs` prints what it is called with."""
    for name, text in SHELL_FILES.items():
        (folder / name).write_text(f"{text}\nrbdfs() {{ printf '<%s>\\n' \"$*\"; exit; }}\nPS1='rea''dy'\n")
    command = [word.format(folder=folder) for word in SHELLS[shell]]
    ours, theirs = os.openpty()
    with os.fdopen(ours, "r+b", buffering=0) as terminal:
        process = subprocess.Popen(
            [*host.prefix, "setsid", "--ctty", "--wait", "timeout", "--foreground", "60", *command],
            env=os.environ | {"TERM": "xterm", "INPUTRC": "/dev/null"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
        os.close(theirs)
        seen = b""
        for wanted, answer in ((b"ready", f"rbdfs {line}\t\n"), (b">\r", "")):
            while wanted not in seen:
                seen += terminal.read(1000)
            terminal.write(answer.encode())
        process.wait()
    found = re.search(rb"<([^<>\x1b]*)>\r", seen)
    assert found is not None, seen
    return found[1].decode()


def test_commands_need_no_checkout(installed: Host) -> None:
    assert installed.run("rbdfs", "--version").startswith("rbdfs 0.")
    where = installed.run(f"{installed.version}/bin/python", "-c", "import rbdfs; print(rbdfs.__file__)")
    assert where.startswith(f"{installed.version}/lib/python3")


def test_man_finds_the_page(installed: Host) -> None:
    assert "every image in a Ceph cluster as a plain file" in installed.run("man", "rbdfs", MANROFFOPT="-ww")
    assert installed.run("man", "-w", "rbdfs").endswith("/man8/rbdfs.8\n")


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("mo", "mount"),
        ("mount --allow", "mount --allow-other"),
        ("export --che", "export --checksum"),
        ("devcluster run --store b", "devcluster run --store bluestore"),
        ("mount --conf /etc/hostn", "mount --conf /etc/hostname"),
        ("mount /va", "mount /var"),
    ],
)
def test_a_shell_completes(installed: Host, shell: str, line: str, wanted: str, tmp_path: Path) -> None:
    assert completed(installed, shell, line, tmp_path).rstrip(" /") == wanted


def test_fish_completes(installed: Host, tmp_path: Path) -> None:
    def candidates(line: str) -> list[str]:
        said = installed.run("fish", "-c", f"complete -C 'rbdfs {line}'", HOME=str(tmp_path))
        return [each.split("\t")[0] for each in said.splitlines()]

    assert candidates("mo") == ["mount"]
    assert candidates("mount --allow") == ["--allow-other"]
    assert candidates("devcluster run --store b") == ["bluestore"]
    assert candidates("mount --conf /etc/hostn") == ["/etc/hostname"]
    assert candidates("mount /va") == ["/var/"]


def test_systemd_has_nothing_to_say_against_the_unit(installed: Host) -> None:
    assert installed.run("systemd-analyze", "verify", "--man=yes", "rbdfs@mnt-rbdfs.service") == ""


def test_an_upgrade_leaves_a_mount_alive(installed: Host, checkout: Path, ceph: Ceph, mountpoint: Path) -> None:
    pool, log = ceph.unique("installed"), mountpoint.with_name("log")
    ceph.make_pool(pool)
    content = random_bytes(12 * MIB)
    for name in ("vm1", "later", "broken"):
        ceph.make_image(name, content, pool=pool)
    with ceph.ioctx(pool) as ioctx:
        with rbd.Image(ioctx, "broken", read_only=True) as image:
            header = f"rbd_header.{image.id()}"
        ioctx.remove_object(header)
    installed.run("mount", "-t", "fuse.rbdfs", "rbdfs", mountpoint, "-o", f"conf={ceph.conf},id=admin,log_file={log}")
    [process] = installed.processes
    started_with = installed.version

    def read(name: str, offset: int) -> bytes:
        dd = ("dd", f"if={mountpoint}/{pool}/{name}", f"skip={offset}", f"count={4 * MIB}", "bs=1M", "status=none")
        flags = "iflag=skip_bytes,count_bytes"
        return subprocess.run([*installed.prefix, *dd, flags], capture_output=True, check=True).stdout

    assert read("vm1", 0) == content[: 4 * MIB]
    said = installed.run(checkout / "examples" / "install.sh", "--system")
    assert f"{started_with} stays: it is in use by process {process}\n" in said
    assert installed.version != started_with
    assert "nothing was removed" in installed.run(checkout / "examples" / "install.sh", "--remove", status=1)

    assert installed.processes == [process]
    assert read("vm1", 6 * MIB) == content[6 * MIB : 10 * MIB]
    assert read("later", 0) == content[: 4 * MIB]
    assert installed.run("ls", mountpoint / pool).split() == ["broken", "later", "vm1"]
    assert "user.rbd.features=" in installed.run("getfattr", "-d", mountpoint / pool / "later")
    assert "Input/output error" in installed.run("cat", mountpoint / pool / "broken", status=1)
    assert "No such file" in installed.run("cat", mountpoint / pool / "none", status=1)
    assert f"cannot open {pool}/broken" in log.read_text()
    installed.run("umount", mountpoint)
    wait_until(lambda: not installed.processes)
    assert "Traceback" not in log.read_text()
    ceph.remove_pool(pool)

    said = installed.run(checkout / "examples" / "install.sh", "--system")
    assert f"rm -r {started_with}\n" in said
    assert installed.run("ls", "/opt/rbdfs").split() == [Path(installed.version).name, "manifest"]


def test_an_upgrade_that_fails_changes_nothing(installed: Host, checkout: Path, tmp_path: Path) -> None:
    before = installed.files()
    broken = tmp_path / "broken"
    shutil.copytree(checkout, broken)
    (broken / "pyproject.toml").write_text("no toml")
    assert "this failed" in installed.run(broken / "examples" / "install.sh", "--system", status=1)
    assert installed.files() == before


# From here on it is not installed any more.


def test_what_is_removed_is_all_that_was_installed_and_nothing_else(installed: Host, checkout: Path) -> None:
    install = checkout / "examples" / "install.sh"
    assert len(installed.files()) > len(installed.before) + 100
    assert "These stay:\n  Debian packages" in installed.run(install, "--remove")
    assert installed.files() == installed.before
    assert "there is nothing" in installed.run(install, "--remove", status=1)


def test_what_somebody_else_put_there_is_not_written_over(host: Host, checkout: Path) -> None:
    install = checkout / "examples" / "install.sh"
    host.run("ln", "-s", "/somewhere", "/usr/local/bin/rbdfs")
    before = host.files()
    assert "/usr/local/bin/rbdfs is there, and --system did not make it" in host.run(install, "--system", status=1)
    assert host.files() == before
    host.run("rm", "/usr/local/bin/rbdfs")
