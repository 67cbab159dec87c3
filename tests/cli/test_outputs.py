"""No command writes over what is the user's: not over an input, not over what it has not made itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from icons.cli import main
from icons.store import GradientStore, ScoreStore

LLAVA = Path(__file__).parents[1] / "data" / "original_llava"
NUM_ROWS = 30
SCORES = np.random.default_rng(0).normal(size=(NUM_ROWS, 2)).astype(np.float32)


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a user has: data, a model in parts, an adapter, stores, a benchmark, notes; and works in that folder."""
    for name in ("vicuna-tiny", "clip", "llava-tiny-lora"):
        shutil.copytree(LLAVA / name, tmp_path / name)
    for name in ("mm_projector.bin", "img0.png", "data.json"):
        shutil.copyfile(LLAVA / name, tmp_path / name)
    (tmp_path / "train.jsonl").write_text("".join(f'{{"id": {row}}}\n' for row in range(NUM_ROWS)))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    (tmp_path / "notes.csv").write_text("rank,row\n")
    (tmp_path / "pope" / "val2014").mkdir(parents=True)
    scores = ScoreStore.create(tmp_path / "scores.zarr", num_rows=NUM_ROWS, tasks=["a", "b"], manifest={"dim": 64})
    scores.write_unit(0, SCORES, np.full_like(SCORES, 0.01), np.ones(NUM_ROWS, np.uint8))
    for name in ("train", "gqa"):
        fill(tmp_path / f"{name}.zarr")
    monkeypatch.chdir(tmp_path)
    assert main(["select", "--scores", "scores.zarr", "--data", "train.jsonl", "--out", "chosen.jsonl"]) == 0
    return tmp_path


def fill(path: Path, dim: int = 8) -> None:
    manifest = {"projector": {"kind": "count_sketch", "dim": dim, "seed": 0}, "data": {"fingerprint": path.name}}
    store = GradientStore.create(path, num_rows=NUM_ROWS, dim=dim, chunk_rows=NUM_ROWS, manifest=manifest)
    ones = np.ones(NUM_ROWS, np.float32)
    gradient = np.random.default_rng(dim).normal(size=(NUM_ROWS, dim)).astype(np.float32)
    store.write_unit(0, {"gradient": gradient, "norm": ones, "loss": ones, "tokens": ones, "status": ones})


MODEL = "--model vicuna-tiny --vision-tower clip --mm-projector mm_projector.bin"
LINES = {
    "warmup": f"warmup {MODEL} --data data.json --images .",
    "gradients": f"gradients {MODEL} --adapter llava-tiny-lora --data data.json --images . --preconditioner none",
    "factors": f"factors {MODEL} --adapter llava-tiny-lora --data data.json --images .",
    "influence": "influence --train train.zarr --task gqa=gqa.zarr",
    "score": "score --checkpoint llava-tiny-lora --data data.json --images . --task gqa=data.json",
    "validate": f"validate {MODEL} --data train.jsonl --scores v=scores.zarr --task a=data.json",
    "select": "select --scores scores.zarr --data train.jsonl",
    "compare": "compare chosen.jsonl train.jsonl",
    "report": "report --scores scores.zarr --data train.jsonl --selection chosen.jsonl",
    "export": f"export {MODEL} --adapter llava-tiny-lora",
    "demo": "demo",
}
FILES = ("factors", "select", "compare", "report")
# what each would do to the user: an input of its own, and something else
PLACES = [
    *((name, "notes") for name in LINES if name not in FILES),
    *((name, "notes/thesis.txt") for name in FILES),
    *((name, "vicuna-tiny") for name in ("warmup", "gradients", "validate", "export")),
    *((name, "llava-tiny-lora") for name in ("warmup", "gradients", "score", "export")),
    *((name, "vicuna-tiny/inside") for name in ("warmup", "gradients", "validate", "export")),
    *((name, ".") for name in LINES if name not in FILES),
    *((name, "train.jsonl") for name in FILES),
    ("factors", "data.json"),
    ("factors", "llava-tiny-lora/factors.safetensors"),
    ("select", "notes.csv"),
    ("compare", "chosen.jsonl"),
    ("compare", "chosen.jsonl.manifest.json"),
    ("report", "chosen.jsonl"),
    ("influence", "train.zarr"),
    ("influence", "gqa.zarr/inside"),
    ("gradients", "scores.zarr"),
]


@pytest.mark.parametrize(("command", "out"), PLACES)
def test_nothing_of_the_users_is_written_over(
    command: str, out: str, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(user)
    assert main([*LINES[command].split(), "--out", out]) == 1
    assert content(user) == before
    said = capsys.readouterr().err
    assert said.startswith(f"icons {command}: error: --out ") and len(said.splitlines()) == 1
    assert f"--out {out}: " in said and "expected " in said


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_table_and_figures_are_outputs_too(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*LINES["select"].split(), "--out", "new.jsonl"]
    for table, what in (("notes.csv", "is no former"), ("train.jsonl", "--data names"), ("new.jsonl", "--out names")):
        assert main([*line, "--table", table]) == 1
        assert f"--table {table}: " in (said := capsys.readouterr().err) and what in said
    (user / "new_figures").mkdir()
    (user / "new_figures" / "mine.png").touch()
    assert main([*LINES["report"].split(), "--out", "new.html", "--png"]) == 1
    assert "--png new_figures: holds mine.png" in capsys.readouterr().err


def test_a_command_replaces_its_own_former_output_unless_it_was_edited(
    user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*LINES["select"].split(), "--out", "chosen.jsonl", "--table", "table.csv"]
    assert main(line) == 0
    assert main([*line, "--fraction", "0.5"]) == 0
    assert len((user / "chosen.jsonl").read_text().splitlines()) == 15
    for edited in ("chosen.jsonl", "table.csv"):
        kept = (user / edited).read_bytes()
        (user / edited).write_bytes(kept + b"by hand\n")
        assert main(line) == 1
        assert f"{edited}: is there already, and is no former output of this command" in capsys.readouterr().err
        (user / edited).write_bytes(kept)
    for line in (
        [*LINES["report"].split(), "--out", "a.html", "--png"],
        [*LINES["compare"].split(), "--out", "a.json"],
    ):
        assert main(line) == 0
        assert main(line) == 0


def test_overwrite_is_the_users_word(user: Path) -> None:
    line = [*LINES["select"].split(), "--overwrite", "--out"]
    assert main([*line, "notes.csv"]) == 0
    assert main([*line, "train.jsonl"]) == 0  # its own data: read whole, written beside it, put in its place
    rows = json.loads((user / "train.jsonl.manifest.json").read_text())["rows"]
    assert (user / "train.jsonl").read_text() == "".join(f'{{"id": {row}}}\n' for row in rows)


def test_a_score_store_of_other_settings_is_replaced_at_the_users_word(
    user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (user / "out.zarr").mkdir()
    (user / "out.zarr" / "notes.txt").write_text("mine")
    line = [*LINES["influence"].split(), "--out", "out.zarr", "--accelerator", "cpu"]
    assert main(line) == 1
    assert main([*line, "--overwrite"]) == 0
    first = ScoreStore.open(user / "out.zarr").stored("influence", slice(None))
    assert main([*line, "--normalize", "none"]) == 1
    assert "normalize: the score store out.zarr has 'projected', this run has 'none'" in capsys.readouterr().err
    assert main([*line, "--normalize", "none", "--overwrite"]) == 0
    second = ScoreStore.open(user / "out.zarr")
    assert second.manifest["normalize"] == "none" and second.counts()["done"] == NUM_ROWS
    assert not np.array_equal(first, second.stored("influence", slice(None)))
    assert (user / "out.zarr" / "notes.txt").read_text() == "mine"


def test_jobs_that_share_a_store_may_not_each_begin_it_anew(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LINES["gradients"].split(), "--out", "new.zarr", "--overwrite", "--shard", "0/2"]) == 1
    assert "--overwrite: together with --shard each job would take away what the others" in capsys.readouterr().err
