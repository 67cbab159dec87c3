"""A score store holds influence, standard error and status per row, and further arrays where asked for."""

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
