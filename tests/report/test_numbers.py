"""One pass over blocks counts what plain numpy counts on the whole matrix."""

from pathlib import Path

import numpy as np
import pytest

from icons.consensus.overlap import task_overlap
from icons.report import numbers
from icons.report.numbers import Extremes, count
from icons.store import ScoreStore


@pytest.fixture
def store(tmp_path: Path) -> ScoreStore:
    random = np.random.default_rng(0)
    influence = np.round(random.normal(size=(53, 3)), 2).astype(np.float32)
    status = np.ones(53, np.uint8)
    status[[4, 30]] = 3
    influence[status != 1] = np.nan
    stderr = np.abs(random.normal(scale=0.2, size=(53, 3))).astype(np.float32)
    store = ScoreStore.create(tmp_path / "scores.zarr", num_rows=53, tasks=["a", "b", "c"], chunk_rows=8)
    for unit in range(store.partition.num_units):
        rows = store.partition.unit_rows(unit)
        part = slice(rows.start, rows.stop)
        store.write_unit(unit, influence[part], stderr[part], status[part])
    return ScoreStore.open(tmp_path / "scores.zarr")


def test_counts_equal_those_of_the_whole_matrix(store: ScoreStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "BLOCK_ROWS", 16)
    influence, stderr = store.influence[:], store.stderr[:]
    scored = np.isfinite(influence[:, 0])
    thresholds = np.nanpercentile(influence, 80, axis=0)
    selected = np.zeros(53, bool)
    selected[::5] = True
    counted = count(store, thresholds, selected, num_ends=4)
    votes_for = np.nan_to_num(influence, nan=-9) >= thresholds
    votes = votes_for.sum(axis=1)
    assert counted.status == {"done": 51, "image missing": 2}
    assert counted.num_scored == 51
    np.testing.assert_array_equal(counted.row_votes, votes)
    np.testing.assert_array_equal(counted.votes, np.bincount(votes[scored], minlength=4))
    np.testing.assert_array_equal(counted.votes_selected, np.bincount(votes[scored & selected], minlength=4))
    for i in range(3):
        for j in range(3):
            assert counted.shared[i, j] == (votes_for[:, i] & votes_for[:, j]).sum()
        assert counted.kept[i] == (votes_for[:, i] & selected).sum()
        assert counted.certain[i] == (scored & (influence[:, i] - 1.96 * stderr[:, i] >= thresholds[i])).sum()
        rows = [row for row in range(53) if scored[row]]
        assert counted.highest[i].tolist() == sorted(rows, key=lambda row: (-influence[row, i], row))[:4]
        assert counted.lowest[i].tolist() == sorted(rows, key=lambda row: (influence[row, i], row))[:4]
    own = np.diag(counted.shared)[:, None]
    np.testing.assert_allclose(counted.shared / own, task_overlap(store, 0.2), rtol=1e-7)
    np.testing.assert_array_equal(counted.sample, np.flatnonzero(scored))
    np.testing.assert_array_equal(counted.sample_scores, influence[scored])


def test_pictures_of_a_large_pool_are_drawn_from_a_seeded_sample(store: ScoreStore) -> None:
    thresholds, selected = np.zeros(3), np.zeros(53, bool)
    first = count(store, thresholds, selected, sample_rows=10, seed=1)
    again = count(store, thresholds, selected, sample_rows=10, seed=1)
    assert 8 <= len(first.sample) <= 10
    np.testing.assert_array_equal(first.sample, again.sample)
    np.testing.assert_array_equal(first.sample_scores, store.influence[:][first.sample])
    assert first.num_scored == 51


def test_ends_of_a_pool_that_is_too_small_are_filled_up() -> None:
    ends = Extremes(num_tasks=1, num_ends=3)
    ends.add(np.array([5, 6]), np.array([[0.5], [0.7]], np.float32))
    assert ends.rows.tolist() == [[6, 5, -1]]


def test_an_unknown_status_keeps_its_number() -> None:
    assert numbers.name(77) == "status 77"
