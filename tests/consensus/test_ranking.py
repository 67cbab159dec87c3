import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import rankdata

from icons.consensus.ranking import best, midranks, order_of, ordered

few_values = st.sampled_from([-1.5, -0.0, 0.0, 1e-45, 0.25, 3.0])
columns = arrays(np.float32, st.integers(1, 40), elements=few_values | st.floats(-1, 1, width=32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(column=columns)
def test_midranks_are_scipys(dtype: type, column: np.ndarray) -> None:
    assert (midranks(column.astype(dtype)) == 2 * rankdata(column, method="average")).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(column=columns)
def test_order_is_that_of_a_stable_sort(dtype: type, column: np.ndarray) -> None:
    assert (order_of(column.astype(dtype)) == np.argsort(column, kind="stable")).all()


@given(
    scores=st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=30),
    num=st.integers(-1, 32),
)
def test_best_takes_the_first_of_the_whole_order(scores: list[tuple[bool, int, int]], num: int) -> None:
    candidates, score, tie = (np.array(part) for part in zip(*scores, strict=True))
    rows = [row for row in range(len(scores)) if candidates[row]]
    expected = sorted(rows, key=lambda row: (-score[row], -tie[row], row))
    assert ordered(np.array(rows, dtype=np.int64), score, tie).tolist() == expected
    assert best(candidates, score, tie, num).tolist() == sorted(expected[: max(num, 0)])
