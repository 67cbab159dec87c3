import numpy as np
import pytest

from icons.consensus.overlap import overlap, task_overlap


def test_task_overlap_equals_a_count_of_sets() -> None:
    scores = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    scores[3] = np.nan
    scored = np.flatnonzero(np.isfinite(scores[:, 0]))
    own = [{row for row in scored if scores[row, t] >= np.percentile(scores[scored, t], 80)} for t in range(4)]
    expected = [[len(a & b) / len(a) for b in own] for a in own]
    assert np.allclose(task_overlap(scores, 0.2), expected)


def test_overlap_counts_an_entry_as_often_as_both_have_it() -> None:
    found = overlap(["a", "a", "b"], ["a", "a", "a", "c"])
    assert (found.num_a, found.num_b, found.shared) == (3, 4, 2)
    assert found.share_of_a == pytest.approx(2 / 3) and found.share_of_b == 0.5 and found.jaccard == pytest.approx(0.4)
    assert overlap([], []).jaccard == 0


def test_chance_is_what_random_selections_share() -> None:
    rng = np.random.default_rng(0)
    draws = [overlap(rng.choice(50, 10, False).tolist(), rng.choice(50, 20, False).tolist()) for _ in range(2000)]
    assert np.mean([draw.shared for draw in draws]) == pytest.approx(draws[0].by_chance(50), rel=0.05)
