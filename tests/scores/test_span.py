"""Scores within the spans of the tasks' validation gradients."""

import numpy as np
import pytest
import torch

from icons import influence
from icons.consensus import Pairs
from icons.consensus.border import border
from icons.consensus.health import Health
from icons.consensus.votes import select
from icons.scores import Scorer
from icons.scores.span import span_of

RNG = np.random.default_rng(21)
COMMON = RNG.normal(size=(2, 24))
TRAIN = (RNG.normal(size=(40, 24)) + RNG.normal(size=(40, 2)) @ COMMON).astype(np.float32)
TASKS = {
    "a": (0.5 * RNG.normal(size=(7, 24)) + RNG.normal(size=(7, 2)) @ COMMON).astype(np.float32),
    "b": RNG.normal(size=(4, 24)).astype(np.float32),
}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows.astype(float), axis=-1, keepdims=True)


def slow_pairs(task: str, share: float) -> np.ndarray:
    """By numpy's SVD, and one pair at a time."""
    rows = unit(TASKS[task])
    _, values, directions = np.linalg.svd(rows, full_matrices=False)
    count = next(n for n in range(1, len(values) + 1) if (values[:n] ** 2).sum() >= share * (values**2).sum() - 1e-9)
    basis = directions[:count]
    return np.array([[unit(basis @ x) @ unit(basis @ v) for v in rows] for x in TRAIN.astype(float)])


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
def test_scores_are_mean_cosines_within_each_tasks_own_span(share: float) -> None:
    found = influence(TRAIN, TASKS, subspace=share).numpy()
    for place, task in enumerate(TASKS):
        assert np.allclose(found[:, place], slow_pairs(task, share).mean(axis=1), atol=1e-5)
    scorer = Scorer.of(TRAIN, TASKS, subspace=share, pairwise=True)
    with Pairs.of_gradients(scorer) as pairs:
        whole = np.concatenate([slow_pairs(task, share) for task in TASKS], axis=1)
        assert np.allclose(pairs.rows(range(40)), whole, atol=1e-3)
        rows = np.arange(10)
        hurt = Health.of(rows, np.ones(40, bool), scorer).hurt
        assert hurt["a"].value == np.mean(whole[rows, :7].sum(axis=0) < 0)


def test_a_span_has_the_fewest_directions_that_hold_the_share() -> None:
    rows = torch.tensor([[3.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.0]])
    assert [len(span_of(rows, share).basis) for share in (0.5, 0.87, 0.88, 0.98, 1.0)] == [1, 1, 2, 3, 3]
    failed = torch.cat([rows, torch.full((1, 4), torch.nan)])
    span = span_of(failed, 1.0)
    assert span.rows[3].isnan().all() and torch.allclose(span.mean, span_of(rows, 1.0).mean, atol=1e-6)


def test_checkpoints_and_groups_and_failed_rows_go_together() -> None:
    tasks = {name: [rows, rows] for name, rows in TASKS.items()}
    found = influence([TRAIN, TRAIN], tasks, subspace=0.9, weights=[1.0, 2.0], groups={"ab": ["a", "b"]}).numpy()
    both = influence(TRAIN, TASKS, subspace=0.9).numpy()
    assert np.allclose(found[:, 0], 3 * both.max(axis=1), atol=1e-5)


def test_standard_errors_are_not_known_and_no_row_counts_as_certain() -> None:
    scorer = Scorer.of(TRAIN, TASKS, subspace=0.9)
    (part,) = scorer.score(range(40))
    assert part.stderr.isnan().all() and part.influence.isfinite().all()
    assert border(select(part.influence), part.influence.numpy(), part.stderr.numpy()) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subspace": 0.0}, "subspace: got 0.0; expected a share"),
        ({"subspace": 1.5}, "subspace: got 1.5"),
        ({"subspace": 0.9, "normalize": "none"}, "subspace: got normalize='none'"),
        (
            {"subspace": 0.9, "groups": {"ab": ["a", "b"]}, "reduce": "mean"},
            "subspace: got groups reduced to their mean",
        ),
    ],
)
def test_what_a_subspace_cannot_do_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        influence(TRAIN, TASKS, **settings)
    with pytest.raises(ValueError, match="validation gradients are all zeros"):
        influence(TRAIN, {"a": np.zeros((3, 24), np.float32)}, subspace=0.9)
