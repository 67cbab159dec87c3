"""A score store holds influence, standard error and status per row, and further arrays where asked for."""

import sys
from pathlib import Path

import numpy as np
import pytest
import xarray

from icons.store.score_store import ScoreStore


def test_scores_extras_and_status_come_back(tmp_path: Path) -> None:
    store = ScoreStore.create(
        tmp_path / "s",
        num_rows=7,
        tasks=["gqa", "pope"],
        manifest={"train": {"fingerprint": "x"}},
        chunk_rows=4,
        extra={"norm": ("float32", []), "pairwise_gqa": ("float16", [("validation_gqa", 3)])},
    )
    rng = np.random.default_rng(0)
    influence, stderr = rng.random((2, 7, 2), dtype=np.float32)
    norm, pairwise = rng.random(7, dtype=np.float32), rng.random((7, 3)).astype(np.float16)
    status = np.array([1, 1, 3, 1, 1, 0, 1], np.uint8)
    for unit, rows in enumerate([slice(0, 4), slice(4, 7)]):
        store.write_unit(
            unit, influence[rows], stderr[rows], status[rows], norm=norm[rows], pairwise_gqa=pairwise[rows]
        )
    read = ScoreStore.open(tmp_path / "s")
    assert read.tasks == ["gqa", "pope"] and read.manifest["train"] == {"fingerprint": "x"}
    for name, values in {"influence": influence, "stderr": stderr, "norm": norm, "pairwise_gqa": pairwise}.items():
        np.testing.assert_array_equal(read.arrays[name][:], values)
    assert read.missing() == [1], "a unit with a row that is not written is still to do"
    assert read.counts() == {"done": 5, "failed": 1, "missing": 1}
    assert "7 x 2 tasks (gqa, pope)" in repr(read) and "done   5   failed 1   missing 1" in repr(read)
    dataset = xarray.open_zarr(tmp_path / "s", consolidated=False)
    assert dataset["influence"].dims == ("row", "task") and dataset["pairwise_gqa"].dims == ("row", "validation_gqa")


def test_rows_never_written_read_as_nan(tmp_path: Path) -> None:
    store = ScoreStore.create(tmp_path / "s", num_rows=3, tasks=["a"])
    assert np.isnan(store.influence[:]).all() and np.isnan(store.stderr[:]).all()


@pytest.mark.parametrize(("num_rows", "tasks"), [(0, ["a"]), (3, []), (3, ["a", "a"])])
def test_no_rows_no_tasks_or_a_task_twice_is_an_error(tmp_path: Path, num_rows: int, tasks: list[str]) -> None:
    with pytest.raises(ValueError, match=f"got num_rows={num_rows}, tasks=.*; expected rows, and distinct tasks"):
        ScoreStore.create(tmp_path / "s", num_rows=num_rows, tasks=tasks)


@pytest.fixture
def scored(tmp_path: Path) -> ScoreStore:
    store = ScoreStore.create(tmp_path / "t.zarr", num_rows=3, tasks=["gqa", "pope"], extra={"loss": ("float32", [])})
    values = np.array([[0.1, 0.2], [0.3, 0.4], [np.nan, np.nan]], np.float32)
    store.write_unit(0, values, values / 10, np.array([1, 1, 3], np.uint8), loss=np.ones(3, np.float32))
    return ScoreStore.open(tmp_path / "t.zarr")


def test_as_a_table_of_pandas(scored: ScoreStore) -> None:
    table = scored.to_pandas()
    assert list(table.columns) == ["gqa", "pope", "stderr_gqa", "stderr_pope", "loss", "status"]
    assert table.index.name == "row" and table["pope"].tolist()[:2] == [np.float32(0.2), np.float32(0.4)]
    assert table["status"].tolist() == ["done", "done", "image_missing"]


@pytest.mark.filterwarnings("ignore")
def test_xarray_knows_tasks_and_ids_by_name(scored: ScoreStore) -> None:
    data = scored.to_xarray(ids=["a", "b", "c"])
    assert data.sel(task="pope")["influence"].values[1] == np.float32(0.4)
    assert data.set_index(row="id").sel(row="b", task="gqa")["influence"].item() == np.float32(0.3)
    with pytest.raises(ValueError, match="ids: got 1; expected 3, one for each row"):
        scored.to_xarray(ids=["a"])


def test_a_package_that_is_missing_is_named(scored: ScoreStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match=r"pandas is not installed; pip install 'icons-lightning\[table\]'"):
        scored.to_pandas()
