"""Exact scores without the leading axes and within spans, against the same on materialised gradients."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import icons.modules.task_directions as task_directions
from icons.cli import command_line as cli
from icons.cli.model_source import ModelSource
from icons.cli.options.groups import CheckpointOptions
from icons.datamodules.datamodule import ConversationDataModule
from icons.gradients import combined_gradients, per_sample_gradients
from icons.modules.task_directions import orthonormal
from icons.store import ScoreStore

DATA = Path(__file__).parents[1] / "data" / "original_llava"
pytestmark = pytest.mark.filterwarnings("ignore")
WORDS = ["bus", "red", "people", "hello", "again", "three", "picture", "how", "many", "large", "room", "yes", "sure"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A warm-up folder, and three files: training rows, and two tasks of different sizes."""
    out = tmp_path_factory.mktemp("directions")
    words = ["--model", DATA / "vicuna-tiny", "--vision-tower", DATA / "clip", "--lora-rank", 4, "--epochs", 4]
    words += ["--mm-projector", DATA / "mm_projector.bin", "--data", DATA / "data.json", "--images", DATA]
    words += ["--learning-rate", 0.01, "--batch-size", 1, "--held-out", 0.0, "--trainer.accelerator", "cpu"]
    assert cli.main(["warmup", *map(str, [*words, "--out", out / "warmup"])]) == 0
    choose = np.random.default_rng(0)

    def record(number: int) -> dict[str, Any]:
        asked, said = (" ".join(choose.choice(WORDS, count)) for count in (5, 3))
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
        return {"id": str(number), "conversations": turns}

    pictured = json.loads((DATA / "data.json").read_text())
    for name, count in {"train": 4, "a": 6, "b": 3}.items():
        (out / f"{name}.json").write_text(json.dumps([*pictured[:2], *map(record, range(count))]))
    return out


def score(folder: Path, out: Path, *more: object) -> int:
    words = ["--checkpoint", folder / "warmup", "--data", folder / "train.json", "--images", DATA, "--chunk-rows", 4]
    for task in "ab":
        words += ["--task", f"{task}={folder / task}.json:{DATA}"]
    return cli.main(["score", *map(str, [*words, "--out", out, "--trainer.accelerator", "cpu", *more])])


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, np.ndarray]:
    """Unit gradients of all rows, float64: the training rows' after Adam, the tasks' plain."""
    source = ModelSource.resolve(CheckpointOptions(checkpoint=folder / "warmup"))
    model = source.load(target="lora", dtype="float32", attention="sdpa", quantize=None)
    adam, rows = source.preconditioner("adam", model), {}
    assert adam is not None
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for name in ("train", "a", "b"):
        dataset = ConversationDataModule(
            folder / f"{name}.json", DATA, model_folder=source.folder, preprocessing=source.preprocessing
        ).dataset
        found = per_sample_gradients(model, dataset.collate([dataset[row] for row in range(len(dataset))]))
        if name == "train":
            blocks = zip(named.items(), found.split([value.numel() for value in named.values()], dim=1), strict=True)
            found = torch.cat([adam.apply(n, b.reshape(-1, *v.shape).clone()).flatten(1) for (n, v), b in blocks], 1)
        rows[name] = found.double().numpy() / np.linalg.norm(found.double(), axis=1, keepdims=True)
    return rows


def without_axes(whole: dict[str, np.ndarray], count: int) -> np.ndarray:
    centred = np.concatenate([(whole[t] - whole[t].mean(0)) / len(whole[t]) ** 0.5 for t in "ab"])
    axes = np.linalg.svd(centred, full_matrices=False)[2][:count]
    means = np.stack([whole[t].mean(0) for t in "ab"])
    return np.asarray(whole["train"] @ (means - means @ axes.T @ axes).T)


def within(whole: dict[str, np.ndarray], share: float) -> np.ndarray:
    columns = []
    for task in "ab":
        _, strength, basis = np.linalg.svd(whole[task], full_matrices=False)
        held = np.cumsum(strength**2) / np.sum(strength**2)
        basis = basis[: int((held < share - 1e-9).sum()) + 1]
        one, other = (rows @ basis.T for rows in (whole["train"], whole[task]))
        one, other = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (one, other))
        columns.append((one @ other.T).mean(axis=1))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(("option", "value"), [("--drop-axes", 3), ("--subspace", 0.8), ("--subspace", 1.0)])
def test_scores_are_those_of_whole_gradients(
    folder: Path, whole: dict[str, np.ndarray], tmp_path: Path, option: str, value: Any
) -> None:
    assert score(folder, tmp_path / "scores.zarr", option, value) == 0
    expected = without_axes(whole, value) if option == "--drop-axes" else within(whole, value)
    store = ScoreStore.open(tmp_path / "scores.zarr")
    np.testing.assert_allclose(store.influence[:], expected, atol=2e-5)
    assert store.manifest[option[2:].replace("-", "_")] == value


def test_of_projected_rows_the_whole_span_is_exact_and_axes_are_nearly_so(
    folder: Path, whole: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_directions, "DIM", 512)
    assert score(folder, tmp_path / "span.zarr", "--subspace", 1.0) == 0
    np.testing.assert_allclose(ScoreStore.open(tmp_path / "span.zarr").influence[:], within(whole, 1.0), atol=1e-3)
    assert score(folder, tmp_path / "axes.zarr", "--drop-axes", 2) == 0
    found, expected = ScoreStore.open(tmp_path / "axes.zarr").influence[:], without_axes(whole, 2)
    plain = whole["train"] @ np.stack([whole[t].mean(0) for t in "ab"]).T
    assert np.abs(found - expected).max() < 0.2 * np.abs(plain - expected).max()


def test_what_passes_have_found_is_kept_and_other_directions_are_made_anew(folder: Path, tmp_path: Path) -> None:
    vectors = ["--task-vectors", tmp_path / "kept"]
    assert score(folder, tmp_path / "one.zarr", *vectors, "--drop-axes", 1) == 0
    times = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "kept").glob("*.safetensors")}
    assert score(folder, tmp_path / "again.zarr", *vectors, "--drop-axes", 1, "--batch-size", 3) == 0
    assert times == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "kept").glob("*.safetensors")}
    assert score(folder, tmp_path / "two.zarr", *vectors, "--drop-axes", 2) == 0
    one, again, two = (ScoreStore.open(tmp_path / f"{name}.zarr").influence[:] for name in ("one", "again", "two"))
    np.testing.assert_allclose(one, again, atol=1e-5)
    assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--drop-axes", -1), "--drop-axes -1: expected 0 or more"),
        (("--drop-axes", 99), "drop axes: got 99; the tasks' validation rows vary along 1"),
        (("--subspace", 1.5), "--subspace 1.5: expected a share above 0 and at most 1"),
        (("--subspace", 0.5, "--drop-axes", 1), "got --drop-axes 1 too; expected one of them"),
        (("--subspace", 0.5, "--normalize", "none"), "within a subspace scores are cosines"),
        (("--drop-axes", 1, "--reuse", "old.zarr"), "with --drop-axes every task changes all scores"),
    ],
)
def test_what_has_no_meaning_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Any, message: str
) -> None:
    assert score(folder, tmp_path / "scores.zarr", *words) == 1
    assert message in capsys.readouterr().err


def test_a_store_without_axes_is_not_gone_on_with_by_a_run_with_them(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(folder, tmp_path / "scores.zarr") == 0
    assert score(folder, tmp_path / "scores.zarr", "--drop-axes", 1) == 1
    assert "drop_axes: the score store" in capsys.readouterr().err


def test_sums_that_repeat_each_other_give_fewer_directions() -> None:
    rows = torch.tensor([[3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    found = orthonormal([{"w": rows, "v": rows[:, :1]}])
    flat = torch.cat([found["w"], found["v"]], dim=1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(2))


def test_several_sums_are_sums_of_per_sample_gradients_and_samples_without_weight_count_nothing(folder: Path) -> None:
    source = ModelSource.resolve(CheckpointOptions(checkpoint=folder / "warmup"))
    model = source.load(target="lora", dtype="float32", attention="sdpa", quantize=None)
    dataset = ConversationDataModule(
        folder / "a.json", DATA, model_folder=source.folder, preprocessing=source.preprocessing
    ).dataset
    batch = dataset.collate([dataset[row] for row in range(3)])
    rows = per_sample_gradients(model, batch)
    weights = torch.tensor([[1.0, -2.0], [0.0, 0.0], [0.5, 3.0]])
    found = combined_gradients(model, batch, weights)
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    torch.testing.assert_close(
        torch.cat([found[n].flatten(1) for n in names], 1), weights.T @ rows, atol=1e-5, rtol=1e-4
    )
