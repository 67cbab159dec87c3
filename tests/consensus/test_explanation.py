"""Why a row is selected: rank, votes and the validation rows that pulled it, against a loop over all rows."""

from pathlib import Path

import numpy as np
import pytest

from icons.consensus import select
from icons.consensus.explanation import explain
from icons.store import ScoreStore

SCORES = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
SCORES[7] = np.nan
SCORES[20] = SCORES[21]


@pytest.mark.parametrize("method", ["vote", "mean"])
def test_rank_and_votes_are_those_of_the_order(method: str) -> None:
    chosen = select(SCORES, 0.2, method)
    scored = [row for row in range(50) if row != 7]
    order = sorted(scored, key=lambda row: (-chosen.score[row], -chosen.percentile_rank[row], row))
    for row in scored:
        found = chosen.explain(row, SCORES)
        assert found.rank == order.index(row) + 1 and found.selected == (row in chosen.rows)
        assert [verdict.votes for verdict in found.tasks] == (SCORES[row] >= chosen.thresholds).tolist()
        assert found.votes == sum(verdict.votes for verdict in found.tasks) and found.num_scored == 49


def test_printed_it_is_a_small_table() -> None:
    chosen = select(SCORES, 0.2)
    said = str(explain(int(chosen.rows[0]), chosen, SCORES))
    assert said.startswith(f"row {chosen.rows[0]}: selected; rank ") and said.count("\n") == 3
    assert str(explain(7, chosen, SCORES)) == "row 7: has no score (it failed), and cannot be selected"
    assert repr(chosen) == "Selection(vote: 10 of 50 rows, 3 tasks)"


def test_validation_rows_that_pull_come_from_the_store(tmp_path: Path) -> None:
    extra = {"top_rows_a": ("int32", [("top_a", 2)]), "top_influence_a": ("float32", [("top_a", 2)])}
    store = ScoreStore.create(tmp_path / "s.zarr", num_rows=50, tasks=["a", "b", "c"], extra=extra)
    rows, products = np.tile([5, -1], (50, 1)).astype(np.int32), np.tile([0.25, np.nan], (50, 1)).astype(np.float32)
    status = np.where(np.isnan(SCORES[:, 0]), 3, 1).astype(np.uint8)
    store.write_unit(
        0, SCORES, np.full_like(SCORES, 0.01), status, top_rows_a=rows, top_influence_a=products
    )  # fmt: skip
    store = ScoreStore.open(tmp_path / "s.zarr")
    found = select(store, 0.2).explain(3, store)
    assert found.tasks[0].pulled_by == [(5, 0.25)] and found.tasks[1].pulled_by == []
    assert "± 0.01" in str(found) and "validation rows 5 (0.250)" in str(found)


def test_what_does_not_fit_is_refused() -> None:
    chosen = select(SCORES, 0.2)
    with pytest.raises(ValueError, match="row 50: expected one of 0 to 49"):
        explain(50, chosen, SCORES)
    with pytest.raises(ValueError, match=r"got shape \(50, 2\); expected \[50, 3\]"):
        explain(0, chosen, SCORES[:, :2])
