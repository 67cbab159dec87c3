"""The same records in any form and dialect give the same rows; a selection of them can be read by `datasets`."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from icons.cli import command_line as cli
from icons.store import GradientStore, ScoreStore

DATA = Path(__file__).parents[1] / "data" / "original_llava"
pytestmark = pytest.mark.filterwarnings("ignore")
PARTS = ["--model", DATA / "vicuna-tiny", "--vision-tower", DATA / "clip", "--mm-projector", DATA / "mm_projector.bin"]
PARTS += ["--adapter", DATA / "llava-tiny-lora", "--preconditioner", "none", "--dim", 64, "--dtype", "float32"]
ROLES = {"human": "user", "gpt": "assistant"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICONS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def run(data: Path, out: Path, *more: object) -> GradientStore:
    words = [
        "gradients",
        *PARTS,
        "--data",
        data,
        "--out",
        out,
        "--trainer.accelerator",
        "cpu",
        "--batch-size",
        1,
        *more,
    ]
    assert cli.main([str(word) for word in words]) == 0
    return GradientStore.open(out)


def as_messages(record: dict[str, Any]) -> dict[str, Any]:
    """A LLaVA record as chat messages, its image embedded."""
    said = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    name = record.get("image")
    images = [] if name is None else [{"bytes": (DATA / name).read_bytes(), "path": None}]
    return {"id": str(record["id"]), "messages": said, "images": images}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The records as a saved data set of messages with embedded images."""
    records = [as_messages(record) for record in json.loads((DATA / "data.json").read_text())]
    made = datasets.Dataset.from_list(records).cast_column("images", datasets.List(datasets.Image()))
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "data.parquet")
    return tmp_path


def test_parquet_and_json_give_the_same_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_store = run(DATA / "data.json", folder / "a.zarr", "--images", DATA)
    assert "3 rows, dialect llava (`conversations` of `from` and `value`)" in capsys.readouterr().out
    parquet = run(folder / "data.parquet", folder / "b.zarr", "--dialect", "messages")
    saved = run(folder / "saved", folder / "c.zarr")
    assert "3 rows, dialect messages" in capsys.readouterr().out
    assert np.array_equal(json_store.gradients[:], parquet.gradients[:])
    assert np.array_equal(parquet.gradients[:], saved.gradients[:])
    assert (parquet.statuses() == 1).all()


@pytest.mark.parametrize(("data", "out"), [("data.parquet", "chosen.parquet"), ("saved", "chosen")])
def test_a_selection_is_read_by_its_maker(
    data: str, out: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    influence = np.array([[0.1], [0.3], [0.2]], np.float32)
    store = ScoreStore.create(folder / "s.zarr", num_rows=3, tasks=["gqa"], manifest={}, chunk_rows=3)
    store.write_unit(0, influence, np.zeros_like(influence), np.ones(3, np.uint8))
    words = ["select", "--scores", folder / "s.zarr", "--data", folder / data, "--num-rows", 2, "--out", folder / out]
    for _ in range(2):  # a former selection is replaced
        assert cli.main([str(word) for word in words]) == 0
    if out.endswith(".parquet"):
        made = datasets.load_dataset("parquet", data_files=str(folder / out), split="train", cache_dir=str(folder))
    else:
        made = datasets.load_from_disk(str(folder / out))
    whole = datasets.load_from_disk(str(folder / "saved"))
    assert made["id"] == whole.select([1, 2])["id"]
    assert np.load(folder / f"{out}.rows.npy").tolist() == [1, 2]
    assert (folder / f"{out}.ids.txt").read_text().split() == list(made["id"])
    words[-1] = folder / "chosen.json"
    assert cli.main([str(word) for word in words]) == 1
    assert "a selection has the form of its data" in capsys.readouterr().err
