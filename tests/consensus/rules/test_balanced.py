from itertools import pairwise

import numpy as np
import pytest

from icons.consensus import select

RNG = np.random.default_rng(3)
PAIRS = {"a": RNG.normal(size=(40, 5)).astype(np.float16), "b": RNG.normal(0.2, 0.4, size=(40, 2)).astype(np.float16)}
SCORES = np.stack([part.astype(np.float32).mean(axis=1) for part in PAIRS.values()], axis=1)


def slow_balanced(num: int, rounds: int, scale: float, weights: tuple[float, float] = (1.0, 1.0)) -> list[list[int]]:
    """The rows of each round, by loops over rows and validation rows."""
    columns = [(task, m) for task, part in enumerate(PAIRS.values()) for m in range(part.shape[1])]
    value = {(row, c): float(list(PAIRS.values())[c[0]][row, c[1]]) for row in range(40) for c in columns}
    sizes = [part.shape[1] for part in PAIRS.values()]
    mean = [float(np.average(SCORES[row].astype(float), weights=weights)) for row in range(40)]
    top = sorted(range(40), key=lambda row: -mean[row])[:num]
    spread = [
        scale * sum(abs(sum(value[row, c] for row in top)) for c in columns if c[0] == task) / sizes[task]
        for task in range(2)
    ]
    edges = [round(place) for place in np.cumsum([0, *(len(part) for part in np.array_split(range(num), rounds))])]
    chosen: list[int] = []
    found = []
    for start, stop in pairwise(edges):
        slope = {}
        for c in columns:
            served = sum(value[row, c] for row in chosen) / spread[c[0]]
            slope[c] = weights[c[0]] / sizes[c[0]] / spread[c[0]] * np.exp(-served) / (1 + np.exp(-served))
        free = [row for row in range(40) if row not in chosen]
        best = sorted(free, key=lambda row: -sum(slope[c] * value[row, c] for c in columns))[: stop - start]
        chosen += best
        found.append(best)
    return found


@pytest.mark.parametrize(("num", "rounds", "scale"), [(8, 8, 0.5), (10, 3, 0.1), (30, 4, 2.0)])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 0.5)])
def test_rounds_equal_loops_over_rows(num: int, rounds: int, scale: float, weights: tuple[float, float]) -> None:
    options = {"rounds": rounds, "scale": scale}
    arrays = {"0": PAIRS["a"], "1": PAIRS["b"]}
    chosen = select(SCORES, method="balanced", num_rows=num, pairs=arrays, options=options, weights=list(weights))
    expected = [row for part in slow_balanced(num, rounds, scale, weights) for row in part]
    assert np.argsort(-chosen.score, kind="stable")[:num].tolist() == expected
    assert chosen.rows.tolist() == sorted(expected)


def test_a_kind_of_row_stops_paying_once_its_validation_rows_are_served() -> None:
    """Half of the rows help validation row 0 a little more than the others help row 1."""
    products = np.array([[0.5, 0.0]] * 20 + [[0.0, 0.4]] * 20)
    scores = products.mean(axis=1, keepdims=True).astype(np.float32)
    assert (select(scores, 0.5, "mean").rows < 20).all()
    chosen = select(scores, 0.5, "balanced", pairs={"0": products}).rows
    assert 7 <= (chosen < 20).sum() <= 13


def test_a_row_that_hurts_a_validation_row_gives_way() -> None:
    """Rows 0 to 9 help row 0 and hurt row 1 by less, so that their mean is the highest; 10 to 19 help both a little."""
    products = np.array([[1.0, -0.5]] * 10 + [[0.2, 0.2]] * 10 + [[0.0, 0.0]] * 20)
    scores = products.mean(axis=1, keepdims=True).astype(np.float32)
    assert select(scores, 0.25, "mean").rows.tolist() == list(range(10))
    chosen = select(scores, 0.25, "balanced", pairs={"0": products}).rows
    assert products[chosen].sum(axis=0).min() > 0


def test_rows_that_are_in_anyway_count_as_served_and_excluded_ones_are_never_chosen() -> None:
    products = np.array([[0.5, 0.0]] * 20 + [[0.0, 0.4]] * 20)
    scores = products.mean(axis=1, keepdims=True).astype(np.float32)
    budget = {"include": list(range(8)), "exclude": [20, 21]}
    rows = select(scores, num_rows=16, method="balanced", pairs={"0": products}, budget=budget).rows
    assert set(range(8)) <= set(rows.tolist()) and not {20, 21} & set(rows.tolist()) and len(rows) == 16
    assert (rows >= 20).sum() >= 5


def test_ties_go_to_the_higher_percentile_rank_then_to_the_lower_row() -> None:
    same = np.ones((9, 2))
    assert select(np.ones((9, 1), np.float32), num_rows=4, method="balanced", pairs={"0": same}).rows.tolist() == [
        0, 1, 2, 3
    ]  # fmt: skip
    scores = np.array([[0], [0], [1], [0], [2], [0]], np.float32)
    assert select(scores, num_rows=2, method="balanced", pairs={"0": np.ones((6, 3))}).rows.tolist() == [2, 4]


@pytest.mark.parametrize("options", [{"rounds": 0}, {"scale": 0}])
def test_impossible_options_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="balanced: got rounds="):
        select(SCORES, method="balanced", pairs={"0": PAIRS["a"], "1": PAIRS["b"]}, options=options)
