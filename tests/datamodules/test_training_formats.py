"""A selection in other tools' forms: the same turns and images whatever the dialect, with rows, ids and a card."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from icons.datamodules.dialects import dialect_named
from icons.datamodules.records import open_records
from icons.datamodules.training_formats import FORMATS, facts_of, write_training_data

LLAVA = {
    "id": "a",
    "image": "coco/1.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A bus."},
        {"from": "human", "value": "Red?"},
        {"from": "gpt", "value": "Yes"},
    ],
}
TEXT = {"id": "b", "conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}
TEXTS = [("user", "<image>\nWhat is it?"), ("assistant", "A bus."), ("user", "Red?"), ("assistant", "Yes")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "train.json").write_text(json.dumps([TEXT, LLAVA, {"broken": 1}]))
    return tmp_path / "train.json"


def written(data: Path, form: str, rows: list[int], **options: Any) -> Path:
    out = data.parent / "out"
    write_training_data(open_records(data), rows, out, form, **options)
    return out


def flat(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in content)


def examples(out: Path, form: str) -> list[dict[str, Any]]:
    if form == "llamafactory":
        (entry,) = json.loads((out / "dataset_info.json").read_text()).values()
        assert entry["formatting"] == "sharegpt" and entry["tags"]["user_tag"] == "user"
        return list(json.loads((out / entry["file_name"]).read_text()))
    if form == "datasets":
        datasets = pytest.importorskip("datasets")
        return list(datasets.load_from_disk(out / "dataset"))
    return [json.loads(line) for line in (out / "data.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMATS)
def test_every_form_holds_the_same_conversation(data: Path, form: str) -> None:
    out = written(data, form, [1, 0], image_root=Path("/images"), card={"rule": "vote | at 20 %"})
    one, two = examples(out, form)
    assert [(turn["role"], flat(turn["content"])) for turn in one["messages"]] == TEXTS
    assert one["images"] == ["/images/coco/1.jpg"] and two["images"] == []
    assert np.load(out / "rows.npy").tolist() == [1, 0] and (out / "ids.txt").read_text() == "a\nb\n"
    assert "| rule | vote   at 20 % |" in (out / "README.md").read_text()
    assert not (out / "images").exists()


def test_a_record_of_two_dialects_is_written_in_the_one_that_is_asked_for(data: Path) -> None:
    spoken = {"messages": [{"role": "user", "content": "Blue?"}, {"role": "assistant", "content": "No"}]}
    data.write_text(json.dumps([TEXT | spoken]))
    for name, asked in (("auto", "1 + 1?"), ("messages", "Blue?")):
        (example,) = examples(written(data, "trl", [0], dialect=dialect_named(name)), "trl")
        assert flat(example["messages"][0]["content"]) == asked


class InMemory(list[Any]):
    """Records that hold their images' bytes, as those of a Parquet file do."""

    path, fingerprint = Path("memory"), "0" * 16
    light = list.__getitem__

    def id(self, row: int) -> str:
        return str(row)

    def check_out(self, out: Path) -> Literal["file", "folder"]:
        return "file"

    def write_selection(self, rows: Any, out: Path) -> None:
        raise NotImplementedError


def test_images_that_records_bring_along_become_files(tmp_path: Path) -> None:
    png = b"\x89PNG\r\n\x1a\n-pretend"
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    records = InMemory([{"messages": turns, "images": [{"bytes": png, "path": None}]}])
    write_training_data(records, [0], tmp_path / "out", "swift")
    (example,) = examples(tmp_path / "out", "swift")
    assert example["messages"][0]["content"] == "<image>What?"
    (path,) = example["images"]
    assert Path(path) == tmp_path / "out" / "images" / "0-0.png" and Path(path).read_bytes() == png


def test_names_that_are_no_relative_paths_stay(data: Path) -> None:
    names = ["/abs/1.jpg", "https://a.b/1.jpg", "data:image/png;base64,AA==", "C:/1.jpg"]
    records = [LLAVA | {"image": name} for name in names]
    data.write_text(json.dumps(records))
    out = written(data, "trl", [0, 1, 2, 3], image_root=Path("/images"))
    assert [example["images"] for example in examples(out, "trl")] == [[name] for name in names]


def test_a_record_that_is_no_conversation_is_named(data: Path) -> None:
    with pytest.raises(ValueError, match=r"record 2 of .*train.json: .*; leave it out with --exclude"):
        written(data, "trl", [0, 2])
    assert not (data.parent / "out").exists()


def test_ids_are_one_a_line_whatever_they_hold(data: Path) -> None:
    data.write_text(json.dumps([{**TEXT, "id": "a\nb"}, TEXT]))
    assert (written(data, "trl", [0, 1]) / "ids.txt").read_text() == "a b\nb\n"


def test_an_unknown_form_is_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="format 'csv': expected one of llamafactory, trl, swift, datasets"):
        written(data, "csv", [0])


def test_the_package_datasets_is_named_where_it_is_missing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets.*pip install 'icons-lightning\[hf\]'"):
        written(data, "datasets", [0])


def test_the_card_says_where_the_rows_come_from() -> None:
    manifest = {
        "num_selected": 1200,
        "num_rows": 6000,
        "data": {"path": "train.json", "fingerprint": "abc"},
        "method": "vote",
        "fraction": 0.2,
        "thresholds": {"gqa": 0.1, "pope": 0.2},
        "scores": {"train": [{"model": {"path": "llava"}, "projector": {"kind": "count_sketch"}}]},
        "border": {"verdict": "all of it"},
    }
    facts = facts_of(manifest)
    assert facts["selected"] == "1,200 of 6,000 rows of train.json" and facts["rule"] == "vote at 20 %"
    assert facts["tasks"] == "gqa, pope" and facts["model"] == "llava" and facts["certain"] == "all of it"
