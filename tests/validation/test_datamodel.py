"""The linear datamodelling score against scipy, and on data where the truth is known."""

import numpy as np
import pytest
from scipy import stats

from icons.validation.datamodel import (
    datamodelling_score,
    draw_subsets,
    mean_interval,
    predicted_gain,
    separation,
    separation_interval,
    share_in_lowest,
    spearman,
)


def test_spearman_is_scipys_with_ties() -> None:
    generator = np.random.default_rng(0)
    left, right = generator.integers(0, 6, (40, 3)).astype(float), generator.integers(0, 4, (40, 3)).astype(float)
    expected = [stats.spearmanr(left[:, task], right[:, task]).statistic for task in range(3)]
    np.testing.assert_allclose(spearman(left, right), expected)
    assert spearman(np.zeros((5, 1)), np.arange(5.0)[:, None]).tolist() == [0.0]


def test_a_subset_does_not_depend_on_how_many_there_are() -> None:
    few, many = draw_subsets(50, 2, 0.5), draw_subsets(50, 5, 0.5)
    assert all(np.array_equal(a, b) for a, b in zip(few, many, strict=False))
    assert len(many[0]) == 25
    with pytest.raises(ValueError, match="gives subsets of 0 rows; expected some in and some out"):
        draw_subsets(50, 2, 0.001)


def test_true_influence_predicts_and_random_numbers_do_not() -> None:
    generator = np.random.default_rng(1)
    truth, subsets = generator.standard_normal((200, 3)), draw_subsets(200, 60, 0.5)
    losses = -predicted_gain(truth, subsets) + 2 * generator.standard_normal((60, 3))
    estimate, low, high = datamodelling_score(predicted_gain(truth, subsets), losses)
    assert 0.8 < low < estimate < high
    estimate, low, high = datamodelling_score(predicted_gain(generator.standard_normal((200, 3)), subsets), losses)
    assert low < 0 < high


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="expected the same shape, and at least 3 subsets"):
        datamodelling_score(np.zeros((4, 2)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="at least 3 subsets"):
        datamodelling_score(np.zeros((2, 2)), np.zeros((2, 2)))


def test_rows_without_a_score_add_nothing() -> None:
    scores = np.array([[1.0], [np.nan], [2.0]])
    assert predicted_gain(scores, [np.array([0, 1]), np.array([1, 2])]).tolist() == [[1.0], [2.0]]


def test_separation_is_the_area_under_the_curve() -> None:
    generator = np.random.default_rng(2)
    score, bad = generator.integers(0, 9, 60).astype(float), generator.random(60) < 0.3
    pairs = np.sign(score[~bad][:, None] - score[bad])
    assert separation(score, bad) == pytest.approx(((pairs + 1) / 2).mean())
    score[0] = np.nan
    assert np.isfinite(separation(score, bad))
    assert np.isnan(separation(score, np.zeros(60, dtype=bool)))


def test_share_in_lowest_leaves_out_rows_without_a_score() -> None:
    score = np.array([np.nan, 0.0, 1.0, 2.0, 3.0, 4.0])
    assert share_in_lowest(score, np.array([True, False, True, False, False, False]), 0.4) == 1.0
    assert np.isnan(share_in_lowest(score, np.array([True, False, False, False, False, False])))


def test_the_interval_of_a_mean_is_students() -> None:
    generator = np.random.default_rng(3)
    for count in (2, 5, 11, 12, 30):
        values = generator.standard_normal(count)
        expected = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
        np.testing.assert_allclose(mean_interval(values)[1:], expected, rtol=0.02, atol=0.005)
    assert np.isnan(mean_interval(np.array([1.0]))[1:]).all()


def test_the_interval_of_the_area_holds_19_of_20_draws() -> None:
    generator = np.random.default_rng(4)
    truth, bad = stats.norm.cdf(1 / np.sqrt(2)), np.arange(200) < 50
    held = []
    for _ in range(300):
        area = separation(generator.standard_normal(200) - bad, bad)
        low, high = separation_interval(area, 50, 150)
        held.append(low <= truth <= high)
    assert 0.91 < np.mean(held) < 0.99
