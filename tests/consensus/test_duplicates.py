import numpy as np
import pytest

from icons.consensus.duplicates import NearDuplicates


def groups_of_alike(dim: int, seed: int) -> np.ndarray:
    """60 rows in 20 groups; inside a group cosines are from 0.9 to 1."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.normal(size=(20, dim)), 3, axis=0)
    return (centres + rng.uniform(0, 0.45, size=(60, 1)) * rng.normal(size=(60, dim))).astype(np.float32)


def greedy(rows: np.ndarray, order: np.ndarray, cosine: float) -> list[bool]:
    """Row by row against every row that stayed."""
    unit = rows.astype(float) / np.linalg.norm(rows.astype(float), axis=1, keepdims=True)
    stayed: list[int] = []
    dropped = []
    for row in order.tolist():
        dropped.append(any(unit[row] @ unit[other] >= cosine for other in stayed))
        if not dropped[-1]:
            stayed.append(row)
    return dropped


@pytest.mark.parametrize("dim", [64, 1500])  # below and above the sketch's size
@pytest.mark.parametrize("cosine", [0.85, 0.95])
def test_near_duplicates_are_those_of_a_loop(dim: int, cosine: float) -> None:
    rows = groups_of_alike(dim, seed=1)
    order = np.random.default_rng(2).permutation(60)
    with NearDuplicates(rows, cosine) as near:
        found = near.add(order).tolist()
    assert found == greedy(rows, order, cosine) and any(found) and not all(found)


def test_rows_in_two_steps_are_rows_in_one() -> None:
    rows, order = groups_of_alike(32, seed=3), np.arange(60)
    with NearDuplicates(rows, 0.9) as near:
        whole = near.add(order).tolist()
    with NearDuplicates(rows, 0.9) as near:
        parts = near.add(order[:25]).tolist() + near.add(order[25:]).tolist()
        assert near.add([]).tolist() == []
    assert parts == whole


def test_kept_rows_stay_and_equal_rows_are_found_at_cosine_one() -> None:
    rows = np.random.default_rng(4).normal(size=(3, 16)).astype(np.float32)
    rows[2] = 5 * rows[0]
    with NearDuplicates(rows, 1.0) as near:
        assert near.add([0, 1, 2]).tolist() == [False, False, True]
    with NearDuplicates(rows, 1.0) as near:
        assert near.add([0, 2, 1], keep=2).tolist() == [False, False, False]


def test_a_cosine_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"near-duplicates: got cosine 1.5; expected above 0 and at most 1"):
        NearDuplicates(np.ones((2, 2), np.float32), 1.5)
