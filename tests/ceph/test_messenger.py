"""Every way to talk to a cluster: the old protocol, the new one encrypted, IPv6. Each has a cluster of its own."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rbdfs.devcluster import conf
from tests.cluster import MIB, Ceph, Mount, random_bytes, rbdfs, running_ceph

Mounts = Callable[..., Mount]

ENCRYPTED = ("cluster", "service", "client", "mon cluster", "mon service", "mon client")
MESSENGERS = {
    "v1 only": ("v1:127.0.0.1:{port}", {"ms bind msgr1": "true", "ms bind msgr2": "false"}),
    "encrypted": (conf.MON_ADDRESS, {f"ms {who} mode": "secure" for who in ENCRYPTED}),
    "IPv6": (
        "v2:[::1]:{port}",
        {"ms bind ipv6": "true", "ms bind ipv4": "false", "public addr": "::1", "cluster addr": "::1"},
    ),
}
"""The monitor's address, and what the cluster and its clients are told."""


@pytest.fixture(scope="module", params=MESSENGERS)
def messenger(request: pytest.FixtureRequest) -> str:
    """How to talk."""
    return str(request.param)


@pytest.fixture(scope="module")
def ceph(messenger: str) -> Iterator[Ceph]:
    """A cluster that talks so, and not otherwise."""
    address, settings = MESSENGERS[messenger]
    lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conf, "MON_ADDRESS", address)
        patch.setattr(conf, "CONF", f"{conf.CONF}[global]\n{lines}")
        with running_ceph(store="memstore") as ceph:
            yield ceph


def test_an_image_is_listed_read_exported_and_mapped(
    ceph: Ceph, mount: Mount, tmp_path: Path, messenger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random_bytes(6 * MIB) + bytes(4 * MIB)
    ceph.make_image("vm1", content[: 6 * MIB])
    ceph.resize_image("vm1", len(content))
    assert os.listdir(mount.path / "rbd") == ["vm1"]
    assert mount.image("vm1").read_bytes() == content
    with mount.image("vm1").open("rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 8 * MIB
    assert os.getxattr(mount.image("vm1"), "user.rbd.object_size") == str(4 * MIB).encode()
    exported = rbdfs("export", "vm1", str(tmp_path / "vm1"), conf=ceph.conf)
    assert (tmp_path / "vm1").read_bytes() == content, exported.stderr
    assert len(json.loads(rbdfs("map", "--json", "vm1", conf=ceph.conf).stdout)["extents"]) == 3

    # It was that messenger, and no other.
    if messenger == "encrypted":
        monkeypatch.setenv("CEPH_ARGS", "--ms-mon-client-mode=crc --ms-client-mode=crc")
        assert rbdfs("map", "--connect-timeout", "2", "vm1", conf=ceph.conf).returncode == 1
    else:
        start = "v1:127.0.0.1:" if messenger == "v1 only" else "v2:[::1]:"
        osds = json.loads(ceph.run("ceph", "osd", "dump", "--format", "json"))["osds"]
        addresses = [f"{each['type']}:{each['addr']}" for osd in osds for each in osd["public_addrs"]["addrvec"]]
        assert addresses
        assert all(address.startswith(start) for address in addresses), addresses
