"""Scores without the leading axes of the validation rows agree with numpy's SVD on the whole matrix."""

import numpy as np
import pytest
import torch

from icons.scores import influence
from icons.scores.axes import leading_axes, without

RNG = np.random.default_rng(5)
K = 24
TRAIN = RNG.normal(size=(40, K)).astype(np.float32)
OPPOSITE = RNG.normal(size=K)
TASKS = {
    name: (RNG.normal(size=(rows, K)) + 4 * RNG.choice([-1, 1], size=(rows, 1)) * OPPOSITE).astype(np.float32)
    for name, rows in (("gqa", 9), ("pope", 30))
}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows.astype(float) / np.linalg.norm(rows.astype(float), axis=1, keepdims=True)


def axes_of(tasks: dict[str, np.ndarray], count: int) -> np.ndarray:
    centred = [(unit(rows) - unit(rows).mean(axis=0)) / np.sqrt(len(rows)) for rows in tasks.values()]
    return np.linalg.svd(np.concatenate(centred))[2][:count]


@pytest.mark.parametrize("count", [1, 3])
def test_axes_span_what_the_svd_of_all_rows_spans(count: int) -> None:
    found = leading_axes([torch.from_numpy(unit(rows)).float() for rows in TASKS.values()], count).numpy()
    expected = axes_of(TASKS, count)
    assert found @ found.T == pytest.approx(np.eye(count), abs=1e-5)
    assert found.T @ found == pytest.approx(expected.T @ expected, abs=1e-4)


def test_scores_are_products_with_what_is_at_right_angles_to_the_axes() -> None:
    axes = axes_of(TASKS, 2)
    expected = [unit(TRAIN) @ (np.eye(K) - axes.T @ axes) @ unit(rows).mean(axis=0) for rows in TASKS.values()]
    assert influence(TRAIN, TASKS, drop_axes=2).numpy() == pytest.approx(np.stack(expected, axis=1), abs=1e-5)


def test_how_many_rows_ask_for_each_of_two_opposite_answers_no_longer_matters() -> None:
    """Twenty against ten, and ten against twenty: without the axis both give the same order of rows, with it not."""
    rows = unit(RNG.normal(size=(30, K)) * 0.05)
    rows -= np.outer(rows @ OPPOSITE, OPPOSITE) / (OPPOSITE @ OPPOSITE)
    signs = np.repeat([1.0, -1.0], [20, 10])[:, None]
    many, few = ((rows + sign * signs * OPPOSITE).astype(np.float32) for sign in (1, -1))
    dropped = [influence(TRAIN, {"a": task}, drop_axes=1)[:, 0] for task in (many, few)]
    kept = [influence(TRAIN, {"a": task})[:, 0] for task in (many, few)]
    assert np.corrcoef(*dropped)[0, 1] > 0.999
    assert np.corrcoef(*kept)[0, 1] < -0.9


def test_none_dropped_is_the_same_to_the_last_bit_and_the_order_of_rows_and_tasks_is_nothing() -> None:
    assert torch.equal(influence(TRAIN, TASKS, drop_axes=0), influence(TRAIN, TASKS))
    turned = {name: rows[::-1].copy() for name, rows in reversed(TASKS.items())}
    there, back = influence(TRAIN, TASKS, drop_axes=2), influence(TRAIN, turned, drop_axes=2)
    assert back.flip(1).numpy() == pytest.approx(there.numpy(), abs=1e-5)


def test_a_failed_row_stays_nan_alone() -> None:
    rows = torch.tensor([[1.0, 2.0], [float("nan"), 1.0]])
    assert without(rows, torch.tensor([[0.0, 1.0]])).isnan().any(dim=1).tolist() == [False, True]


def test_refuses_more_axes_than_there_are() -> None:
    with pytest.raises(ValueError, match="drop axes: got 2; the tasks' validation rows vary along 1 axes only"):
        influence(TRAIN, {"a": TASKS["gqa"][:2]}, drop_axes=2)
    with pytest.raises(ValueError, match="drop axes: got 1; the tasks' validation rows vary along 0 axes only"):
        influence(TRAIN, {"a": TASKS["gqa"][:1]}, drop_axes=1)
    with pytest.raises(ValueError, match="drop axes: got -1; expected 0 or more"):
        influence(TRAIN, TASKS, drop_axes=-1)
