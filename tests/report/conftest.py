"""A small run as the report reads it: a score store of five tasks, records of three kinds, some images, a selection."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from icons.consensus import select
from icons.consensus.selection_file import manifest_path, manifest_text, open_selection
from icons.report.build import Chosen, Pool
from icons.store import ScoreStore

NUM_ROWS = 300
TASKS = ["vqav2", "gqa", "textvqa", "pope", "mmbench"]
BROKEN, MISSING, UNREADABLE, FAILED = 7, 8, 9, 10


def record(row: int) -> dict[str, Any]:
    kind = ("shape", "colour", "wrong answer")[row % 3]
    question = f"<image>\nWhat is <b>{row}</b>? & why\nAnswer the question using a single word or phrase."
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": f"<i>{kind}</i>"}]
    image = {} if row % 10 == 1 else {"image": f"{'coco' if row % 2 else 'vg'}/{row}.png"}
    return {"id": f"id-{row}", "provenance": {"kind": kind}, "conversations": said, **image}


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.json, images/ (one broken, one missing) and scores.zarr; the rows with a problem score highest."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "train.json").write_text(json.dumps([record(row) for row in range(NUM_ROWS)], indent=1))
    for row in range(NUM_ROWS):
        path = folder / "images" / record(row).get("image", "text/none.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        if row == BROKEN:
            path.write_bytes(b"not an image")
        elif row != MISSING:
            Image.linear_gradient("L").resize((64, 48)).rotate(row).save(path)
    random = np.random.default_rng(0)
    own, common = random.normal(size=(NUM_ROWS, len(TASKS))), random.normal(size=(NUM_ROWS, 1))
    influence = (0.02 * (own + common)).astype(np.float32)
    influence[[BROKEN, MISSING, UNREADABLE]] = 0.2
    influence[FAILED] = np.nan
    status = np.ones(NUM_ROWS, np.uint8)
    status[FAILED] = 3
    stderr = np.full(influence.shape, 0.004, np.float32)
    manifest = {"data": {"path": "train.json"}, "warning": "the warm-up's loss has hardly moved"}
    store = ScoreStore.create(folder / "scores.zarr", num_rows=NUM_ROWS, tasks=TASKS, manifest=manifest, chunk_rows=128)
    for unit in range(store.partition.num_units):
        rows = store.partition.unit_rows(unit)
        part = slice(rows.start, rows.stop)
        store.write_unit(unit, influence[part], stderr[part], status[part])
    return folder


@pytest.fixture(scope="session")
def scores(run: Path) -> ScoreStore:
    return ScoreStore.open(run / "scores.zarr")


@pytest.fixture(scope="session")
def selection(run: Path, scores: ScoreStore) -> Path:
    """The manifest of the 60 rows with the most votes, as `icons select` leaves it."""
    chosen = select(scores, fraction=0.2)
    assert len(chosen.rows) == 60
    manifest = {
        "num_rows": NUM_ROWS,
        "num_selected": 60,
        "method": "vote",
        "fraction": 0.2,
        "thresholds": dict(zip(TASKS, chosen.thresholds.tolist(), strict=True)),
        "border": {"certain": 43, "may_leave": 17, "may_enter": 12, "verdict": "K leaves the border open."},
        "scores": {"path": "scores.zarr", **scores.manifest},
        "warnings": ["the warm-up's loss has hardly moved"],
    }
    manifest_path(run / "selected.json").write_text(manifest_text(chosen.rows, manifest, {}))
    return run / "selected.json"


@pytest.fixture(scope="session")
def chosen(selection: Path, scores: ScoreStore) -> Chosen:
    return Chosen.of(open_selection(selection), scores)


@pytest.fixture(scope="session")
def pool(run: Path) -> Pool:
    def read(row: int) -> dict[str, Any] | None:
        return None if row == UNREADABLE else record(row)

    return Pool("train.json", read, lambda image: Image.open(run / "images" / image.name))


@pytest.fixture(scope="session")
def results_file(run: Path) -> Path:
    def runs(*values: float) -> list[dict[str, Any]]:
        return [{"seed": i, "accuracy": dict.fromkeys(TASKS, value)} for i, value in enumerate(values)]

    methods = [
        {"name": "full", "rows": 300, "runs": runs(0.9)},
        {"name": "vote", "rows": 60, "strong": True, "runs": runs(0.88, 0.86)},
        {"name": "random", "rows": 60, "runs": runs(0.7, 0.74, 0.78)},
    ]
    path = run / "results.json"
    shares = [{"name": "wrong answers", "pool": 0.33, "selection": 0.12}]
    path.write_text(json.dumps({"tasks": TASKS, "reference": "full", "methods": methods, "shares": shares}))
    return path


@pytest.fixture(scope="session")
def validation_file(run: Path) -> Path:
    path = run / "validation.json"
    rows = [["exact, Adam", [0.41, 0.33, 0.48]], ["projected, K = 512", [0.3, 0.21, 0.4]], ["random", [0.0, -0.1, 0.1]]]
    path.write_text(json.dumps({"columns": ["method", "linear datamodelling score"], "rows": rows}))
    return path
