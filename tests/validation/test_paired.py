"""Paired differences agree with scipy's paired t-test, and Holm's correction with its definition."""

import itertools

import numpy as np
import pytest
from scipy import stats

from icons.validation.paired import Difference, corrected, holm, paired_difference


def test_one_pool_pairs_its_seeds_as_scipy_does() -> None:
    draw = np.random.default_rng(0)
    ours, theirs = draw.normal(80, 3, (1, 6)), draw.normal(78, 3, (1, 6))
    found, expected = paired_difference(ours, theirs), stats.ttest_rel(ours[0], theirs[0])
    interval = expected.confidence_interval(0.95)
    assert found.num_pairs == 6
    assert (found.mean, found.low, found.high, found.p_value) == pytest.approx(
        ((ours - theirs).mean(), interval.low, interval.high, expected.pvalue), rel=1e-10
    )


def test_several_pools_are_the_observations_and_their_seeds_are_averaged() -> None:
    draw = np.random.default_rng(1)
    ours, theirs = draw.normal(80, 3, (5, 3)), draw.normal(78, 3, (5, 3))
    found = paired_difference(ours, theirs)
    expected = stats.ttest_rel(ours.mean(axis=1), theirs.mean(axis=1))
    assert (found.num_pairs, found.p_value) == (5, pytest.approx(expected.pvalue, rel=1e-10))


def test_the_order_of_pools_and_seeds_does_not_matter() -> None:
    draw = np.random.default_rng(2)
    ours, theirs = draw.normal(size=(4, 3)), draw.normal(size=(4, 3))
    pools, seeds = draw.permutation(4), draw.permutation(3)
    one = paired_difference(ours, theirs)
    other = paired_difference(ours[pools][:, seeds], theirs[pools][:, seeds])
    assert (other.mean, other.low, other.p_value) == pytest.approx((one.mean, one.low, one.p_value))


def test_a_single_pair_has_no_interval_and_is_never_significant() -> None:
    found = corrected([paired_difference(np.array([[90.0]]), np.array([[10.0]]))])[0]
    assert (found.mean, found.num_pairs) == (80.0, 1)
    assert np.isnan([found.low, found.high, found.p_value, found.adjusted]).all()
    assert not found.is_significant


def test_equal_rules_differ_by_nothing() -> None:
    same = np.array([[1.0, 2.0, 3.0]])
    assert corrected([paired_difference(same, same)]) == [Difference(0.0, 0.0, 0.0, 1.0, 3, 1.0)]


def definition_of_holm(p_values: list[float]) -> list[bool]:
    """Which are rejected at 5 %: from the smallest on, as long as p < 0.05 / (those that are left)."""
    rejected = [False] * len(p_values)
    for step, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if not p_values[place] < 0.05 / (len(p_values) - step):
            break
        rejected[place] = True
    return rejected


def test_holm_rejects_what_its_definition_rejects() -> None:
    draw = np.random.default_rng(3)
    for count in (1, 2, 5, 9):
        for _ in range(50):
            p_values = (draw.random(count) ** 4).tolist()
            assert [p < 0.05 for p in holm(p_values)] == definition_of_holm(p_values)


def test_holm_leaves_out_what_is_not_known_and_ignores_the_order() -> None:
    assert holm([0.02, float("nan"), 0.01])[::2] == holm([0.02, 0.01])
    values = [0.01, 0.2, 0.01, 0.04]
    expected = dict(zip(values, holm(values), strict=True))
    for order in itertools.permutations(values):
        assert holm(list(order)) == [expected[value] for value in order]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (np.ones((0, 2)), np.ones((0, 2)), r"got \(0, 2\) pools and seeds; expected at least one of each"),
        (np.array([[1.0, np.nan]]), np.ones((1, 2)), "got a value that is not finite"),
    ],
)
def test_refuses_what_cannot_be_paired(ours: np.ndarray, theirs: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(ours, theirs)
