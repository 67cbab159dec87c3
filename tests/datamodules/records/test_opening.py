"""Any form of data file opens as records, told by its content; what is no data is one line. Oracle: `datasets`."""

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from icons.datamodules.records import RecordError, open_records

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICONS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def made() -> datasets.Dataset:
    """Four records as The Cauldron has them, images embedded."""
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")}),
        }
    )
    rows = [
        {
            "id": f"r{row}",
            "images": [{"bytes": png(colour), "path": None}],
            "texts": [{"user": "Which?", "assistant": colour}],
        }
        for row, colour in enumerate(COLOURS)
    ]
    return datasets.Dataset.from_list(rows, features=features)


def saved(made: datasets.Dataset, folder: Path) -> Path:
    made.save_to_disk(folder / "saved")
    return folder / "saved"


def parquet(made: datasets.Dataset, folder: Path) -> Path:
    made.to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def shards(made: datasets.Dataset, folder: Path) -> Path:
    for place in range(2):
        made.shard(2, place, contiguous=True).to_parquet(folder / f"train-{place}.parquet")
    return folder / "train-*.parquet"


def arrow(made: datasets.Dataset, folder: Path) -> Path:
    made.save_to_disk(folder / "other")
    return next((folder / "other").glob("*.arrow"))


def folder_of_parquet(made: datasets.Dataset, folder: Path) -> Path:
    (folder / "hub" / "data").mkdir(parents=True)
    shards(made, folder / "hub" / "data")
    return folder / "hub"


FORMS = {"saved": saved, "parquet": parquet, "pattern": shards, "arrow": arrow, "folder of parquet": folder_of_parquet}
OUT = {"saved": "selected", "parquet": "selected.parquet", "pattern": "selected.parquet", "arrow": "selected.arrow"}


@pytest.mark.parametrize("form", FORMS)
def test_row_i_is_row_i_with_its_image_as_bytes(form: str, made: datasets.Dataset, tmp_path: Path) -> None:
    found = open_records(FORMS[form](made, tmp_path))
    assert len(found) == 4
    for row, colour in enumerate(COLOURS):
        assert found[row]["texts"] == made[row]["texts"]
        assert found[row]["images"] == [{"bytes": png(colour), "path": None}]
        assert found.light(row)["images"] == [{"bytes": b"", "path": None}]
        assert found.id(row) == f"r{row}"
    assert pickle.loads(pickle.dumps(found))[3] == found[3]
    with pytest.raises(IndexError, match="row 4; expected 0 to 3"):
        found[4]


@pytest.mark.parametrize("form", FORMS)
def test_a_selection_has_the_form_of_its_data(form: str, made: datasets.Dataset, tmp_path: Path) -> None:
    found = open_records(FORMS[form](made, tmp_path))
    out = tmp_path / OUT.get(form, "selected.parquet")
    for _ in range(2):  # again, over what is there
        found.write_selection([0, 2, 3], out)
    again = open_records(out)
    assert [again[row] for row in range(len(again))] == [found[row] for row in (0, 2, 3)]
    if out.suffix == ".parquet":
        foreign = datasets.load_dataset("parquet", data_files=str(out), split="train", cache_dir=str(tmp_path / "c"))
    else:
        foreign = datasets.Dataset.from_file(str(out)) if out.is_file() else datasets.load_from_disk(str(out))
    assert foreign.features == made.features
    assert foreign[1]["images"][0].getpixel((0, 0)) == (0, 0, 255)
    assert not [left for left in tmp_path.iterdir() if "partial" in left.name]


def test_the_fingerprint_is_that_of_the_content(made: datasets.Dataset, tmp_path: Path) -> None:
    first = open_records(parquet(made, tmp_path)).fingerprint
    (tmp_path / "copy").mkdir()
    assert open_records(parquet(made, tmp_path / "copy")).fingerprint == first
    (tmp_path / "other").mkdir()
    assert open_records(parquet(made.select([1, 0, 2, 3]), tmp_path / "other")).fingerprint != first
    assert open_records(made).fingerprint != open_records(made.select([1, 0, 2, 3])).fingerprint


def test_a_dataset_object_is_read_as_it_is(made: datasets.Dataset) -> None:
    found = open_records(made.select([2, 1]))
    assert [found.id(row) for row in range(2)] == ["r2", "r1"]
    with pytest.raises(TypeError, match=r"got list; expected a path or a datasets\.Dataset"):
        open_records([1])


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as written:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            written.addfile(member, io.BytesIO(content))
    return path


def turns(**fields: Any) -> bytes:
    said = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "red"}]
    return json.dumps({"conversations": said, **fields}).encode()


def test_a_webdataset_is_records_with_their_images(tmp_path: Path) -> None:
    tar(
        tmp_path / "a-0.tar",
        {
            "x/1.json": turns(),
            "x/1.png": png("red"),
            "x/2.png": png("green"),
            "x/2.json": turns(image="2.png", id="own"),
        },
    )
    tar(tmp_path / "a-1.tar", {"3.jpg": b"-", "4.json": b"{", "5.json": turns(image="elsewhere/5.png")})
    found = open_records(tmp_path / "a-*.tar")
    assert [found.id(row) for row in range(5)] == ["x/1", "own", "3", "4", "5"]
    assert found[0]["images"] == [{"path": "x/1.png", "bytes": png("red")}]
    assert found[1]["image"] == {"path": "x/2.png", "bytes": png("green")}
    assert found.light(1)["image"]["bytes"] == b""
    assert found[4]["image"] == "elsewhere/5.png"
    for row, reason in ((2, "the sample 3 has no .json file"), (3, "not valid JSON")):
        with pytest.raises(RecordError, match=reason):
            found[row]
    found.write_selection([1, 4], tmp_path / "selected.tar")
    again = open_records(tmp_path / "selected.tar")
    assert [again[row] for row in range(2)] == [found[1], found[4]]
    assert again.fingerprint != found.fingerprint


NO_DATA: dict[str, tuple[bytes, str]] = {
    "gzip.json": (gzip.compress(b'{"id": 1}\n' * 99), "is packed with gzip, .* gunzip -k it"),
    "utf16.json": ("[]".encode("utf-16"), "is in UTF-16; expected UTF-8: iconv"),
    "binary.jsonl": (b"{\0\0", "is a binary file; expected JSON or JSONL"),
    "table.csv": (b"id,text\n1,a\n", "begins with 'id,text', and no line near its beginning with a JSON object"),
    "page.json": (b"<html>", "is a web page"),
    "bad.parquet": (b"PAR1" + bytes(50), "cannot be read as a Hugging Face data set"),
}


@pytest.mark.parametrize("name", NO_DATA)
def test_what_is_no_data_is_one_line(name: str, tmp_path: Path) -> None:
    content, message = NO_DATA[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_records(tmp_path / name)
    assert "\n" not in str(error.value)


def test_places_without_data_are_one_line(made: datasets.Dataset, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file has such a name"):
        open_records(tmp_path / "*.parquet")
    with pytest.raises(FileNotFoundError, match="no such data file"):
        open_records(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="a folder without a data set"):
        open_records(tmp_path)
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="holds the splits test, train; expected one"):
        open_records(tmp_path / "splits")
    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):
        made.to_parquet(tmp_path / "hub" / f"{split}-0.parquet")
    with pytest.raises(ValueError, match="holds test, train; expected one split"):
        open_records(tmp_path / "hub")
    (tmp_path / "hub" / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"of the forms \.json, \.parquet; expected one form"):
        open_records(tmp_path / "hub" / "*")
    (tmp_path / "hub" / "b.json").write_text("{}")
    with pytest.raises(ValueError, match="names 2 JSON files; expected one"):
        open_records(tmp_path / "hub" / "*.json")
    with pytest.raises(ValueError, match="nobody/nothing:part@test: neither a file nor a data set that the hub gives"):
        open_records("nobody/nothing:part@test")
    (tmp_path / "cut.tar").write_bytes(tar(tmp_path / "a.tar", {"a.json": bytes(4096)}).read_bytes()[:1500])
    with pytest.raises(ValueError, match="is a damaged tar"):
        open_records(tmp_path / "cut.tar")
    with pytest.raises(ValueError, match="holds no file; expected a WebDataset"):
        open_records(tar(tmp_path / "empty.tar", {".x": b""}))


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (parquet, "out.json", r"is a Hugging Face data set; expected a \.parquet file"),
        (saved, "out.jsonl", "expected a folder, or a .parquet or .arrow file"),
        (lambda made, folder: tar(folder / "a.tar", {"1.json": turns()}), "out.json", r"expected a \.tar file"),
    ],
)
def test_a_selection_is_not_called_as_another_form(
    make: Callable[[datasets.Dataset, Path], Path], name: str, message: str, made: datasets.Dataset, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        open_records(make(made, tmp_path)).write_selection([0], tmp_path / name)
    (tmp_path / "data.json").write_text("[{}]")
    with pytest.raises(ValueError, match=r"is JSON; expected a \.json or \.jsonl file"):
        open_records(tmp_path / "data.json").check_out(tmp_path / "a.parquet")


def test_a_machine_without_the_package_is_told_so(
    made: datasets.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(made, tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'icons-lightning\[hf\]'"):
        open_records(path)
