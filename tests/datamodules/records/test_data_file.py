"""A data file that others change while it is read, and what tells that it is still the same."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from icons.datamodules.records import RecordIndex, open_records
from icons.datamodules.records.data_file import SAMPLE_BYTES, SAMPLES, ChangedFileError, State, content_digest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICONS_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: int, letters: int = 10) -> Path:
    path.write_text(json.dumps([{"id": f"r{row}", "text": "x" * letters} for row in range(rows)]))
    return path


def large(path: Path) -> int:
    """Records above 262 KB, more than the blocks that are looked at; where one byte of one lies in none of these."""
    write(path, rows=800, letters=900)
    size = path.stat().st_size
    looked_at = np.linspace(0, size - SAMPLE_BYTES, SAMPLES).astype(int)
    return int(looked_at[10] + SAMPLE_BYTES + 600)


def overwrite(path: Path, place: int, content: bytes) -> None:
    """Changes bytes in place, and sets the time back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_edit_of_the_same_size_and_time_outside_the_blocks_looked_at_is_seen(tmp_path: Path) -> None:
    place = large(tmp_path / "data.json")
    assert (tmp_path / "data.json").stat().st_size > SAMPLES * SAMPLE_BYTES
    first = RecordIndex(tmp_path / "data.json")
    overwrite(tmp_path / "data.json", place, b"y")
    assert RecordIndex(tmp_path / "data.json").fingerprint != first.fingerprint


@pytest.mark.parametrize("how", ["cut short", "changed", "vanished", "replaced"])
@pytest.mark.parametrize("opened", [True, False])
def test_a_file_that_changes_while_it_is_read_is_one_error_and_no_failed_row(
    tmp_path: Path, how: str, opened: bool
) -> None:
    path = tmp_path / "data.json"
    large(path)
    index = RecordIndex(path)
    if opened:
        assert index[0]["id"] == "r0"
    if how == "cut short":
        os.truncate(path, 5000)
    elif how == "changed":
        with path.open("r+b") as file:
            file.write(b"[")
        os.utime(path, ns=(0, 0))
    else:
        path.unlink()
    if how == "replaced":
        write(path, rows=800)
    if opened and how in ("vanished", "replaced"):
        assert index[700]["id"] == "r700", "what was opened is still there"
        return
    said = {"cut short": "5,000 bytes, ", "changed": "its content", "vanished": "vanished", "replaced": "bytes, "}[how]
    with pytest.raises(ChangedFileError, match=rf"data.json: has .*{said}.*put the former one back and run the same"):
        index[700]


def test_a_file_that_is_cut_short_between_the_look_and_the_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large(tmp_path / "data.json")
    index = RecordIndex(tmp_path / "data.json")
    monkeypatch.setattr(State, "check", lambda *_: os.truncate(tmp_path / "data.json", 5000))
    with pytest.raises(ChangedFileError, match="was cut short while it was read; expected a file that stays as it is"):
        index[700]


def test_a_file_that_changes_while_a_selection_of_it_is_written_leaves_none(tmp_path: Path) -> None:
    large(tmp_path / "data.json")
    os.utime(tmp_path / "data.json", ns=(0, 0))
    index, out = RecordIndex(tmp_path / "data.json"), tmp_path / "selected.json"

    def rows() -> Iterator[int]:
        yield from range(500)
        with (tmp_path / "data.json").open("r+b") as file:
            file.seek(9000)
            file.write(b"x")
        yield 700

    with pytest.raises(ChangedFileError, match=r"data\.json: has changed while it was read \(its content\)"):
        index.write_selection(rows(), out)
    with pytest.raises(IndexError, match="row 801; expected 0 to 799"):
        RecordIndex(tmp_path / "data.json").write_selection([1, 801, 2], out)
    assert not list(tmp_path.glob("*selected*"))


def test_an_error_from_a_worker_is_its_line_alone() -> None:
    said = "Caught ChangedFileError in DataLoader worker process 0.\nOriginal Traceback ...\n  a line\n"
    assert (
        str(ChangedFileError(f"{said}icons.x.ChangedFileError: data.json: has changed\n")) == "data.json: has changed"
    )


def test_without_pread_the_same_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data.json", rows=2)
    monkeypatch.delattr(os, "pread")
    assert [RecordIndex(path)[row]["id"] for row in (1, 0)] == ["r1", "r0"]


def test_large_files_are_read_once_for_their_digest_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = large(tmp_path / "data.tar")
    monkeypatch.setattr("icons.datamodules.records.data_file.SMALL", 1000)
    first = content_digest(tmp_path / "data.tar")
    assert first == hashlib.sha256((tmp_path / "data.tar").read_bytes()).digest()
    with monkeypatch.context() as patch:
        patch.setattr("icons.datamodules.records.data_file.sha256", lambda path: pytest.fail("read again"))
        assert content_digest(tmp_path / "data.tar") == first
    overwrite(tmp_path / "data.tar", place, b"y")
    assert (
        content_digest(tmp_path / "data.tar") == hashlib.sha256((tmp_path / "data.tar").read_bytes()).digest() != first
    )


def test_a_tar_that_is_cut_short_while_it_is_read_is_an_error_and_no_broken_image(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:") as written:
        for name, content in (("1.json", b"{}"), ("1.jpg", bytes(5000))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            written.addfile(member, io.BytesIO(content))
    records = open_records(tmp_path / "a.tar")
    assert len(records[0]["images"][0]["bytes"]) == 5000
    os.truncate(tmp_path / "a.tar", 3000)
    with pytest.raises(ChangedFileError, match=r"a.tar: has changed while it was read \(3,000 bytes, 10,240 before\)"):
        records[0]


def test_a_mapped_table_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"id": [str(row) for row in range(9)]}).save_to_disk(tmp_path / "saved")
    records = open_records(tmp_path / "saved")
    assert records[3] == {"id": "3"}
    (file,) = (tmp_path / "saved").glob("*.arrow")
    os.truncate(file, 10)
    with pytest.raises(ChangedFileError, match=r"\.arrow: has changed while it was read \(10 bytes, "):
        records[3]


def test_parquet_of_the_same_size_and_time_is_read_anew(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "data.parquet"
    for ids in (["aa", "ab"], ["ba", "bb"]):
        datasets.Dataset.from_dict({"id": ids}).to_parquet(path)
        os.utime(path, ns=(0, 10**18))
        assert [open_records(path)[row]["id"] for row in (0, 1)] == ids
