import numpy as np
import pytest

from icons.consensus import select

RNG = np.random.default_rng(8)
SCORES = RNG.normal(size=(60, 3)).astype(np.float32) * np.array([1, 5, 0.1], np.float32)


def order(chosen: object, num: int) -> list[int]:
    return np.argsort(-chosen.score, kind="stable")[:num].tolist()  # type: ignore[attr-defined]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, 1.0, 0.0]])
def test_bids_equals_a_loop_in_which_the_worst_served_task_chooses(weights: list[float]) -> None:
    standard = [[(v - column.astype(float).mean()) / column.astype(float).std() for v in column] for column in SCORES.T]
    served, taken = [0.0] * 3, [5]
    served = [standard[task][5] / weights[task] if weights[task] else np.inf for task in range(3)]
    while len(taken) < 25:
        worst = min(range(3), key=lambda task: served[task])
        row = max((row for row in range(60) if row not in [*taken, 7]), key=lambda row: standard[worst][row])
        taken.append(row)
        served = [served[task] + (standard[task][row] / weights[task] if weights[task] else 0) for task in range(3)]
    chosen = select(SCORES, num_rows=25, method="bids", weights=weights, budget={"include": [5], "exclude": [7]})
    assert order(chosen, 24) == taken[1:]
    assert chosen.rows.tolist() == sorted(taken)


def test_a_task_whose_scores_are_all_the_same_chooses_nothing_under_bids() -> None:
    scores = np.stack([np.zeros(30), RNG.normal(size=30)], axis=1).astype(np.float32)
    assert select(scores, 0.2, "bids").rows.tolist() == sorted(np.argsort(-scores[:, 1])[:6].tolist())
    assert select(np.zeros((10, 2), np.float32), 0.2, "bids").rows.tolist() == [0, 1]


@pytest.mark.parametrize("shortest", [64, 1])
def test_validation_rows_choose_in_turn_within_tasks_in_turn(shortest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if shortest == 1:  # lists are used up again and again
        monkeypatch.setattr("icons.consensus.rules.turns.SHORTEST", 1)
        monkeypatch.setattr("icons.consensus.rules.turns.LONGER", 0)
    parts = [RNG.normal(size=(60, size)).astype(np.float16) for size in (2, 5, 1)]
    taken: list[int] = []
    turn = [0, 0, 0]
    while len(taken) < 30:
        for task, part in enumerate(parts):
            column = part[:, turn[task] % part.shape[1]].astype(float)
            turn[task] += 1
            if len(taken) < 30:
                taken.append(max((row for row in range(60) if row not in taken), key=lambda row: column[row]))
    pairs = {str(task): part for task, part in enumerate(parts)}
    chosen = select(SCORES, num_rows=30, method="round_robin_rows", pairs=pairs)
    assert order(chosen, 30) == taken


def test_level_rows_are_taken_by_percentile_rank_then_by_row_however_short_the_lists() -> None:
    scores = np.array([[0], [0], [1], [0], [2], [0]], np.float32)
    chosen = select(scores, num_rows=3, method="round_robin_rows", pairs={"0": np.ones((6, 3))})
    assert chosen.rows.tolist() == [0, 2, 4]
