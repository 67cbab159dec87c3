import numpy as np
import pytest

from icons.consensus import select
from icons.consensus.border import Border, border
from icons.consensus.budget import Sources

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=(2000, 6)).astype(np.float32)


@pytest.mark.parametrize("method", ["vote", "mean", "max", "rank", "norm"])
def test_without_errors_every_row_is_certain(method: str) -> None:
    found = border(select(TRUTH, method=method), TRUTH, np.zeros_like(TRUTH), dim=64)
    assert found is not None
    assert (found.certain, found.may_leave, found.may_enter) == (400, 0, 0)
    assert found.verdict() == "K = 64 was large enough: no row could swap."


@pytest.mark.parametrize("method", ["vote", "mean", "max", "rank", "norm"])
@pytest.mark.parametrize("error", [0.05, 0.3])
def test_certain_rows_are_selected_by_the_true_scores_too(method: str, error: float) -> None:
    kept, certain = 0, 0
    for seed in range(10):
        noise = np.random.default_rng(seed).normal(size=TRUTH.shape).astype(np.float32)
        estimate = TRUTH + np.float32(error) * noise
        chosen = select(estimate, method=method)
        found = border(chosen, estimate, np.full_like(TRUTH, error))
        assert found is not None
        certain += found.certain
        lost = len(np.setdiff1d(chosen.rows, select(TRUTH, method=method).rows))
        kept += min(found.certain, 400 - lost)
        assert lost <= found.may_leave, "more rows have swapped than were said to be able to"
        assert found.certain <= found.certain_at_4_dim <= 400
    assert kept >= 0.95 * certain


def test_more_error_leaves_less_certain() -> None:
    found = [border(select(TRUTH), TRUTH, np.full_like(TRUTH, error)) for error in (0.01, 0.1, 1.0)]
    shares = [one.share for one in found if one is not None]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.8 > shares[-1]


def test_the_verdict_names_the_k_that_would_help() -> None:
    found = border(select(TRUTH), TRUTH, np.full_like(TRUTH, 0.3), dim=5120)
    assert found is not None and not found.is_enough
    assert "K = 5,120 leaves the border open; with --dim 20480" in found.verdict()
    unknown = border(select(TRUTH), TRUTH, np.full_like(TRUTH, 0.3))
    assert unknown is not None and unknown.verdict().startswith(
        "K leaves the border open; with four times as large a K"
    )
    hopeless = Border(selected=100, certain=0, may_enter=100, certain_at_4_dim=0, dim=64)
    assert (
        hopeless.verdict()
        == "K = 64 leaves the border open, and so would --dim 256: the scores lie too close together."
    )
    little = border(select(TRUTH), TRUTH, np.full_like(TRUTH, 1e-3))
    assert little is not None and little.is_enough and "of the selection is certain" in little.verdict()


def test_failed_rows_do_not_count() -> None:
    scores = np.concatenate([TRUTH, np.full((50, 6), np.nan, np.float32)])
    errors = np.where(np.isnan(scores), np.nan, 0).astype(np.float32)
    found = border(select(scores, num_rows=400), scores, errors)
    assert found is not None and found.certain == 400 and found.may_enter == 0


def test_methods_and_selections_without_one_border_have_none() -> None:
    errors = np.ones_like(TRUTH)
    assert border(select(TRUTH, method="random"), TRUTH, errors) is None
    assert border(select(TRUTH, method="round_robin"), TRUTH, errors) is None
    sources = {"source_quotas": {"a": 0.5}, "sources": Sources(np.zeros(2000, np.int64), ["a"])}
    assert border(select(TRUTH, budget=sources), TRUTH, errors) is None
    assert border(select(TRUTH, num_rows=0), TRUTH, errors) is None
