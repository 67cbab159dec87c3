import heapq

import numpy as np
import pytest

from icons import influence
from icons.consensus import select

RNG = np.random.default_rng(6)
TRAIN = RNG.normal(size=(90, 12)).astype(np.float32)
TRAIN[40:50] = TRAIN[30] + 0.1 * RNG.normal(size=(10, 12))  # near-duplicates
TASKS = {
    "a": (TRAIN[30] + RNG.normal(size=(3, 12))).astype(np.float32),
    "b": RNG.normal(size=(5, 12)).astype(np.float32),
}


class Named:
    influence, tasks = influence(TRAIN, TASKS).numpy(), ["a", "b"]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows.astype(float) / np.linalg.norm(rows, axis=1, keepdims=True)


def slow_masses(alpha: float, cost: float, sigma: float) -> np.ndarray:
    """Neighbourhoods grow one neighbour at a time, by a heap."""
    rows = unit(np.concatenate(list(TASKS.values())))
    mass = [1 / 2 / 3] * 3 + [1 / 2 / 5] * 5
    distance = 1 - (rows @ unit(TRAIN).T).astype(np.float16).astype(float)
    lists = [np.argsort(part, kind="stable")[:9].tolist() for part in distance]
    near = sorted({row for part in lists for row in part})
    inverse = {}
    for row in near:
        squares = {other: 2 - 2 * unit(TRAIN)[row] @ unit(TRAIN)[other] for other in near if other != row}
        inverse[row] = 1 / (1 + sum(max(0, 1 - square / sigma**2) for square in squares.values()))
    heap = [(inverse[part[0]], 0, m) for m, part in enumerate(lists)]
    heapq.heapify(heap)
    num, costs, level = [1] * 8, [0.0] * 8, 0.0
    while heap:
        level, k, m = heapq.heappop(heap)
        members = lists[m][: k + 1]
        costs[m] = sum((distance[m, lists[m][k + 1]] - distance[m, row]) * inverse[row] for row in members)
        if alpha / cost * sum(c * w for c, w in zip(costs, mass, strict=True)) >= 1 - alpha:
            break
        num[m] = k + 1
        if k + 1 < 8:
            heapq.heappush(heap, (level + inverse[lists[m][k + 1]], k + 1, m))
    found = np.zeros(90)
    for m, part in enumerate(lists):
        for row in part[: num[m]]:
            found[row] += mass[m] * inverse[row] / level
        found[part[num[m]]] += mass[m] * max(0.0, 1 - sum(inverse[row] for row in part[: num[m]]) / level)
    return found


@pytest.mark.parametrize(("alpha", "cost"), [(0.01, 5.0), (0.6, 0.5), (0.95, 0.1)])
def test_masses_equal_neighbourhoods_grown_one_by_one(alpha: float, cost: float) -> None:
    options = {"alpha": alpha, "cost": cost, "sigma": 0.9}
    chosen = select(Named(), num_rows=12, method="knn_kde", train=TRAIN, tasks=TASKS, options=options)
    assert np.allclose(chosen.score, slow_masses(alpha, cost, 0.9), rtol=1e-3, atol=1e-6)


def test_near_duplicates_share_what_one_would_get() -> None:
    chosen = select(Named(), num_rows=12, method="knn_kde", train=TRAIN, tasks=TASKS)
    near = [row for row in range(40, 50) if chosen.score[row] > 0]
    alone = [row for row in np.flatnonzero(chosen.score > 0) if row not in [30, *range(40, 50)]]
    assert near and np.median(chosen.score[near]) < np.median(chosen.score[alone]) / 2


def test_a_sample_of_reference_rows_estimates_the_density(monkeypatch: pytest.MonkeyPatch) -> None:
    from icons.consensus.rules import knn_kde

    monkeypatch.setattr(knn_kde, "REFERENCE_ROWS", 30)
    some = select(Named(), num_rows=12, method="knn_kde", train=TRAIN, tasks=TASKS)
    assert len(some.rows) == 12 and np.isfinite(some.score).all()


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"knn_kde: got neighbours=5000, alpha=0\.0"):
        select(Named(), method="knn_kde", train=TRAIN, tasks=TASKS, options={"alpha": 0.0})
