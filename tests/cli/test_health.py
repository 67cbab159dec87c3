"""What `icons select` says of a selection's health."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lightning.fabric import Fabric

from icons.cli import main
from icons.consensus.health import Health
from icons.consensus.selection_file import open_selection
from icons.modules.scoring import Scoring
from icons.store import GradientStore

RNG = np.random.default_rng(1)
YES = np.arange(120) % 3 == 0


def written(folder: Path, name: str, rows: np.ndarray, answers: np.ndarray) -> str:
    """A data file whose answers are yes or no, and its gradients."""
    records = [
        {"id": f"{row}", "conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": answer}]}
        for row, answer in enumerate(np.where(answers, "Yes", "No").tolist())
    ]
    (folder / f"{name}.json").write_text(json.dumps(records))
    store = GradientStore.create(
        folder / f"{name}.zarr", num_rows=len(rows), dim=8, manifest={"data": {"path": str(folder / f"{name}.json")}}
    )
    one = np.ones(len(rows))
    for unit in range(store.partition.num_units):
        part = slice(store.partition.unit_rows(unit).start, store.partition.unit_rows(unit).stop)
        gradient, few = rows[part].astype(np.float32), one[part]
        values = {"gradient": gradient, "norm": np.linalg.norm(gradient, axis=1), "loss": few}
        store.write_unit(unit, values | {"tokens": few.astype(int), "status": few.astype(np.uint8)})
    return str(folder / f"{name}.zarr")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows that answer yes go with the first axis, the others with the second; the task asks more of the first."""
    axes = np.eye(8)
    train = written(tmp_path, "train", np.where(YES[:, None], axes[0], axes[1]) + 0.1 * RNG.normal(size=(120, 8)), YES)
    asked = np.arange(10) < 6
    rows = np.where(asked[:, None], axes[0] - 0.5 * axes[1], axes[1] - 0.5 * axes[0])
    task = written(tmp_path, "qa", rows + 0.05 * RNG.normal(size=(10, 8)), asked)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    Scoring([train], {"qa": [task]}, str(tmp_path / "scores.zarr")).run(fabric)
    return tmp_path


def run(folder: Path, *words: str) -> int:
    paths = {"--scores": "scores.zarr", "--data": "train.json", "--out": "selected.json"}
    return main(["select", *(part for option, name in paths.items() for part in (option, f"{folder}/{name}")), *words])


def test_a_one_sided_selection_is_warned_of_and_a_balanced_one_is_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "validation rows hurt by" in said and "│ qa │ 40 %" in said
    assert "more of answer “yes”: 100.0 % of the selection, 33.3 % of the pool, 60.0 % of the tasks' rows" in said
    assert "warning: the selection is full of one answer: “yes” has 100 % of the selection" in said
    assert "Compare with --method coverage on scores made with" in said
    saved = Health.from_plain(open_selection(folder / "selected.json").manifest["health"])
    assert saved.hurt["qa"].value == 0.4 and saved.effective is not None and saved.notes == []
    assert run(folder, "--method", "balanced") == 0
    said = capsys.readouterr().out
    assert "warning" not in said, said


def test_what_cannot_be_measured_is_a_note(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "qa.zarr")
    (folder / "qa.json").unlink()
    assert run(folder) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "note: what qa asks is not known:" in said and "hurt validation rows and redundancy are not measured" in said
    assert "more of answer “yes”: 100.0 % of the selection, 33.3 % of the pool" in said


def test_it_can_be_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--health", "false") == 0
    assert "hurt" not in capsys.readouterr().out
    assert "health" not in open_selection(folder / "selected.json").manifest
