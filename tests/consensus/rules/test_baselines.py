import numpy as np
import pytest

from icons.consensus import select

SCORES = np.random.default_rng(2).normal(size=(101, 3)).astype(np.float32)
ORDER = np.argsort(-SCORES.astype(float).mean(axis=1))


def test_rows_are_drawn_evenly_from_the_better_half() -> None:
    counts = np.zeros(101)
    for seed in range(400):
        counts[select(SCORES, num_rows=25, method="filtered_random", seed=seed).rows] += 1
    assert counts[ORDER[50:]].sum() == 0
    assert counts[ORDER[:50]].min() > 140 and counts[ORDER[:50]].max() < 260  # 200 is expected, within 6 sigma


def test_a_draw_does_not_change_with_failed_rows_at_the_end_or_with_the_number_wanted() -> None:
    few, more = (select(SCORES, num_rows=num, method="filtered_random", seed=4).rows for num in (10, 30))
    assert set(few.tolist()) < set(more.tolist())
    padded = np.concatenate([SCORES, np.full((9, 3), np.nan, np.float32)])
    assert select(padded, num_rows=10, method="filtered_random", seed=4).rows.tolist() == few.tolist()


def test_beyond_the_better_half_the_best_of_the_others_follow() -> None:
    chosen = select(SCORES, num_rows=60, method="filtered_random")
    assert sorted(chosen.rows.tolist()) == sorted(ORDER[:60].tolist())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="filtered_random: got better=0"):
        select(SCORES, method="filtered_random", options={"better": 0})
    with pytest.raises(ValueError, match=r"option 'best': is none of this rule; it has better=0.5"):
        select(SCORES, method="filtered_random", options={"best": 0.5})
    with pytest.raises(ValueError, match=r"option 'best': is none of this rule; it has none"):
        select(SCORES, options={"best": 0.5})
    with pytest.raises(ValueError, match=r"option rounds: got 1.5; expected a whole number"):
        select(SCORES, method="balanced", options={"rounds": 1.5})
