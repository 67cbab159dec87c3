"""The notebook runs from top to bottom on stores made here, and says why a row was chosen."""

import json
from pathlib import Path

import numpy as np
import pytest

from icons.store import GradientStore, ScoreStore

NOTEBOOK = Path(__file__).parents[2] / "docs" / "read_store.ipynb"
NUM_ROWS, DIM = 40, 16


@pytest.fixture(params=["float16", "int8"])
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A run's folder: train.zarr, scores.zarr and pool.json, with a failed row and a row that all tasks vote for."""
    random = np.random.default_rng(0)
    records = [
        {
            "id": str(i),
            "conversations": [{"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": str(i)}],
        }
        for i in range(NUM_ROWS)
    ]
    (tmp_path / "pool.json").write_text(json.dumps(records), encoding="utf-8")
    gradient = random.normal(size=(NUM_ROWS, DIM)).astype(np.float32)
    gradient[21] = 2 * gradient[17]  # the nearest to row 17, whatever their lengths
    status = np.ones(NUM_ROWS, np.uint8)
    status[3] = 3
    influence = random.normal(size=(NUM_ROWS, 2)).astype(np.float32)
    influence[17], influence[3] = 9, np.nan
    stderr = np.full((NUM_ROWS, 2), 0.1, np.float32)
    manifest = {"projector": {"kind": "count_sketch", "dim": DIM, "seed": 0}, "preconditioner": None}
    train = GradientStore.create(
        tmp_path / "train.zarr",
        num_rows=NUM_ROWS,
        dim=DIM,
        dtype=request.param,
        chunk_rows=16,
        manifest=manifest,
    )
    scores = ScoreStore.create(tmp_path / "scores.zarr", num_rows=NUM_ROWS, tasks=["gqa", "pope"], chunk_rows=16)
    for unit in range(3):
        rows = train.partition.unit_rows(unit)
        part = slice(rows.start, rows.stop)
        results = {
            "gradient": gradient[part],
            "norm": np.linalg.norm(gradient[part], axis=1).astype(np.float32),
            "loss": np.ones(len(rows), np.float32),
            "tokens": np.full(len(rows), 4, np.int32),
            "status": status[part],
        }
        train.write_unit(unit, results)
        scores.write_unit(unit, influence[part], stderr[part], status[part])
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # foreign: the kernel's own client, and the file system's events
def test_the_notebook_says_why_a_row_was_chosen(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat runs the notebook (extra: dev)")
    from nbclient import NotebookClient

    monkeypatch.setenv("ICONS_RUN", str(run))
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "row 17: 2 of 2 tasks vote for it" in shown
    assert "1.000  row 21" in shown
    assert '"value": "What is 17?"' in shown
