"""What Ceph reads from the folder: the text of ceph.conf and of the keyring."""

import base64
import dataclasses
import os
import re
import struct
import time
from pathlib import Path

from rbdfs.devcluster.state import State

# Characters that a ceph.conf or its lists of files give a meaning of their own.
UNSAFE_IN_CONF = re.compile(r"[\s#;,=$\"'\\]")

SHARDS = 3
"""Copies of an object, and shards of an erasure-coded one, if there are so many OSDs; else an object has one copy."""

MON_ADDRESS = "v2:127.0.0.1:{port}"

CONF = """\
# Written by rbdfs devcluster at each start.
[global]
fsid = {fsid}
mon host = {mon_address}
keyring = {folder}/keyring
run dir = {run_dir}
crash dir = {folder}/crash
public addr = 127.0.0.1
ms bind msgr1 = false
auth allow insecure global id reclaim = false
osd crush chooseleaf type = 0
osd pool default size = {pool_size}
osd pool default erasure code profile = plugin=jerasure technique=reed_sol_van k=2 m=1 crush-failure-domain=osd
osd pool default pg autoscale mode = off
osd scrub min interval = 31536000
osd scrub max interval = 31536000
osd deep scrub interval = 31536000
# An OSD that was killed and comes back waits until reads of its former self are out of date: 0.8 of 20 s by default.
osd pool default read lease ratio = 0.1
[mon]
mon data = {folder}/mon
log file = {folder}/log/$name.log
mon cluster log file = {folder}/log/cluster.log
mon allow pool delete = true
mon allow pool size one = true
mon warn on pool no redundancy = false
# Without it, RBD cannot write to an erasure-coded pool on memstores.
mon debug no require bluestore for ec overwrites = true
# A port that is taken is not waited for: we try another.
ms bind retry count = 1
mon data avail warn = 2
mon data avail crit = 1
# Changes are gathered for this long before they are committed; the default second is felt at each step of a start.
paxos propose interval = 0.05
# No modules but those that Ceph insists on.
mgr initial modules =
[mgr]
mgr data = {folder}/mgr
log file = {folder}/log/$name.log
# Each module that is merely loaded costs 0.2 s of CPU and 9 MiB.
mgr disabled modules = {idle_modules}
[osd]
osd data = {folder}/osd$id
log file = {folder}/log/$name.log
osd objectstore = {store}
bluestore block size = {block_bytes}
memstore device bytes = {block_bytes}
# Closing the device waits this long (default 250), twenty times in mkfs and start: `up` took 9 s so, 2.5 s now.
bdev aio poll ms = 10
"""
# Not needed here, and not "always on": without one of those the mgr reports HEALTH_ERR.
IDLE_MODULES = (
    "alerts cephadm cli_api dashboard diskprediction_local feedback hello influx insights iostat k8sevents localpool "
    "mds_autoscaler mirroring nfs osd_perf_query osd_support prometheus restful rgw rook selftest snap_schedule stats "
    "telegraf test_orchestrator zabbix"
)
CAPS = {
    "mon": 'mon = "allow *"',
    "client": 'mon = "allow *"|mgr = "allow *"|osd = "allow *"|mds = "allow *"',
    "mgr": 'mon = "allow profile mgr"|osd = "allow *"|mds = "allow *"',
    "osd": 'mon = "allow profile osd"|mgr = "allow profile osd"|osd = "allow *"',
}


def mon_address(state: State) -> str:
    """Where the mon listens, as Ceph writes it."""
    return MON_ADDRESS.format(port=state.port)


def conf_text(folder: Path, state: State) -> str:
    """The ceph.conf of daemons and clients alike."""
    return CONF.format(
        folder=folder,
        mon_address=mon_address(state),
        pool_size=SHARDS if state.osds >= SHARDS else 1,
        idle_modules=IDLE_MODULES,
        **dataclasses.asdict(state),
    )


def keyring_text(state: State) -> str:
    """New keys for all, as ceph-authtool writes them: type 1 (AES), time of creation, length, 16 random bytes."""
    text = ""
    for entity in ("mon.", "client.admin", *state.daemons[1:]):
        key = struct.pack("<HIIH", 1, int(time.time()), 0, 16) + os.urandom(16)
        text += f"[{entity}]\n\tkey = {base64.b64encode(key).decode()}\n"
        text += "".join(f"\tcaps {cap}\n" for cap in CAPS[entity.partition(".")[0]].split("|"))
    return text
