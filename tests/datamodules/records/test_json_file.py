"""Records by position: every form of file, damage, selections byte for byte, and an index that knows when it is old."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from icons.datamodules.records import RecordError, RecordIndex
from icons.datamodules.records import scan as scanning
from icons.datamodules.records.json_file import cache_file
from icons.datamodules.records.scan import scan


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ICONS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def record(number: int, text: str = "Is it red?") -> dict[str, Any]:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": f'"{text}" \\ {{[,'}]
    return {"id": f"r{number}", "image": f"{number}.jpg", "conversations": turns}


FORMS = {
    "list": lambda records: json.dumps(records),
    "indented list": lambda records: json.dumps(records, indent=2, ensure_ascii=False),
    "lines": lambda records: "".join(json.dumps(entry) + "\n" for entry in records),
    "lines, no newline at the end": lambda records: "\n".join(json.dumps(entry) for entry in records),
    "windows lines": lambda records: "\r\n".join(json.dumps(entry) for entry in records),
    "object": lambda records: json.dumps({entry["id"]: entry for entry in records}),
    "indented object": lambda records: json.dumps({entry["id"]: entry for entry in records}, indent=1),
}


def write(path: Path, form: str, records: list[dict[str, Any]]) -> Path:
    path.write_bytes(FORMS[form](records).encode())
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 2, 17])
def test_every_form_gives_the_same_records(tmp_path: Path, form: str, count: int) -> None:
    records = [record(number) for number in range(count)]
    index = RecordIndex(write(tmp_path / "data.json", form, records))
    assert [index[row] for row in range(len(index))] == records
    assert [msgspec.json.decode(index.raw(row)) for row in range(count)] == records


@pytest.mark.parametrize("block", [3, 17, 64])
@pytest.mark.parametrize("form", ["list", "indented list", "lines", "object"])
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(alphabet='a"\\{}[],:\né ', max_size=12), min_size=1, max_size=5))
def test_any_text_at_any_block_border(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, block: int, texts: list[str]
) -> None:
    monkeypatch.setattr(scanning, "BLOCK", block)
    records = [record(number, text) for number, text in enumerate(texts)]
    path = write(tmp_path / "data.json", form, records)
    content = path.read_bytes()
    found = [content[begin:end] for begin, end in scan(path).ranges.tolist()]
    if form == "object":
        found = [b"{" + entry + b"}" for entry in found]
        records = [{entry["id"]: entry} for entry in records]  # type: ignore[misc]
    assert [json.loads(entry) for entry in found] == records


def test_an_empty_list_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("[ \n]")
    assert len(RecordIndex(tmp_path / "data.json")) == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_selection_is_byte_for_byte_what_stood_in_the_file(tmp_path: Path, form: str) -> None:
    index = RecordIndex(write(tmp_path / "data.json", form, [record(number) for number in range(6)]))
    index.write_selection([1, 2, 5], tmp_path / "selected.json")
    selected = RecordIndex(tmp_path / "selected.json")
    assert [selected.entry(row) for row in range(3)] == [index.entry(row) for row in (1, 2, 5)]
    assert selected.layout.form == index.layout.form
    if index.layout.form != "lines":
        json.loads((tmp_path / "selected.json").read_text())
    assert not list(tmp_path.glob("*.partial"))


def test_a_broken_line_keeps_its_row_and_the_others_theirs(tmp_path: Path) -> None:
    lines = [json.dumps(record(0)), '{"id": "r1", ', "", json.dumps(record(2))]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    index = RecordIndex(tmp_path / "data.jsonl")
    assert len(index) == 3  # the blank line is no record
    assert index[2] == record(2)
    with pytest.raises(RecordError):
        index[1]


def test_a_broken_first_line_does_not_make_it_another_form(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"id": oops\n' + json.dumps(record(1)))
    index = RecordIndex(tmp_path / "data.jsonl")
    assert (len(index), index[1]) == (2, record(1))


@pytest.mark.parametrize(
    "first", ['{"a": {"b": ', '{"a":' * 5000 + "1" + "}" * 5000, '{"meta": {"kind": NaN}, "id": "r0"}'], ids=len
)
def test_a_first_line_with_an_object_inside_costs_its_row_alone(tmp_path: Path, first: str) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join([first, json.dumps(record(1)), json.dumps(record(2))]))
    index = RecordIndex(tmp_path / "data.jsonl")
    assert len(index) == 3 and [index[row] for row in (1, 2)] == [record(1), record(2)]
    assert index.id(0) == ("r0" if "NaN" in first else "")


def test_nan_and_bad_text_cost_their_record_at_most(tmp_path: Path) -> None:
    lines = [
        b'{"id": NaN, "text": "a"}',
        b'{"id": "b", "score": Infinity}',
        b'{"id": "\xff"}',
        b'{"id": [1]}',
        b'{"id": ""}',
    ]
    (tmp_path / "data.jsonl").write_bytes(b"\n".join(lines))
    index = RecordIndex(tmp_path / "data.jsonl")
    assert index[0]["text"] == "a" and index[1]["score"] == float("inf")
    with pytest.raises(RecordError, match="not valid JSON"):
        index[2]
    assert [index.id(row) for row in range(5)] == ["", "b", "", "", ""]


def test_a_record_of_a_list_that_is_no_object_keeps_its_row(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([record(0), None, "text", 7, [], record(5)]))
    index = RecordIndex(tmp_path / "data.json")
    assert [index[row] for row in range(6)] == [record(0), None, "text", 7, [], record(5)]


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    for form in ("list", "lines"):
        (tmp_path / form).write_bytes(b"\xef\xbb\xbf" + FORMS[form]([record(0), record(1)]).encode())
        assert RecordIndex(tmp_path / form)[0] == record(0)


def test_files_that_are_no_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such data file; expected JSON or JSONL"):
        RecordIndex(tmp_path / "nothing.json")
    data = tmp_path / "data.json"
    for content, message in {
        "": "the file is empty",
        "17": "begins with '17'; expected a list",
        json.dumps([record(0), record(1)])[:-9]: "the file ends .*; expected a whole JSON list",
        '[{"id": "a}]': "the file ends inside a string",
        "[1]]": "a closing bracket too many",
    }.items():
        data.write_text(content)
        with pytest.raises(ValueError, match=message):
            RecordIndex(data)


def test_a_row_that_is_not_there(tmp_path: Path) -> None:
    index = RecordIndex(write(tmp_path / "data.json", "list", [record(0)]))
    for row in (1, -1):
        with pytest.raises(IndexError, match="expected 0 to 0"):
            index[row]


def test_the_index_is_kept_and_made_anew_when_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data.json", "list", [record(0), record(1)])
    first = RecordIndex(path)
    with monkeypatch.context() as patch:
        patch.setattr("icons.datamodules.records.json_file.scan", lambda path: pytest.fail("scanned again"))
        again = RecordIndex(path)
    assert (again[1], again.fingerprint) == (record(1), first.fingerprint)
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"r1", b"s1"))  # same size, and the same time
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = RecordIndex(path)
    assert changed[1]["id"] == "s1"
    assert changed.fingerprint != first.fingerprint


def test_a_damaged_cache_costs_a_scan_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", "list", [record(0)])
    RecordIndex(path)
    for kept in cache_file(path).parent.iterdir():
        kept.write_bytes(b"\x00")
    assert RecordIndex(path)[0] == record(0)


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ICONS_CACHE", str(tmp_path / "file" / "cache"))
    assert len(RecordIndex(write(tmp_path / "data.json", "list", [record(0)]))) == 1


def test_an_index_travels_to_another_process(tmp_path: Path) -> None:
    index = RecordIndex(write(tmp_path / "data.json", "list", [record(0), record(1)]))
    index[0]
    assert pickle.loads(pickle.dumps(index))[1] == record(1)
