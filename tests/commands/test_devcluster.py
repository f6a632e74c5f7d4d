"""Real daemons, a second or three a cluster; what needs none is tried on a folder that only claims to have them."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rbdfs.commands import devcluster
from rbdfs.devcluster import cluster as devcluster_module
from rbdfs.devcluster.cluster import Devcluster, DevclusterOptions, free_port
from rbdfs.devcluster.daemon import running
from rbdfs.errors import RbdfsError, UsageError
from tests.cluster import CHECKOUT

RUN = """
import sys
from pathlib import Path
from rbdfs.commands import devcluster
from rbdfs.devcluster.cluster import DevclusterOptions
options = DevclusterOptions(Path(sys.argv[2]), store="memstore")
sys.exit(devcluster.up(options) if sys.argv[1] == "up" else devcluster.run(options, sys.argv[3:]))
"""


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def rbd(cluster: Devcluster, *arguments: str) -> str:
    command = ["rbd", "--conf", str(cluster.conf), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def daemons_of(folder: Path) -> list[int]:
    """The pids of all processes that name the folder's configuration, recorded or not."""
    conf = os.fsencode(folder / "ceph.conf")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if conf in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def script(*arguments: object) -> subprocess.Popen[str]:
    """`up` or `run` as a process of its own, which signals can be sent to, also where pytest itself ignores SIGINT."""
    command = ["env", "--default-signal=INT", sys.executable, "-c", RUN, *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def claim(folder: Path) -> Devcluster:
    """A folder that says that it has a cluster."""
    folder.mkdir()
    state = {"fsid": "", "port": 0, "osds": 1, "store": "bluestore", "block_bytes": 0, "run_dir": str(folder / "run")}
    (folder / "devcluster.json").write_text(json.dumps({**state, "ready": True}))
    return Devcluster(DevclusterOptions(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "cluster"
    yield path
    Devcluster(DevclusterOptions(path)).down()
    assert daemons_of(path) == []


def test_up_prints_the_export_line_alone_and_is_idempotent(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert devcluster.up(DevclusterOptions(folder)) == 0
        assert capsys.readouterr().out == f"export CEPH_CONF={folder}/ceph.conf\n"
    assert len(daemons_of(folder)) == 3
    assert devcluster.status(folder) == 0
    assert "osd.0   pid" in capsys.readouterr().out
    rbd(Devcluster(DevclusterOptions(folder)), "create", "vm1", "--size", "1M")
    assert devcluster.down(folder, keep=False) == 0
    assert daemons_of(folder) == []
    assert not folder.exists()
    assert devcluster.status(folder) == 3


def test_a_cluster_that_was_stopped_and_kept_and_an_osd_that_was_killed_come_back_with_their_data(folder: Path) -> None:
    cluster = Devcluster(DevclusterOptions(folder))
    cluster.up()
    rbd(cluster, "create", "vm1", "--size", "1M")
    cluster.kill_daemon("osd.0")
    assert cluster.status().pids["osd.0"] is None
    assert not cluster.status().running
    cluster.start_daemon("osd.0")
    assert rbd(cluster, "ls") == "vm1\n"
    assert cluster.down(keep=True)
    assert daemons_of(folder) == []
    assert cluster.up()
    assert rbd(cluster, "ls") == "vm1\n"


def test_with_three_osds_pools_keep_three_copies_and_images_can_have_their_data_in_an_erasure_coded_pool(
    folder: Path,
) -> None:
    cluster = Devcluster(DevclusterOptions(folder, osds=3, store="memstore"))
    cluster.up()
    dump = ["ceph", "--conf", str(cluster.conf), "osd", "dump", "--format", "json"]
    pools = json.loads(subprocess.run(dump, check=True, capture_output=True, timeout=120).stdout)["pools"]
    assert [pool["pool_name"] for pool in pools] == ["rbd", "ec"]
    for pool in pools:
        assert (pool["size"], pool["min_size"], list(pool["application_metadata"])) == (3, 2, ["rbd"])
    (profile,) = [pool["erasure_code_profile"] for pool in pools if pool["pool_name"] == "ec"]
    show = ["ceph", "--conf", str(cluster.conf), "osd", "erasure-code-profile", "get", profile]
    said = subprocess.run(show, check=True, capture_output=True, text=True, timeout=120).stdout.split()
    assert {"k=2", "m=1", "crush-failure-domain=osd"} <= set(said)
    rbd(cluster, "create", "vm1", "--size", "8M", "--data-pool", "ec")
    for size in ("4M", "4K"):  # written, and written over
        rbd(cluster, "bench", "--io-type", "write", "--io-size", size, "--io-total", size, "vm1")


def test_two_devclusters_started_at_the_same_moment_do_not_collide(tmp_path: Path) -> None:
    clusters = [Devcluster(DevclusterOptions(tmp_path / name, store="memstore")) for name in ("one", "two")]
    try:
        with ThreadPoolExecutor() as pool:
            assert list(pool.map(Devcluster.up, clusters)) == [True, True]
        rbd(clusters[0], "create", "vm1", "--size", "1M")
        assert rbd(clusters[1], "ls") == ""
    finally:
        for cluster in clusters:
            cluster.down()


def test_a_mon_whose_port_was_taken_gets_another(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Devcluster(DevclusterOptions(folder, store="memstore"))
    first.up()
    taken = json.loads((folder / "devcluster.json").read_text())["port"]
    offered = iter([taken, free_port()])
    monkeypatch.setattr(devcluster_module, "free_port", lambda: next(offered))
    second = Devcluster(DevclusterOptions(tmp_path / "second", store="memstore"))
    try:
        second.up()
        assert next(offered, None) is None
        rbd(second, "create", "vm1", "--size", "1M")
        assert rbd(first, "ls") == ""
    finally:
        second.down()


def test_a_folder_name_too_long_for_a_socket_works_and_leaves_nothing_in_tmp(tmp_path: Path) -> None:
    cluster = Devcluster(DevclusterOptions(tmp_path / ("long" * 30), osds=2, store="memstore"))
    try:
        cluster.up()
        run_dir = Path(json.loads((cluster.folder / "devcluster.json").read_text())["run_dir"])
        assert (run_dir / "ceph-osd.1.asok").is_socket()
    finally:
        cluster.down()
    assert not run_dir.exists()


def test_run_exits_with_the_commands_status_and_removes_the_cluster(folder: Path) -> None:
    with script("run", folder, "sh", "-c", "rbd ls && echo $CEPH_CONF && exit 7") as process:
        out, _ = process.communicate()
    assert (process.returncode, out) == (7, f"{folder}/ceph.conf\n")
    assert daemons_of(folder) == []
    assert not folder.exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_run_hands_a_signal_to_its_command_and_removes_the_cluster(folder: Path, signum: signal.Signals) -> None:
    with script("run", folder, "sh", "-c", "echo $$; exec sleep 60") as process:
        assert process.stdout is not None
        command = int(process.stdout.readline())
        process.send_signal(signum)
        assert process.wait() == 128 + signum
    assert not Path(f"/proc/{command}").exists()
    assert daemons_of(folder) == []
    assert not folder.exists()


def test_up_that_is_interrupted_leaves_nothing(folder: Path) -> None:
    with script("up", folder) as process:
        until(lambda: running(folder))
        process.terminate()
        out, _ = process.communicate()
    assert (process.returncode, out) == (128 + signal.SIGTERM, "")
    assert daemons_of(folder) == []
    assert not folder.exists()


def test_a_daemon_that_does_not_start_is_named_with_its_reason_and_its_log(folder: Path) -> None:
    with pytest.raises(
        RbdfsError, match=r"^osd\.0 mkfs failed: .*allocation failed.*; see .*/log/osd\.0\.log$"
    ) as caught:
        Devcluster(DevclusterOptions(folder, block_bytes=1 << 20)).up()
    assert "\n" not in str(caught.value)
    assert daemons_of(folder) == []
    assert (folder / "log" / "osd.0.log").exists()


def test_missing_programs_are_named_with_their_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UsageError, match=r"ceph-osd.*apt install ceph-mon ceph-mgr ceph-osd ceph-common"):
        Devcluster(DevclusterOptions(folder)).up()
    assert not folder.exists()


def test_a_folder_with_other_things_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("draft")
    cluster = Devcluster(DevclusterOptions(tmp_path))
    for refused in (cluster.up, cluster.down, cluster.status):
        with pytest.raises(UsageError, match="not empty, and not a devcluster"):
            refused()
    assert (tmp_path / "thesis.txt").read_text() == "draft"


def test_down_stops_its_own_processes_only(tmp_path: Path) -> None:
    cluster = claim(tmp_path / "cluster")
    with subprocess.Popen(["tail", "-f", "/dev/null", "--", "--conf", cluster.conf, "--id", "a"]) as stranger:
        try:
            until(lambda: daemons_of(cluster.folder) == [stranger.pid])
            assert set(cluster.status().pids.values()) == {None}
            assert cluster.down()
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_down_does_not_stop_the_cluster_of_a_container_in_a_folder_of_the_same_name(tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    program = f"{shlex.quote(sys.executable)} -m rbdfs devcluster"
    inside = f"mount -t tmpfs container {tmp_path} && {program} up {folder} && read -r _; {program} down {folder}"
    command = ["unshare", "--mount", "sh", "-c", inside]
    with subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as container:
        try:
            assert container.stdout
            assert container.stdout.readline()
            daemons = daemons_of(folder)
            assert len(daemons) == 3
            cluster = claim(folder)
            assert set(cluster.status().pids.values()) == {None}
            assert cluster.down()
            assert daemons_of(folder) == daemons
        finally:
            container.communicate(b"\n")
    assert container.returncode == 0
    assert daemons_of(folder) == []


def test_down_keeps_what_others_put_into_the_folder(tmp_path: Path) -> None:
    cluster = claim(tmp_path / "cluster")
    (cluster.folder / "notes.txt").write_text("mine")
    assert cluster.down()
    assert [path.name for path in cluster.folder.iterdir()] == ["notes.txt"]
