"""Exact scores: task vectors and influence against materialised gradients, resumed, grouped, and kept."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from icons.batch import Status
from icons.choices import Preconditioning
from icons.cli import command_line as cli
from icons.cli.gradients import summary
from icons.cli.model_source import ModelSource
from icons.cli.options.groups import CheckpointOptions
from icons.datamodules.datamodule import ConversationDataModule
from icons.gradients import per_sample_gradients
from icons.modules.exact_scorer import ScoredTasks
from icons.modules.task_vectorizer import TaskVector, TaskVectorizer
from icons.store import GradientStore, ScoreStore

DATA = Path(__file__).parents[1] / "data" / "original_llava"
CPU = ["--trainer.accelerator", "cpu"]
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
    return cli.main(["score", *map(str, [*words, *CPU, *more])])


def both_tasks() -> list[str]:
    return ["--task", f"a={DATA / 'data.json'}:{DATA}", "--task", f"b={DATA / 'data.json'}:{DATA}"]


def gradients(
    warmup: Path, form: Preconditioning = "adam", factors: Path | None = None
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Plain and preconditioned gradients of the three rows, whole, and the parameters' names in order."""
    source = ModelSource.resolve(CheckpointOptions(checkpoint=warmup))
    model = source.load(target="lora", dtype="float32", attention="sdpa", quantize=None)
    dataset = ConversationDataModule(
        DATA / "data.json", DATA, model_folder=source.folder, preprocessing=source.preprocessing
    ).dataset
    plain = per_sample_gradients(model, dataset.collate([dataset[row] for row in range(3)]))
    preconditioner = source.preconditioner(form, model, factors)
    assert preconditioner is not None
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    blocks = plain.split([value.numel() for value in named.values()], dim=1)
    shaped = zip(named.items(), blocks, strict=True)
    steps = [preconditioner.apply(n, b.reshape(-1, *v.shape).clone()).flatten(1) for (n, v), b in shaped]
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


def test_scores_are_products_with_gradients_divided_by_a_curvature(warmup: Path, tmp_path: Path) -> None:
    file, words = tmp_path / "factors.safetensors", ["--data", DATA / "data.json", "--images", DATA]
    assert cli.main(["factors", "--checkpoint", *map(str, [warmup, *words, "--out", file]), *CPU]) == 0
    kfac = ["--factors", file, "--normalize", "none"]
    assert score(warmup, tmp_path / "scores.zarr", *both_tasks(), *kfac) == 0
    plain, step, _ = gradients(warmup, "kfac", file)
    expected = step.double() @ plain.double().mean(dim=0)
    np.testing.assert_allclose(ScoreStore.open(tmp_path / "scores.zarr").influence[:][:, 0], expected, rtol=1e-3)


def test_task_vectors_are_kept_and_a_second_store_uses_them(warmup: Path, tmp_path: Path) -> None:
    kept = tmp_path / "tasks"
    assert score(warmup, tmp_path / "one.zarr", *both_tasks(), "--task-vectors", kept) == 0
    plain, _, names = gradients(warmup)
    found = TaskVector.load(kept / "a.safetensors").vector
    vector = torch.cat([found[name].flatten() for name in names])
    torch.testing.assert_close(vector, torch.nn.functional.normalize(plain).mean(dim=0), rtol=1e-4, atol=1e-7)
    before = (kept / "a.safetensors").stat().st_mtime_ns
    third = ["--task", f"mme/c={DATA / 'data.json'}:{DATA}", "--task-vectors", kept]
    assert score(warmup, tmp_path / "two.zarr", *both_tasks(), *third) == 0
    assert (kept / "a.safetensors").stat().st_mtime_ns == before
    assert ScoreStore.open(tmp_path / "two.zarr").tasks == ["a", "b", "mme/c"]
    assert (kept / "mme%2Fc.safetensors").is_file()


def test_a_task_vector_that_another_run_has_replaced_meanwhile_is_not_scored_with(
    warmup: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = TaskVector.save

    def raced(self: TaskVector, file: Path) -> None:
        save(self, file)
        save(replace(self, manifest={**self.manifest, "normalize": "none"}), file)

    monkeypatch.setattr(TaskVector, "save", raced)
    assert score(warmup, tmp_path / "scores.zarr", *both_tasks()) == 1
    said = capsys.readouterr().err
    assert (
        "a.safetensors has 'none', this run has 'exact'; another run has put its own there meanwhile: give an" in said
    )
    assert not (tmp_path / "scores.zarr").exists()


def test_a_resumed_store_is_the_same_bit_for_bit(warmup: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole.zarr", tmp_path / "halves.zarr"
    assert score(warmup, whole, *both_tasks()) == 0
    assert score(warmup, halves, *both_tasks(), "--shard", "1/2") == 0  # its own half is done
    assert ScoreStore.open(halves).missing() == [0]
    assert score(warmup, halves, *both_tasks()) == 0
    a, b = ScoreStore.open(whole), ScoreStore.open(halves)
    assert all(np.array_equal(a.arrays[name][:], b.arrays[name][:]) for name in a.arrays)


def test_scores_of_records_read_by_another_processor_are_not_gone_on_with(
    warmup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(warmup, tmp_path / "a.zarr", *both_tasks(), "--shard", "1/2") == 0
    store = ScoreStore.open(tmp_path / "a.zarr", "r+")
    store.amend(reader={**store.manifest["reader"], "tokenizer": "another"})
    assert score(warmup, tmp_path / "a.zarr", *both_tasks()) == 1
    assert "reader.tokenizer: the score store" in capsys.readouterr().err


def test_other_batches_go_on_when_mixed_batches_asks_for_it(
    warmup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, halves = tmp_path / "whole.zarr", tmp_path / "halves.zarr"
    assert score(warmup, whole, *both_tasks()) == 0
    assert score(warmup, halves, *both_tasks(), "--shard", "1/2") == 0
    assert score(warmup, halves, *both_tasks(), "--batch-size", 1) == 1
    assert "--mixed-batches to go on all the same" in capsys.readouterr().err
    assert score(warmup, halves, *both_tasks(), "--batch-size", 1, "--mixed-batches") == 0
    a, b = ScoreStore.open(whole), ScoreStore.open(halves)
    assert b.manifest["batches"] == "mixed" and b.missing() == []
    np.testing.assert_allclose(a.influence[:], b.influence[:], rtol=1e-4)


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
    assert "units of 3 rows, the store beside it 2" in capsys.readouterr().err
    words = ["--checkpoint", warmup, "--keep-gradients", tmp_path / "kept.zarr"]
    assert score(warmup, tmp_path / "a.zarr", *both_tasks(), *words) == 1
    assert "got 2 checkpoints; expected one" in capsys.readouterr().err


def test_what_does_not_fit_is_one_line(warmup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(warmup, tmp_path / "a.zarr", *both_tasks(), "--weights", 1.0, "--weights", 2.0) == 1
    assert "--weights: got 2 for 1 checkpoint; expected one for each" in capsys.readouterr().err
    assert score(warmup, tmp_path / "a.zarr", "--task", "a=nowhere.json") == 1
    assert "--task a: no file nowhere.json" in capsys.readouterr().err
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


def of_two_rows(path: Path, name: str) -> list[str]:
    """Another task: the first two records."""
    file = path / f"{name}.json"
    file.write_text(json.dumps(json.loads((DATA / "data.json").read_text())[:2]))
    return ["--task", f"{name}={file}:{DATA}"]


def test_a_further_task_leaves_the_others_as_they_are(
    warmup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = of_two_rows(tmp_path, "c")
    assert score(warmup, tmp_path / "old.zarr", *both_tasks(), "--group", "ab=a,b") == 0
    assert score(warmup, tmp_path / "whole.zarr", *both_tasks(), *more, "--group", "ab=a,b") == 0
    wider = [*both_tasks(), *more, "--group", "ab=a,b", "--reuse", tmp_path / "old.zarr"]
    capsys.readouterr()
    assert score(warmup, tmp_path / "new.zarr", *wider, "--shard", "1/2") == 0
    assert score(warmup, tmp_path / "new.zarr", *wider) == 0
    assert "old.zarr: ab" in capsys.readouterr().out.replace("\n", "")
    kept = sorted(file.name for file in (tmp_path / "new.zarr.tasks").iterdir())
    assert kept == [".icons.json", "c.safetensors"]  # only the new vector
    old, new, whole = (ScoreStore.open(tmp_path / f"{name}.zarr") for name in ("old", "new", "whole"))
    assert new.tasks == whole.tasks == ["c", "ab"]
    assert new.influence[:][:, 1].tobytes() == old.influence[:][:, 0].tobytes()
    np.testing.assert_allclose(new.influence[:], whole.influence[:], rtol=1e-5)
    for field in ("tasks", "groups", "num_validation", "data", "preconditioner"):
        assert new.manifest[field] == whole.manifest[field]
    assert (
        score(warmup, tmp_path / "new.zarr", *both_tasks(), *more, "--group", "ab=a,b") == 0
    )  # it goes on as any other


def test_a_row_that_failed_before_stays_failed(warmup: Path, tmp_path: Path) -> None:
    assert score(warmup, tmp_path / "old.zarr", *both_tasks()) == 0
    old = ScoreStore.open(tmp_path / "old.zarr", mode="r+")
    values = [np.asarray(array[0:2]) for array in (old.influence, old.stderr, old.status)]
    values[0][1], values[2][1] = np.nan, Status.IMAGE_MISSING
    old.write_unit(0, *values, **{name: np.asarray(old.arrays[name][0:2]) for name in ("norm", "loss", "tokens")})
    more = [*of_two_rows(tmp_path, "c"), "--reuse", tmp_path / "old.zarr"]
    assert score(warmup, tmp_path / "new.zarr", *both_tasks(), *more) == 0
    new = ScoreStore.open(tmp_path / "new.zarr")
    assert new.status[:].tolist() == [Status.DONE, Status.IMAGE_MISSING, Status.DONE]
    assert np.isnan(new.influence[:]).tolist() == [[False] * 3, [True] * 3, [False] * 3]


def test_former_scores_of_something_else_are_refused(
    warmup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = ["--reuse", tmp_path / "old.zarr"]
    assert score(warmup, tmp_path / "old.zarr", *both_tasks(), "--shard", "1/2") == 0
    assert score(warmup, tmp_path / "new.zarr", *both_tasks(), *of_two_rows(tmp_path, "c"), *old) == 1
    assert "old.zarr: lacks 1 unit; finish the store first" in capsys.readouterr().err
    assert score(warmup, tmp_path / "old.zarr", *both_tasks()) == 0
    assert score(warmup, tmp_path / "new.zarr", *both_tasks(), *old) == 1
    assert "has all of a, b already; expected a further --task" in capsys.readouterr().err
    more = [*of_two_rows(tmp_path, "c"), *old, "--preconditioner", "none"]
    assert score(warmup, tmp_path / "new.zarr", *both_tasks(), *more) == 1
    assert "preconditioner.form" in capsys.readouterr().err


def test_units_missing_at_the_end_are_status_1_with_a_line(
    warmup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(warmup, tmp_path / "half.zarr", *both_tasks(), "--shard", "1/2") == 0
    capsys.readouterr()
    assert summary(ScoreStore.open(tmp_path / "half.zarr"), False, None) == 1  # as when the rank of unit 0 has died
    assert "1 of 2 units are missing: a process has died" in capsys.readouterr().out
    assert summary(ScoreStore.open(tmp_path / "half.zarr"), False, "1/2") == 0


def test_a_unit_that_one_checkpoint_lacks_is_missing_in_the_sum(warmup: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    shutil.copytree(warmup, second)
    more = [*both_tasks(), "--checkpoint", second]
    assert score(warmup, tmp_path / "sum.zarr", *more, "--shard", "1/2") == 0
    assert ScoreStore.open(tmp_path / "sum.zarr").missing() == [0]
    assert score(warmup, tmp_path / "sum.zarr", *more) == 0
    assert ScoreStore.open(tmp_path / "sum.zarr").missing() == []


def test_replaced_images_of_the_data_and_of_tasks_are_named(
    warmup: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places, out = [tmp_path / name for name in ("rows", "tasks")], tmp_path / "scores.zarr"
    for place in places:
        place.mkdir()
        for name in ("img0.png", "img1.png"):
            shutil.copy(DATA / name, place / name)
    words = ["--images", places[0], "--task", f"a={DATA / 'data.json'}:{places[1]}"]
    assert score(warmup, out, *words, "--shard", "0/2") == 0
    for place, whose in zip(places, (f"the store {out}", f"task a of the store {out}"), strict=True):
        shutil.copy(DATA / "img1.png", place / "img0.png")
        capsys.readouterr()
        assert score(warmup, out, *words) == 1
        assert f"image img0.png of row 0: has other bytes than when {whose} was begun" in capsys.readouterr().err
        shutil.copy(DATA / "img0.png", place / "img0.png")
    assert score(warmup, out, *words) == 0 and ScoreStore.open(out).missing() == []
    (places[1] / "img1.png").unlink()
    assert score(warmup, out, *words) == 0, "what was there and is missing is no other image"
