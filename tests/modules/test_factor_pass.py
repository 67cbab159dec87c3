"""Factors by the command line: the library's sums, for any number of ranks and after any kill; and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from icons.cli import main
from icons.datamodules.datamodule import ConversationDataModule
from icons.gradients import projected_gradients
from icons.gradients.covariances import CovarianceSums, covariance_sums, with_drawn_labels
from icons.kronecker import KroneckerFactors, KroneckerPreconditioner
from icons.models.folder import ModelFolder
from icons.models.loading import load_model
from icons.models.saved_factors import load_factors
from icons.modules.factor_parts import FactorParts
from icons.modules.factor_pass import ChosenRows, FactorPass, FactorSettings
from icons.projection import CountSketch, Identity
from icons.store import GradientStore, ScoreStore

DATA = Path(__file__).parents[1] / "data" / "original_llava"
BASE = ["--model", DATA / "vicuna-tiny", "--vision-tower", DATA / "clip", "--mm-projector", DATA / "mm_projector.bin"]
MODEL = [*BASE, "--adapter", DATA / "llava-tiny-lora"]
CPU = ["--images", DATA, "--trainer.accelerator", "cpu"]
pytestmark = pytest.mark.filterwarnings("ignore")


def icons(command: str, *words: object) -> int:
    return main([command, *map(str, words), *map(str, CPU)])


def factors(data: Path, out: Path, *words: object) -> int:
    return icons("factors", *MODEL, "--data", data, "--batch-size", 2, "--out", out, *words)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """15 rows, some of which cannot be read."""
    rows = json.loads((DATA / "data.json").read_text()) * 5
    rows[4], rows[9] = {**rows[4], "image": "nowhere.png"}, {"id": "none"}
    (tmp_path / "data.json").write_text(json.dumps([{**row, "id": str(at)} for at, row in enumerate(rows)]))
    return tmp_path / "data.json"


def model_and_rows(data: Path) -> tuple[torch.nn.Module, Any]:
    folder = ModelFolder.open(DATA / "vicuna-tiny", DATA / "clip", DATA / "mm_projector.bin")
    module = ConversationDataModule(data, DATA, model_folder=folder)
    return load_model(folder, adapter=DATA / "llava-tiny-lora"), module.dataset


@pytest.mark.parametrize("labels", ["drawn", "own"])
def test_factors_are_those_of_the_chosen_rows_one_by_one(labels: str, data: Path, tmp_path: Path) -> None:
    assert factors(data, tmp_path / "f.safetensors", "--rows", 9, "--labels", labels, "--seed", 5, "--width", 20) == 0
    found = KroneckerFactors.load(tmp_path / "f.safetensors")
    assert not (tmp_path / "f.safetensors.parts").exists()
    model, dataset = model_and_rows(data)
    chosen = np.sort(np.random.default_rng(5).permutation(15)[:9]).tolist()
    total = CovarianceSums()
    for row in chosen:
        batch = dataset.collate([dataset[row]])
        if len(batch["labels"]):
            total.add(covariance_sums(model, with_drawn_labels(model, batch, 5) if labels == "drawn" else batch, 20))
    assert 0 < total.rows == found.rows
    assert found.manifest["left_out"] == 9 - total.rows
    assert set(found.square) == set(total.square)
    for name, value in total.square.items():
        numel = model.get_parameter(name).numel()
        assert found.square[name] == pytest.approx(float(value) / total.rows / numel, rel=1e-4, abs=1e-30)
    for mine, true in ((found.left, total.left), (found.right, total.right)):
        for name, value in mine.items():
            expected = (true[name] / total.rows).float()
            assert (value - expected).norm() <= 1e-4 * expected.norm(), name


def test_a_run_that_broke_off_is_gone_on_with(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert factors(data, tmp_path / "whole.safetensors") == 0
    compute, calls = FactorPass.predict_step, 0

    def breaking(self: FactorPass, batch: Any, batch_idx: int) -> CovarianceSums:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise OSError("no disk")
        return compute(self, batch, batch_idx)

    monkeypatch.setattr(FactorPass, "predict_step", breaking)
    assert factors(data, tmp_path / "f.safetensors") == 1
    parts = sorted((tmp_path / "f.safetensors.parts").glob("*.safetensors"))
    assert len(parts) == 7
    parts[3].write_bytes(parts[3].read_bytes()[:-7])  # a disk that lost the end of one,
    parts[4].write_bytes(parts[4].read_bytes()[:-2048] + bytes(2048))  # and another's contents
    assert factors(data, tmp_path / "f.safetensors") == 0
    assert calls == 8 + 15 - 5
    assert (tmp_path / "f.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    calls = 0
    assert factors(data, tmp_path / "f.safetensors") == 0  # they are there
    assert calls == 0


def test_parts_of_other_settings_are_made_anew(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "f.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("icons.modules.factor_pass.FactorWriter.write", lambda *_: (_ for _ in ()).throw(OSError("full")))
        assert factors(data, out, "--rows", 6, "--seed", 1) == 1
    assert len(list((tmp_path / "f.safetensors.parts").glob("*.safetensors"))) == 6
    assert factors(data, out, "--rows", 6, "--seed", 2) == 0
    assert factors(data, tmp_path / "other.safetensors", "--rows", 6, "--seed", 2) == 0
    assert out.read_bytes() == (tmp_path / "other.safetensors").read_bytes()


@pytest.mark.slow
def test_ranks_and_a_signal_make_no_difference(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    data.write_text(json.dumps(json.loads(data.read_text()) * 4))
    words = ["factors", *MODEL, "--data", data, "--batch-size", 2, "--out", out, *CPU, "--trainer.devices", 2]
    process = subprocess.Popen(
        [sys.executable, "-m", "icons", *map(str, words), "--trainer.strategy", "ddp"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    parts = tmp_path / "f.safetensors.parts"
    while len(list(parts.glob("[0-9]*"))) < 4 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 75, said
    assert 4 <= len(list(parts.glob("[0-9]*"))) < 32
    assert factors(data, out) == 0
    assert factors(data, tmp_path / "whole.safetensors") == 0
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_rows_and_scores_with_kfac_are_the_librarys(data: Path, tmp_path: Path) -> None:
    file, few = tmp_path / "f.safetensors", DATA / "data.json"
    assert factors(data, file, "--rows", 20) == 0
    kfac = ["--preconditioner", "kfac", "--factors", file, "--damping", 0.5, "--batch-size", 3]
    stored = ["--dim", 64, "--dtype", "float32", "--out", tmp_path / "a.zarr"]
    assert icons("gradients", *MODEL, *kfac, "--data", few, *stored) == 0
    model, dataset = model_and_rows(few)
    batch = dataset.collate([dataset[row] for row in range(3)])
    preconditioner = KroneckerPreconditioner(load_factors(file, model), 0.5, root=True)
    expected = projected_gradients(model, batch, CountSketch(64), preconditioner)
    store = GradientStore.open(tmp_path / "a.zarr")
    np.testing.assert_allclose(store.norm[:], expected.norm.numpy(), rtol=1e-4)
    rows, largest = store.rows(slice(0, 3)), float(expected.norm.max())
    np.testing.assert_allclose(rows, expected.gradient.numpy(), rtol=1e-3, atol=1e-5 * largest)
    assert store.manifest["preconditioner"] == preconditioner.describe()
    assert store.manifest["preconditioner"]["fingerprint"] == KroneckerFactors.load(file).fingerprint


def test_a_projection_keeps_the_products_of_rows_and_tasks_that_are_both_divided_by_the_root(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line, with more numbers than parameters: exact products within their error bars."""
    file, few = tmp_path / "f.safetensors", DATA / "data.json"
    assert factors(data, file) == 0
    words = [*MODEL, "--data", few, "--dim", 8192, "--dtype", "float32"]
    assert icons("gradients", *words, "--factors", file, "--out", tmp_path / "train.zarr") == 0
    assert icons("gradients", *words, "--factors", file, "--task", "--out", tmp_path / "task.zarr") == 0
    assert icons("gradients", *words, "--task", "--out", tmp_path / "plain.zarr") == 0
    influence = ["influence", "--train", tmp_path / "train.zarr", "--normalize", "none", "--task-normalize", "none"]
    for name in ("plain", "task"):
        task = [*influence, "--task", f"a={tmp_path / name}.zarr", "--out", tmp_path / "scores.zarr"]
        assert main(list(map(str, task))) == (name == "plain")
    said = capsys.readouterr().err
    assert "preconditioner.form: the training rows has 'kfac_root', task a has 'none'; they must agree" in said
    model, dataset = model_and_rows(few)
    batch = dataset.collate([dataset[row] for row in range(3)])
    plain = projected_gradients(model, batch, Identity()).gradient.double()
    whole = projected_gradients(model, batch, Identity(), KroneckerPreconditioner(load_factors(file, model)))
    store = ScoreStore.open(tmp_path / "scores.zarr")
    error = np.abs(store.influence[:][:, 0] - (whole.gradient.double() @ plain.mean(dim=0)).numpy())
    assert (error < 4 * store.stderr[:][:, 0]).all()


@pytest.fixture
def kept(data: Path, tmp_path: Path) -> Path:
    assert factors(data, tmp_path / "f.safetensors", "--rows", 3) == 0
    return tmp_path / "f.safetensors"


def test_factors_of_another_adapter_are_refused(kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(DATA / "llava-tiny-lora", tmp_path / "other")
    for file in (tmp_path / "other").glob("adapter_model.*"):
        weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        first = next(iter(weights))
        weights[first] = weights[first] + 1
        save_file(weights, file) if file.suffix == ".safetensors" else torch.save(weights, file)
    words = [*BASE, "--adapter", tmp_path / "other", "--data", DATA / "data.json", "--factors", kept]
    assert icons("gradients", *words, "--dim", 64, "--out", tmp_path / "a.zarr") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"adapter.fingerprint: {kept} has " in said and "make them with `icons factors`" in said


def test_a_store_made_with_other_factors_is_not_gone_on_with(
    kept: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*MODEL, "--data", DATA / "data.json", "--dim", 64, "--out", tmp_path / "a.zarr"]
    assert icons("gradients", *words, "--factors", kept) == 0
    assert factors(data, tmp_path / "g.safetensors", "--rows", 4) == 0
    assert icons("gradients", *words, "--factors", tmp_path / "g.safetensors") == 1
    assert "preconditioner.rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("gradients", ["--preconditioner", "kfac"], "--preconditioner kfac needs Kronecker factors: got no --factors"),
        ("gradients", ["--preconditioner", "adam", "--factors", "f"], "--factors: belongs to --preconditioner kfac"),
        ("gradients", ["--damping", "0.1"], "--damping: belongs to --preconditioner kfac; got adam"),
        ("gradients", ["--factors", "f", "--damping", "0"], "--damping 0: expected a number above 0"),
        ("gradients", ["--task", "--preconditioner", "none", "--factors", "f"], "--preconditioner kfac; got none"),
        ("gradients", ["--factors", "nowhere"], "nowhere: is not there; expected a file that `icons factors` wrote"),
        ("factors", ["--rows", "0"], "--rows 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    command: str, words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert icons(command, *MODEL, "--data", DATA / "data.json", "--out", tmp_path / "out", *words) in (1, 2)
    assert said in capsys.readouterr().err


def test_each_checkpoint_has_factors_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", "a", "--checkpoint", "b", "--factors", "f", "--preconditioner", "kfac"]
    words += ["--task", "t=t.json", "--data", str(DATA / "data.json"), "--out", str(tmp_path / "s")]
    assert icons("score", *words) == 1
    assert "--factors: got 1 for 2 checkpoints; expected one for each" in capsys.readouterr().err


def test_whole_updates_are_not_projected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", "a", "--factors", "f", "--preconditioner", "kfac", "--keep-gradients", "k"]
    words += ["--task", "t=t.json", "--data", str(DATA / "data.json"), "--out", str(tmp_path / "s")]
    assert icons("score", *words) == 1
    assert "--keep-gradients k: got --preconditioner kfac, whose whole updates" in capsys.readouterr().err


def test_factors_of_other_settings_are_replaced_at_the_users_word_alone(
    kept: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = kept.read_bytes()
    assert factors(data, kept, "--rows", 2) == 1
    assert "factors.rows: " in (said := capsys.readouterr().err) and "or --overwrite" in said
    assert kept.read_bytes() == before
    assert factors(data, kept, "--rows", 2, "--overwrite") == 0
    assert KroneckerFactors.load(kept).rows == 2


def test_a_folder_of_the_users_is_not_taken_for_parts(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f.safetensors.parts").mkdir()
    (tmp_path / "f.safetensors.parts" / "thesis.txt").touch()
    assert factors(data, tmp_path / "f.safetensors") == 1
    assert "f.safetensors.parts: is where parts of f.safetensors go, and holds something" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "f.safetensors.parts").iterdir()] == ["thesis.txt"]


def test_what_a_user_has_put_beside_the_parts_stays(tmp_path: Path) -> None:
    parts = FactorParts(tmp_path / "f.safetensors", {})
    parts.enter()
    parts.write(0, CovarianceSums(), "")
    (parts.folder / "notes.txt").touch()
    parts.remove()
    assert sorted(file.name for file in parts.folder.iterdir()) == [".icons.json", "notes.txt"]
    (parts.folder / "notes.txt").unlink()
    parts.remove()
    assert not parts.folder.exists()


def test_a_run_without_a_usable_row_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "image": "nowhere.png"} for row in json.loads((DATA / "data.json").read_text())]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    assert factors(tmp_path / "data.json", tmp_path / "f.safetensors") == 1
    said = capsys.readouterr().err
    assert "none of 3 rows can be used" in said and "nowhere.png" in said
    assert not (tmp_path / "f.safetensors").exists()


def test_chosen_rows_are_drawn_without_repetition_in_parts() -> None:
    chosen = FactorSettings(rows=70, seed=3).chosen(1000)
    rows = [row for unit in range(chosen.num_units) for row in chosen.unit_rows(unit)]
    assert rows == sorted(set(rows)) and len(rows) == 70
    assert 24 <= chosen.num_units <= 32
    assert FactorSettings(rows=None).chosen(5) == ChosenRows(5, 1, (0, 1, 2, 3, 4))
    assert FactorSettings().chosen(0).num_units == 0
