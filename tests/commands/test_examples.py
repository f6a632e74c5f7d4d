"""The scripts and files in examples/ do what they say, on a real mount."""

import hashlib
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import rbd

from tests.cluster import CHECKOUT, MIB, Ceph, Mount, random_bytes, wait_until

Mounts = Callable[..., Mount]

EXAMPLES = CHECKOUT / "examples"
DISK = 8 * MIB
PARTITION_START = MIB
LINUX = 0x83


def run(*command: object, environment: dict[str, str], status: int = 0) -> str:
    """What a command wrote, errors included."""
    done = subprocess.run(
        [str(word) for word in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def snapshots(ceph: Ceph, name: str) -> list[str]:
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, name, read_only=True) as image:
        return [snapshot["name"] for snapshot in image.list_snaps()]


def ext4(folder: Path) -> bytes:
    """A file system with a text, a directory and random bytes, whose journal would have to be replayed."""
    files = folder / "files"
    (files / "etc").mkdir(parents=True)
    (files / "etc" / "hostname").write_text("vm1\n")
    (files / "random").write_bytes(random_bytes(3 * MIB))
    image = folder / "ext4"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", files, image, f"{DISK // MIB}M"], check=True)
    # What a snapshot of a mounted file system looks like: a read-only device with it can only be mounted by noload.
    subprocess.run(["debugfs", "-w", "-R", "feature needs_recovery", str(image)], check=True, capture_output=True)
    return image.read_bytes()


def partitioned(content: bytes) -> bytes:
    """A disk with a partition table (MBR) and one partition."""
    sectors = struct.pack("<II", PARTITION_START // 512, len(content) // 512)
    entry = struct.pack("<B3xB3x", 0, LINUX) + sectors
    return (bytes(446) + entry + bytes(48) + b"\x55\xaa").ljust(PARTITION_START, b"\0") + content


def test_a_file_is_restored_from_a_snapshot_through_a_loop_mount(
    ceph: Ceph, mount: Mount, environment: dict[str, str], tmp_path: Path
) -> None:
    plain, disk = ceph.unique("vm"), ceph.unique("vm")
    content = ext4(tmp_path)
    script, restored = EXAMPLES / "restore-file.sh", tmp_path / "restored"
    ceph.make_image(plain, content)
    ceph.make_image(disk, partitioned(content))
    with ceph.ioctx() as ioctx, rbd.Image(ioctx, plain) as image:
        image.create_snap("monday")
        image.discard(0, image.size())  # HEAD has no file system any more
    digest = hashlib.sha256(random_bytes(3 * MIB)).hexdigest()

    monday = mount.image(f"{plain}@monday")
    said = run(script, monday, "/random", "etc", restored, environment=environment)
    assert f"{digest}  /random\n" in said
    assert (restored / "random").read_bytes() == random_bytes(3 * MIB)
    assert (restored / "etc" / "hostname").read_text() == "vm1\n"

    said = run(
        *(script, "--snapshot", "--partition", 1, mount.image(disk), "/random", tmp_path / "second"),
        environment=environment,
    )
    assert f"{digest}  /random\n" in said
    assert snapshots(ceph, disk) == []

    assert "there is no /nothing in" in run(script, monday, "/nothing", restored, environment=environment, status=1)
    assert "has no partition 3" in run(
        *(script, "--partition", 3, "--snapshot", mount.image(disk), "/random", restored),
        environment=environment,
        status=1,
    )
    assert "say which one: --partition N" in run(
        script, mount.image(disk), "/random", restored, environment=environment, status=1
    )
    assert snapshots(ceph, disk) == []
    assert str(mount.path) not in run("losetup", "--list", environment=environment)
    wait_until(lambda: ceph.watchers(plain) == [])


def test_images_are_backed_up_by_restic_and_rsync_from_snapshots(
    ceph: Ceph, mount: Mount, environment: dict[str, str], tmp_path: Path
) -> None:
    names = [ceph.unique("vm"), ceph.unique("vm")]
    for seed, name in enumerate(names):
        ceph.make_image(name, random_bytes(5 * MIB, seed))
    images = [mount.image(name) for name in names]
    environment |= {"RESTIC_REPOSITORY": str(tmp_path / "repository"), "RESTIC_PASSWORD": "secret"}
    run("restic", "init", environment=environment)
    for changed in (images, images[:1]):
        run(EXAMPLES / "backup-restic.sh", *changed, environment=environment)
        run(EXAMPLES / "backup-rsync.sh", *changed, tmp_path / "copies", environment=environment)
        if changed == images:
            ceph.write_image(names[0], b"changed", 3 * MIB)
    for name in names:
        dump = ["restic", "dump", "--path", f"/rbd:{name}", "latest", f"/rbd:{name}"]
        restored = subprocess.run(dump, env=environment, check=True, capture_output=True).stdout
        assert restored == (tmp_path / "copies" / "rbd" / name).read_bytes() == ceph.exported(name)
        assert snapshots(ceph, name) == []
    assert b"changed" in ceph.exported(names[0])
    assert "is not in an rbdfs mount" in run(EXAMPLES / "backup-restic.sh", "/etc", environment=environment, status=1)


def test_the_lines_for_fstab_mount_through_mount_8(ceph: Ceph, environment: dict[str, str], tmp_path: Path) -> None:
    name = ceph.unique("fstab")
    ceph.make_image(name, b"content")
    lines = re.sub("(?m)^(#.*)?\n", "", (EXAMPLES / "fstab").read_text()).strip().splitlines()
    assert len(lines) == 2
    fstab, target = tmp_path / "fstab", tmp_path / "mnt"
    target.mkdir()
    for line in lines:
        text = re.sub(r"(?<= )/mnt/\S+", str(target), line)
        text = re.sub(r"(conf=\S+?,)?id=backup", f"conf={ceph.conf},id=admin", text.replace("pool=vms", "pool=rbd"))
        fstab.write_text(text + "\n")
        # mount(8) looks for helpers in /sbin only, here for that of all FUSE file systems, and the helper for rbdfs in
        # /usr/local/bin: in a mount namespace where they are ours.
        script = f"""
            set -e
            cd {tmp_path} # where no file is called rbdfs, which mount would take for the device
            mount --bind {EXAMPLES}/mount.fuse.rbdfs /usr/sbin/mount.fuse3
            mount --bind {tmp_path}/bin /usr/local/bin
            mount --fstab {fstab} {target}
            cat {target}/rbd/{name}
            stat --format ' %A %g' {target}/rbd
            mount --all --fstab {fstab} # sees that it is mounted
            umount {target}
        """
        said = run("unshare", "--mount", "bash", "-c", script, environment=environment)
        mode = "dr-xr-x---" if "umask" in line else "dr-xr-xr-x"
        assert said == f"content {mode} {6 if 'gid=6' in line else 0}\n"


def test_the_systemd_unit_leaves_what_a_mount_needs(ceph: Ceph, environment: dict[str, str], tmp_path: Path) -> None:
    unit = (EXAMPLES / "rbdfs@.service").read_text()
    found = re.search("^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    assert found is not None
    capabilities = ",".join(f"+{each.removeprefix('CAP_').lower()}" for each in found[1].split())
    target = tmp_path / "mnt"
    target.mkdir()
    limits = ("setpriv", "--no-new-privs", "--bounding-set", f"-all,{capabilities}")
    try:
        run(*limits, "rbdfs", "mount", "--allow-other", target, environment=environment)
        assert (target / "rbd").is_dir()
    finally:
        run("umount", "--lazy", target, environment=environment)
    assert "Protect" not in re.sub("(?m)^#.*", "", unit)  # a mount namespace of its own would hide the mount
