"""Exact scores: task vectors and influence against materialised gradients, resumed, grouped, and kept."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from icons import cli
from icons.commands.source import ModelSource
from icons.datamodules.datamodule import ConversationDataModule
from icons.gradients import per_sample_gradients
from icons.modules.scorer import ScoredTasks, TaskVector, TaskVectorizer
from icons.store import GradientStore, ScoreStore

DATA = Path(__file__).parent.parent / "data" / "original_llava"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def warmup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scorer") / "warmup"
    words = [
        "--model",
        DATA / "vicuna-tiny",
        "--vision-tower",
        DATA / "clip",
        "--mm-projector",
        DATA / "mm_projector.bin",
    ]
    words += ["--data", DATA / "data.json", "--images", DATA, "--lora-rank", 4, "--epochs", 4, "--learning-rate", 0.01]
    words += ["--batch-size", 1, "--held-out", 0.0, "--trainer.accelerator", "cpu", "--out", out]
    assert cli.main(["warmup", *map(str, words)]) == 0
    return out


def score(warmup: Path, out: Path, *more: object) -> int:
    words = ["--checkpoint", warmup, "--data", DATA / "data.json", "--images", DATA, "--chunk-rows", 2, "--out", out]
    return cli.main(["score", *map(str, [*words, "--trainer.accelerator", "cpu", *more])])


def both_tasks() -> list[str]:
    return ["--task", f"a={DATA / 'data.json'}:{DATA}", "--task", f"b={DATA / 'data.json'}:{DATA}"]


def gradients(warmup: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Plain and Adam-preconditioned gradients of the three rows, whole, and the parameters' names in order."""
    parts = dict.fromkeys(("model", "vision_tower", "mm_projector", "adapter", "optimizer_state"))
    source = ModelSource.resolve(checkpoint=warmup, preprocessing={}, **parts)
    model = source.load(target="lora", dtype="float32", attention="sdpa", quantize=None)
    dataset = ConversationDataModule(
        DATA / "data.json", DATA, model_folder=source.folder, preprocessing=source.preprocessing
    ).dataset
    plain = per_sample_gradients(model, dataset.collate([dataset[row] for row in range(3)]))
    adam = source.preconditioner("adam", model)
    assert adam is not None
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    blocks = plain.split([value.numel() for value in named.values()], dim=1)
    shaped = zip(named.items(), blocks, strict=True)
    steps = [adam.apply(n, b.reshape(-1, *v.shape).clone()).flatten(1) for (n, v), b in shaped]
    return plain, torch.cat(steps, dim=1), list(named)


def test_scores_are_mean_cosines_of_whole_gradients(warmup: Path, tmp_path: Path) -> None:
    assert score(warmup, tmp_path / "scores.zarr", *both_tasks()) == 0
    store = ScoreStore.open(tmp_path / "scores.zarr")
    plain, step, _ = gradients(warmup)
    unit = torch.nn.functional.normalize
    expected = (unit(step) @ unit(plain).mT).mean(dim=1)
    for task in range(2):
        np.testing.assert_allclose(store.influence[:][:, task], expected, rtol=1e-4)
    assert np.all(store.stderr[:] == 0)
    assert np.all(store.status[:] == 1)
    np.testing.assert_allclose(store.arrays["norm"][:], step.norm(dim=1), rtol=1e-4)


def test_task_vectors_are_kept_and_a_second_store_uses_them(warmup: Path, tmp_path: Path) -> None:
    kept = tmp_path / "tasks"
    assert score(warmup, tmp_path / "one.zarr", *both_tasks(), "--task-vectors", kept) == 0
    plain, _, names = gradients(warmup)
    found = TaskVector.load(kept / "a.safetensors").vector
    vector = torch.cat([found[name].flatten() for name in names])
    torch.testing.assert_close(vector, torch.nn.functional.normalize(plain).mean(dim=0), rtol=1e-4, atol=1e-7)
    before = (kept / "a.safetensors").stat().st_mtime_ns
    third = ["--task", f"c={DATA / 'data.json'}:{DATA}", "--task-vectors", kept]
    assert score(warmup, tmp_path / "two.zarr", *both_tasks(), *third) == 0
    assert (kept / "a.safetensors").stat().st_mtime_ns == before
    assert ScoreStore.open(tmp_path / "two.zarr").tasks == ["a", "b", "c"]


def test_a_resumed_store_is_the_same_bit_for_bit(warmup: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole.zarr", tmp_path / "halves.zarr"
    assert score(warmup, whole, *both_tasks()) == 0
    assert score(warmup, halves, *both_tasks(), "--shard", "1/2") == 0  # its own half is done
    assert ScoreStore.open(halves).missing() == [0]
    assert score(warmup, halves, *both_tasks()) == 0
    a, b = ScoreStore.open(whole), ScoreStore.open(halves)
    assert all(np.array_equal(a.arrays[name][:], b.arrays[name][:]) for name in a.arrays)


def test_groups_and_several_checkpoints(warmup: Path, tmp_path: Path) -> None:
    assert score(warmup, tmp_path / "a.zarr", *both_tasks(), "--group", "ab=a,b") == 0
    single = ScoreStore.open(tmp_path / "a.zarr")
    assert single.tasks == ["ab"]
    second = tmp_path / "second"
    shutil.copytree(warmup, second)
    more = ["--checkpoint", second, "--weights", 1.0, "--weights", 2.0]
    assert score(warmup, tmp_path / "sum.zarr", *both_tasks(), "--group", "ab=a,b", *more) == 0
    total = ScoreStore.open(tmp_path / "sum.zarr")
    np.testing.assert_allclose(total.influence[:], 3 * single.influence[:], rtol=1e-5)


def test_gradients_are_kept_from_the_same_pass(warmup: Path, tmp_path: Path) -> None:
    more = ["--keep-gradients", tmp_path / "kept.zarr", "--dim", 64, "--dtype", "float32"]
    assert score(warmup, tmp_path / "alone.zarr", *both_tasks()) == 0
    assert score(warmup, tmp_path / "half.zarr", *both_tasks(), *more, "--shard", "1/2") == 0
    shutil.rmtree(tmp_path / "half.zarr")  # the gradient store is one unit ahead of the scores
    assert score(warmup, tmp_path / "half.zarr", *both_tasks(), *more) == 0
    words = ["--checkpoint", warmup, "--data", DATA / "data.json", "--images", DATA, "--chunk-rows", 2, "--dim", 64]
    assert cli.main(["gradients", *map(str, [*words, "--dtype", "float32", "--out", tmp_path / "own.zarr"])]) == 0
    kept, own = GradientStore.open(tmp_path / "kept.zarr"), GradientStore.open(tmp_path / "own.zarr")
    np.testing.assert_allclose(kept.gradients[:], own.gradients[:], rtol=1e-4, atol=1e-4)
    scores = (ScoreStore.open(tmp_path / f"{name}.zarr").influence[:] for name in ("alone", "half"))
    np.testing.assert_allclose(*scores, rtol=1e-5)


def test_stores_of_other_units_do_not_go_together(
    warmup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(warmup, tmp_path / "a.zarr", *both_tasks(), "--chunk-rows", 3) == 0
    assert score(warmup, tmp_path / "a.zarr", *both_tasks(), "--keep-gradients", tmp_path / "kept.zarr") == 1
    assert "units of 3 rows, the gradient store beside it 2" in capsys.readouterr().err
    words = ["--checkpoint", warmup, "--keep-gradients", tmp_path / "kept.zarr"]
    assert score(warmup, tmp_path / "a.zarr", *both_tasks(), *words) == 1
    assert "got 2 checkpoints; expected one" in capsys.readouterr().err


def test_what_does_not_fit_is_one_line(warmup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(warmup, tmp_path / "a.zarr", *both_tasks(), "--weights", 1.0, "--weights", 2.0) == 1
    assert "got 1, with 2 --weights" in capsys.readouterr().err
    assert score(warmup, tmp_path / "a.zarr", "--task", "a=nowhere.json") == 1
    assert "--task: no file nowhere.json" in capsys.readouterr().err
    assert score(warmup, tmp_path / "a.zarr", *both_tasks(), "--trainer.inference_mode", "true") == 1
    assert "--trainer.inference_mode: expected False" in capsys.readouterr().err
    assert score(warmup, tmp_path / "a.zarr", *both_tasks()) == 0
    assert score(warmup, tmp_path / "a.zarr", *both_tasks(), "--preconditioner", "none") == 1
    assert "preconditioner.form" in capsys.readouterr().err


def test_a_group_of_unknown_tasks_is_refused(warmup: Path) -> None:
    vector = TaskVector(load_file(warmup / "adapter_model.safetensors"), 1, {})
    with pytest.raises(ValueError, match="group ab: got a, b; expected tasks out of a"):
        ScoredTasks({"a": vector}, {"ab": ["a", "b"]})


def test_a_task_without_a_usable_row_is_refused() -> None:
    with pytest.raises(ValueError, match="task a: no validation row has a finite gradient"):
        TaskVectorizer(torch.nn.Linear(2, 2), ["a"]).vector("a", {})
