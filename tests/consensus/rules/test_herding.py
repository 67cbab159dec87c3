import numpy as np
import pytest

from icons import influence
from icons.consensus import select

RNG = np.random.default_rng(4)
TRAIN = RNG.normal(size=(80, 12)).astype(np.float32)
TASKS = {"a": RNG.normal(size=(3, 12)).astype(np.float32), "b": RNG.normal(size=(9, 12)).astype(np.float32)}
SCORES = influence(TRAIN, TASKS).numpy()


def unit(rows: np.ndarray) -> np.ndarray:
    return rows.astype(float) / np.linalg.norm(rows, axis=1, keepdims=True)


def slow_herding(train: np.ndarray, num: int, weights: list[float]) -> list[int]:
    means = [weight * unit(rows).mean(axis=0) for weight, rows in zip(weights, TASKS.values(), strict=True)]
    target, total, taken = sum(means) / sum(weights), np.zeros(12), []
    while len(taken) < num:
        factor = max(0, target @ total / (total @ total)) if taken else 0
        gain = unit(train) @ (target - factor * total)
        taken.append(max((row for row in range(len(train)) if row not in taken), key=lambda row: gain[row]))
        total = total + unit(train)[taken[-1]]
    return taken


class Named:
    """Scores whose tasks have the gradients' names."""

    influence, tasks = SCORES, ["a", "b"]


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.0, 1.0]])
def test_choice_equals_a_loop_over_all_rows(weights: list[float]) -> None:
    chosen = select(Named(), num_rows=20, method="herding", train=TRAIN, tasks=TASKS, weights=weights)
    assert np.argsort(-chosen.score, kind="stable")[:20].tolist() == slow_herding(TRAIN, 20, weights)


def test_pools_smaller_than_the_data_still_find_rows_whose_sum_points_to_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = select(Named(), num_rows=20, method="herding", train=TRAIN, tasks=TASKS).rows
    monkeypatch.setattr("icons.consensus.rules.herding.POOL_ROWS", 12)
    monkeypatch.setattr("icons.consensus.rules.herding.SMALLEST_POOL", 12)
    chosen = select(Named(), num_rows=20, method="herding", train=TRAIN, tasks=TASKS, options={"rounds": 10}).rows
    target = np.mean([unit(rows).mean(axis=0) for rows in TASKS.values()], axis=0)

    def cosine(rows: np.ndarray) -> float:
        total = unit(TRAIN)[rows].sum(axis=0)
        return float(total @ target / np.linalg.norm(total) / np.linalg.norm(target))

    assert len(chosen) == 20 and cosine(chosen) > 0.9 * cosine(exact)


def test_a_near_duplicate_gives_way_and_level_rows_go_by_row() -> None:
    train = np.array([[1.0, 0.2], [1.0, 0.2], [0.2, 1.0], [-1, -1]], np.float32)
    task = {"a": np.array([[1.0, 0.9]], np.float32)}

    class Scores:
        influence, tasks = np.zeros((4, 1), np.float32), ["a"]

    assert select(Scores(), 0.5, "herding", train=train, tasks=task).rows.tolist() == [0, 2]


def test_two_checkpoints_count_as_the_sum_of_their_products() -> None:
    other = RNG.normal(size=TRAIN.shape).astype(np.float32)
    tasks = {name: [rows, rows] for name, rows in TASKS.items()}
    chosen = select(Named(), num_rows=10, method="herding", train=[TRAIN, other], tasks=tasks)
    means = np.mean([unit(rows).mean(axis=0) for rows in TASKS.values()], axis=0)
    wide = np.concatenate([unit(TRAIN), unit(other)], axis=1) / np.sqrt(2)
    target, total, taken = np.concatenate([means, means]) / np.sqrt(2), np.zeros(24), []
    while len(taken) < 10:
        gain = wide @ (target - (max(0, target @ total / (total @ total)) if taken else 0) * total)
        taken.append(max((row for row in range(80) if row not in taken), key=lambda row: gain[row]))
        total = total + wide[taken[-1]]
    assert np.argsort(-chosen.score, kind="stable")[:10].tolist() == taken


def test_what_is_missing_or_impossible_is_said() -> None:
    with pytest.raises(ValueError, match="herding: got rounds=0"):
        select(Named(), method="herding", train=TRAIN, tasks=TASKS, options={"rounds": 0})
    with pytest.raises(ValueError, match=r"herding: got scores without gradients; .*train and tasks"):
        select(SCORES, method="herding")
    with pytest.raises(ValueError, match="gradients: got 9 rows and the tasks a, b; expected 80 and a, b"):
        select(Named(), method="herding", train=TRAIN[:9], tasks=TASKS)
