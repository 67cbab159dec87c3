"""`icons gradients`: broken records fail alone, wrong settings are one line, and nothing that was done is lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icons import cli
from icons.batch import Status
from icons.store import GradientStore

DATA = Path(__file__).parent.parent / "data" / "original_llava"
pytestmark = pytest.mark.filterwarnings("ignore")
PARTS = ["--model", DATA / "vicuna-tiny", "--vision-tower", DATA / "clip", "--mm-projector", DATA / "mm_projector.bin"]
PARTS += ["--adapter", DATA / "llava-tiny-lora", "--preconditioner", "none", "--dim", 64, "--dtype", "float32"]


def run(data: Path, out: Path, *more: object) -> int:
    words = [*PARTS, "--data", data, "--images", DATA, "--chunk-rows", 2, "--out", out, "--trainer.accelerator", "cpu"]
    return cli.main(["gradients", *map(str, [*words, *more])])


def good() -> list[dict[str, Any]]:
    return json.loads((DATA / "data.json").read_text())


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Good records in rows 0, 3 and 8; everything that real files contain between them."""
    first, second, third = good()
    (tmp_path / "zero.png").write_bytes(b"")
    turns = first["conversations"]
    rows: list[Any] = [
        first, {**first, "image": "nowhere.png"}, {"id": "none"}, second, {**first, "image": "../../../etc/passwd"},
        {**first, "image": "data.json"}, {**first, "conversations": [turns[0], {"from": "gpt", "value": ""}]}, 7, third,
    ]  # fmt: skip
    lines = [json.dumps(row) for row in rows]
    lines[7] = '{"id": "broken", '
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    return tmp_path / "mixed.jsonl"


def test_a_broken_record_fails_alone(mixed: Path, tmp_path: Path) -> None:
    assert run(DATA / "data.json", tmp_path / "good.zarr", "--batch-size", 1) == 0
    assert run(mixed, tmp_path / "mixed.zarr", "--batch-size", 1) == 0
    clean, store = GradientStore.open(tmp_path / "good.zarr"), GradientStore.open(tmp_path / "mixed.zarr")
    expected = [
        Status.DONE, Status.IMAGE_MISSING, Status.BAD_RECORD, Status.DONE, Status.IMAGE_MISSING, Status.IMAGE_BROKEN,
        Status.NO_SUPERVISED_TOKEN, Status.BAD_RECORD, Status.DONE,
    ]  # fmt: skip
    assert store.status[:].tolist() == expected
    assert np.array_equal(store.gradients[:][[0, 3, 8]], clean.gradients[:])
    assert not store.gradients[:][1].any()
    assert np.isnan(store.norm[:][1])


def test_failed_rows_change_the_exit_status_only_with_strict(mixed: Path, tmp_path: Path) -> None:
    assert run(mixed, tmp_path / "a.zarr") == 0
    assert run(mixed, tmp_path / "a.zarr", "--strict") == 1


def test_failed_rows_are_retried_on_demand(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(DATA, folder)
    (folder / "img1.png").rename(folder / "away.png")
    words = ["--images", folder]
    assert run(DATA / "data.json", tmp_path / "a.zarr", *words) == 0
    assert GradientStore.open(tmp_path / "a.zarr").status[:].tolist() == [1, 1, int(Status.IMAGE_MISSING)]
    (folder / "away.png").rename(folder / "img1.png")
    assert run(DATA / "data.json", tmp_path / "a.zarr", *words) == 0
    assert GradientStore.open(tmp_path / "a.zarr").status[:].tolist()[2] == Status.IMAGE_MISSING
    assert run(DATA / "data.json", tmp_path / "a.zarr", *words, "--retry-failed") == 0
    assert GradientStore.open(tmp_path / "a.zarr").status[:].tolist() == [1, 1, 1]


def test_shards_fill_one_store(tmp_path: Path) -> None:
    assert run(DATA / "data.json", tmp_path / "whole.zarr") == 0
    for shard in ("1/2", "0/2"):
        assert run(DATA / "data.json", tmp_path / "parts.zarr", "--shard", shard) == 0
    whole, parts = GradientStore.open(tmp_path / "whole.zarr"), GradientStore.open(tmp_path / "parts.zarr")
    assert np.array_equal(whole.gradients[:], parts.gradients[:])
    assert parts.missing() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", 1], "projector.seed"),
        (["--dim", 32], "projector.dim"),
        (["--dtype", "float16"], "dtype"),
        (["--preconditioner", "sign"], "preconditioner.form"),
        (["--target", "trainable"], "model.fingerprint"),
        (["--max-length", 60], "preprocessing.max_length"),
    ],
)
def test_a_store_of_other_settings_is_not_touched(
    words: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(DATA / "data.json", tmp_path / "a.zarr") == 0
    before = GradientStore.open(tmp_path / "a.zarr").gradients[:]
    assert run(DATA / "data.json", tmp_path / "a.zarr", *words) == 1
    assert message in capsys.readouterr().err
    assert np.array_equal(GradientStore.open(tmp_path / "a.zarr").gradients[:], before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.inference_mode", "true"], "--trainer.inference_mode: expected False"),
        (["--preconditioner", "adam"], "needs Adam's moments: got no --optimizer-state"),
        (["--checkpoint", "warmup"], "got both of --checkpoint and --model"),
        (["--data", "nowhere.json"], "nowhere.json: no such data file"),
        (["--template", "vicuna"], "template 'vicuna'"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(DATA / "data.json", tmp_path / "a.zarr", *words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "a.zarr").exists()


def test_neither_checkpoint_nor_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gradients", "--data", str(DATA / "data.json"), "--out", str(tmp_path / "a.zarr")]) == 1
    assert "got neither of --checkpoint and --model" in capsys.readouterr().err


def test_a_warmup_folder_brings_its_own_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*PARTS[:6], "--data", DATA / "data.json", "--images", DATA, "--lora-rank", 2, "--held-out", 0.0]
    assert cli.main(["warmup", *map(str, [*words, "--out", tmp_path / "w"])]) == 0
    base = ["gradients", "--checkpoint", tmp_path / "w", "--data", DATA / "data.json", "--out", tmp_path / "a.zarr"]
    for more, message in (
        (["--adapter", DATA], "names its own; leave the option out"),
        (["--max-length", 60], "gradients of differently prepared text do not compare"),
    ):
        assert cli.main([*map(str, [*base, *more])]) == 1
        assert message in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(DATA / "data.json", tmp_path / "a.zarr", "--dry-run") == 0
    assert "dry run: nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "a.zarr").exists()
