"""What a person reads when the monitors answer and no OSD does."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rbdfs.ceph.connection import connect
from rbdfs.ceph.connection.connect import why_no_osd_answers

NAME = "client.backup"
EPERM = -1


class FakeMonitors:
    """Answers what a test gave it, and refuses what it did not."""

    def __init__(self, **answers: object) -> None:
        self._answers = answers

    def mon_command(self, cmd: str, inbuf: bytes, timeout: int) -> tuple[int, bytes, str]:  # noqa: ARG002
        command = json.loads(cmd)["prefix"].replace(" ", "_")
        if command not in self._answers:
            return EPERM, b"", "access denied"
        return 0, json.dumps(self._answers[command]).encode(), ""


def osds(*addresses: str, up: int = 1) -> dict[str, object]:
    """As `ceph osd dump` has them."""
    return {
        "osds": [
            {"osd": number, "up": up, "public_addrs": {"addrvec": [{"type": "v2", "addr": address, "nonce": 1}]}}
            for number, address in enumerate(addresses)
        ]
    }


@contextmanager
def listening(host: str, says: bytes) -> Iterator[str]:
    """The address of something that says this to whoever connects, once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:

        def serve() -> None:
            accepted, _ = server.accept()
            with accepted:
                accepted.sendall(says)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"[{host}]:{server.getsockname()[1]}" if ":" in host else f"{host}:{server.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("banner", [b"ceph v027", b"ceph v2\n"])
def test_osds_that_serve_others_lead_to_the_caps_of_the_key(
    host: str, banner: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "ASK_SECONDS", 60.0)
    with listening(host, banner) as address:
        said = why_no_osd_answers(FakeMonitors(osd_dump=osds(address), health={"checks": {"OSD_DOWN": {}}}), NAME)
    assert "client.backup may have no OSD caps (compare 'ceph auth get client.backup')" in said
    assert "it needs the caps mon 'profile rbd' osd 'profile rbd-read-only'" in said


def test_an_osd_that_is_not_reached_is_named_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "ASK_SECONDS", 0.1)
    with listening("127.0.0.1", b"SSH-2.0") as other, socket.create_server(("127.0.0.1", 0)) as stopped:
        silent = f"127.0.0.1:{stopped.getsockname()[1]}"
        said = why_no_osd_answers(FakeMonitors(osd_dump=osds(silent, other, "127.0.0.1:1")), NAME)
    assert f"this host cannot reach them, such as osd.0 at {silent}" in said


def test_the_status_of_a_cluster_that_is_not_well_is_in_its_own_words() -> None:
    message = "Reduced data availability: 8 pgs inactive"
    health = {"checks": {"PG_AVAILABILITY": {"severity": "HEALTH_WARN", "summary": {"message": message, "count": 8}}}}
    said = why_no_osd_answers(FakeMonitors(osd_dump=osds("127.0.0.1:1"), health=health), NAME)
    assert said == f"{message}; see 'ceph health detail'"


@pytest.mark.parametrize("answers", [{}, {"osd_dump": osds()}, {"osd_dump": osds("127.0.0.1:1", up=0)}])
def test_without_an_osd_that_is_up_it_says_so(answers: dict[str, object]) -> None:
    assert "none is up" in why_no_osd_answers(FakeMonitors(**answers), NAME)
