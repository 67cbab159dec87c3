import numpy as np
import pytest

from icons.consensus import select

RNG = np.random.default_rng(5)


def slow_coverage(parts: list[np.ndarray], num: int, start: list[int], weights: list[float]) -> list[int]:
    """One by one among all rows."""
    columns = np.concatenate(parts, axis=1).astype(float).clip(min=0)
    weight = np.concatenate([np.full(p.shape[1], w / p.shape[1]) for p, w in zip(parts, weights, strict=True)])
    chosen = list(start)
    while len(chosen) < num + len(start):
        served = columns[chosen].sum(axis=0)
        free = [row for row in range(len(columns)) if row not in chosen]
        chosen.append(max(free, key=lambda row: float((np.sqrt(served + columns[row]) - np.sqrt(served)) @ weight)))
    return chosen[len(start) :]


@pytest.mark.parametrize("start", [[], [4, 50]])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.2, 2.0]])
def test_choice_equals_a_loop_over_all_rows(
    start: list[int], weights: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [RNG.normal(size=(120, 6)).astype(np.float16), RNG.normal(size=(120, 3)).astype(np.float16)]
    scores = np.stack([part.astype(np.float32).mean(axis=1) for part in parts], axis=1)
    arrays = {"0": parts[0], "1": parts[1]}
    expected = slow_coverage(parts, 40, start, weights)
    for pool in (1 << 26, 9 * 15):  # all rows in the pool; 15 of them, so that all have to be looked at again
        monkeypatch.setattr("icons.consensus.rules.coverage.POOL_NUMBERS", pool)
        chosen = select(
            scores, method="coverage", num_rows=40 + len(start), pairs=arrays, budget={"include": start},
            weights=weights, options={"rounds": 40},
        )  # fmt: skip
        assert np.argsort(-chosen.score, kind="stable")[:40].tolist() == expected
        assert chosen.rows.tolist() == sorted(expected + start)


def test_few_looks_yield_their_share_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icons.consensus.rules.coverage.POOL_NUMBERS", 1)
    products = {"0": RNG.normal(size=(60, 4))}
    chosen = select(products["0"].mean(axis=1, keepdims=True), 0.5, "coverage", pairs=products, options={"rounds": 2})
    assert len(chosen.rows) == 30


def test_the_second_row_of_a_kind_gives_way_to_another_kind() -> None:
    products = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.7], [-1.0, 0.6]])
    scores = products.mean(axis=1, keepdims=True).astype(np.float32)
    assert select(scores, 0.5, "mean").rows.tolist() == [0, 1]
    assert select(scores, 0.5, "coverage", pairs={"0": products}).rows.tolist() == [0, 2]


def test_ties_go_to_the_higher_percentile_rank_then_to_the_lower_row() -> None:
    scores = np.array([[0], [0], [1], [0], [2], [0]], np.float32)
    assert select(scores, num_rows=3, method="coverage", pairs={"0": np.ones((6, 3))}).rows.tolist() == [0, 2, 4]


def test_no_look_is_refused() -> None:
    with pytest.raises(ValueError, match="coverage: got rounds=0"):
        select(np.ones((4, 1)), method="coverage", pairs={"0": np.ones((4, 2))}, options={"rounds": 0})
