"""Where an export goes: zeros left out, and a file that has its name only when it is whole."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbdfs.errors import TargetError
from rbdfs.export import syscalls
from rbdfs.export.forced_file import ForcedFile
from rbdfs.export.journal import Journal, Origin
from rbdfs.export.new_file import NewFile, partial_path
from rbdfs.export.ranges import GRAIN, data_runs
from tests.cluster import MIB, random_bytes

ORIGIN = Origin("fsid", 1, "", "abc", 4, 8 * MIB)
LEAST = 64 * 1024

grains = st.lists(st.sampled_from([bytes(GRAIN), b"\1" * GRAIN, bytes(GRAIN - 1) + b"\1"]), max_size=12)


@given(grains, st.binary(max_size=GRAIN), st.integers(1, 4))
def test_runs_hold_all_data_and_no_long_run_of_zeros(whole: list[bytes], tail: bytes, least_grains: int) -> None:
    data, least = b"".join(whole) + tail, least_grains * GRAIN
    runs = list(data_runs(data, least))
    left_out, position = [], 0
    for start, end in runs:
        assert position <= start < end
        assert start % GRAIN == 0
        assert end % GRAIN == 0 or end == len(data)
        left_out.append((position, start))
        position = end
        assert bytes(least) not in data[start:end] or any(
            data[i : i + least] != bytes(least) for i in range(start, end - least + 1, GRAIN)
        )
        assert not any(data[i : i + least] == bytes(least) for i in range(start, end - least + 1, GRAIN))
    left_out.append((position, len(data)))
    assert not any(any(data[start:end]) for start, end in left_out)


def open_without_direct_io(path: str, flags: int, mode: int = 0o777, *, opener: Callable[..., int] = os.open) -> int:
    """As of a file system that has none."""
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "no direct I/O here")
    return opener(path, flags, mode)


@pytest.mark.parametrize("is_direct", [True, False])
@pytest.mark.parametrize("size", [3 * MIB, 3 * MIB + 1, 3 * MIB + 5000, 100])
def test_a_file_is_what_was_written_with_its_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, is_direct: bool
) -> None:
    if not is_direct:
        monkeypatch.setattr(os, "open", open_without_direct_io)
    content = random_bytes(size)
    content = content[: MIB // 2] + bytes(MIB)[: max(0, size - MIB // 2)] + content[MIB // 2 + MIB :]
    target = NewFile(tmp_path / "copy", size, LEAST, None, resume=False)
    for start in reversed(range(0, size, MIB)):
        target.write(start, content[start : start + MIB])
    assert not (tmp_path / "copy").exists()
    target.finish()
    assert (tmp_path / "copy").read_bytes() == content
    assert (tmp_path / "copy").stat().st_blocks * 512 <= max(0, size - MIB) + 2 * GRAIN or size < MIB
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_file_is_made_with_mode_0644_and_never_over_another(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    target = NewFile(path, 10, LEAST, None, resume=False)
    assert stat.S_IMODE(partial_path(path).stat().st_mode) == 0o644
    with pytest.raises(TargetError, match="--resume"):
        NewFile(path, 10, LEAST, None, resume=False)
    path.write_text("another's")
    with pytest.raises(TargetError, match="File exists"):
        target.finish()
    assert path.read_text() == "another's"
    target.abandon()
    with pytest.raises(TargetError, match="exists, and is not overwritten"):
        NewFile(path, 10, LEAST, None, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_rename_does_without_the_flag_that_some_file_systems_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OldLibc:
        pass

    monkeypatch.setattr(syscalls, "_libc", OldLibc())
    (tmp_path / "old").write_text("new content")
    (tmp_path / "taken").write_text("another's")
    with pytest.raises(FileExistsError):
        syscalls.rename_to_new(tmp_path / "old", tmp_path / "taken")
    syscalls.rename_to_new(tmp_path / "old", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "taken"]


def interrupted(path: Path, content: bytes, pieces: range) -> None:
    """Leave behind what an export leaves that was stopped after these pieces."""
    target = NewFile(path, len(content), LEAST, ORIGIN, resume=False)
    for start in pieces:
        target.write(start, content[start : start + pieces.step])
    assert "--resume" in target.abandon()


def test_what_was_written_is_found_again_and_what_is_damaged_is_not(tmp_path: Path) -> None:
    path, content = tmp_path / "copy", random_bytes(8 * MIB)
    interrupted(path, content, range(0, 4 * MIB, MIB))
    with partial_path(path).open("r+b") as file:
        file.seek(MIB + 77)
        file.write(b"not what was written")
    target = NewFile(path, len(content), LEAST, ORIGIN, resume=True)
    found = {start: target.verified(start, MIB) for start in range(0, 8 * MIB, MIB) if target.may_hold(start, MIB)}
    assert sorted(found) == [0, MIB, 2 * MIB, 3 * MIB]
    assert found.pop(MIB) is None
    assert all(data == content[start : start + MIB] for start, data in found.items())
    for start in (MIB, *range(4 * MIB, 8 * MIB, MIB)):
        target.write(start, content[start : start + MIB])
    target.finish()
    assert path.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_zeros_are_written_over_what_does_not_belong_there(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    interrupted(path, random_bytes(8 * MIB), range(0, 4 * MIB, MIB))
    partial_path(path).write_bytes(b"x" * (8 * MIB))
    target = NewFile(path, 8 * MIB, LEAST, ORIGIN, resume=True)
    assert not target.is_blank
    target.write(0, bytes(4 * MIB))
    target.skip(4 * MIB, 4 * MIB)
    target.finish()
    assert path.read_bytes() == bytes(8 * MIB)
    assert path.stat().st_blocks == 0


def test_a_partial_file_of_something_else_is_not_continued(tmp_path: Path) -> None:
    path, content = tmp_path / "copy", random_bytes(8 * MIB)
    interrupted(path, content, range(0, MIB, MIB))
    with pytest.raises(TargetError, match="another image"):
        NewFile(path, len(content), LEAST, ORIGIN._replace(snapshot_id=5), resume=True)
    other = tmp_path / "other"
    partial_path(other).write_text("a user's own file")
    with pytest.raises(TargetError, match="no journal"):
        NewFile(other, len(content), LEAST, ORIGIN, resume=True)
    assert partial_path(other).read_text() == "a user's own file"


def failing_fsync(descriptor: int) -> None:
    """A disk that has failed."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_what_could_not_be_synced_is_not_kept_to_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = tmp_path / "copy", random_bytes(4 * MIB)
    target = NewFile(path, len(content), LEAST, ORIGIN, resume=False)
    for start in range(0, 4 * MIB, MIB):
        target.write(start, content[start : start + MIB])
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing_fsync)
        with pytest.raises(TargetError, match="to the disk: Input/output error") as caught:
            target.finish()
    assert caught.value.errno == errno.EIO
    assert not os.listdir(tmp_path)
    assert target.abandon() == ""
    again = NewFile(path, len(content), LEAST, ORIGIN, resume=True)
    assert again.is_blank
    assert not any(again.may_hold(start, MIB) for start in range(0, 4 * MIB, MIB))
    again.abandon()
    assert not os.listdir(tmp_path)


def test_an_export_is_not_resumed_on_what_could_not_be_written_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = tmp_path / "copy", random_bytes(8 * MIB)
    interrupted(path, content, range(0, 4 * MIB, MIB))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing_fsync)
        with pytest.raises(TargetError, match="to the disk"):
            NewFile(path, len(content), LEAST, ORIGIN, resume=True)
    assert not os.listdir(tmp_path)


def test_two_exports_do_not_write_to_one_file(tmp_path: Path) -> None:
    first = NewFile(tmp_path / "copy", 8 * MIB, LEAST, ORIGIN, resume=False)
    with pytest.raises(TargetError, match="another export"):
        NewFile(tmp_path / "copy", 8 * MIB, LEAST, ORIGIN, resume=True)
    first.abandon()


@given(cut=st.integers(0, 400), flip=st.integers(0, 400))
def test_a_journal_that_was_cut_off_or_damaged_claims_less_and_nothing_wrong(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal"
    journal = Journal(path)
    journal.start(ORIGIN)
    pieces = {start: random_bytes(100, seed=start) for start in range(0, 1000, 100)}
    for start, data in pieces.items():
        journal.add(start, data)
    journal.close()
    stored = bytearray(path.read_bytes())
    records = stored.index(b"\n") + 1
    if records + flip < len(stored):
        stored[records + flip] ^= 0xFF
    path.write_bytes(stored[: max(records, len(stored) - cut)])
    again = Journal(path)
    assert again.resume(ORIGIN)
    for start in range(0, 1000, 100):
        assert again.confirms(start, pieces[start]) == again.claims(start, 100)
        assert not again.confirms(start, bytes(100))
    again.add(0, pieces[0])
    again.close()
    last = Journal(path)
    assert last.resume(ORIGIN)
    assert last.confirms(0, pieces[0])
    last.close()


def test_a_file_that_is_forced_holds_the_image_and_nothing_of_what_it_held(tmp_path: Path) -> None:
    path = tmp_path / "there"
    path.write_bytes(b"x" * (9 * MIB))
    target = ForcedFile(path, 4 * MIB, LEAST)
    target.write(MIB, b"y" * MIB)
    target.finish()
    assert path.read_bytes() == bytes(MIB) + b"y" * MIB + bytes(2 * MIB)
    assert os.listdir(tmp_path) == ["there"]
