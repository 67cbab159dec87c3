import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from icons.consensus import METHODS, Selection, select
from icons.consensus.budget import Sources
from icons.consensus.rules import RULES, voted

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(200, 5)).astype(np.float32)
EXTRA = {
    "direct_merge": {"num_validation": [3, 1, 4, 1, 5]},
    "loss": {"values": RNG.random(200)},
    "grad_norm": {"values": RNG.random(200)},
}
PAIRS = {str(task): RNG.uniform(-1, 1, size=(200, 3 + task)) for task in range(5)}
TRAIN, TASKS = RNG.normal(size=(200, 6)), {str(task): RNG.normal(size=(2, 6)) for task in range(5)}
EXTRA |= {name: {"pairs": PAIRS} for name, rule in RULES.items() if rule.reads_pairs}
for of_gradients in (name for name, rule in RULES.items() if rule.reads_gradients):
    EXTRA[of_gradients] = EXTRA.get(of_gradients, {}) | {"train": TRAIN, "tasks": TASKS}
EXTRA["stratified"] = {"budget": {"sources": Sources(np.arange(200) % 3, ["a", "b", "c"])}}
DRAWN = ("random", "filtered_random")


def original_votes(scores: np.ndarray, top_percent: float) -> np.ndarray:
    """As the released code counts them, one task at a time."""
    masks = [column >= np.percentile(column, 100 - top_percent) for column in scores.T]
    return np.sum(np.column_stack(masks), axis=1)


matrices = st.tuples(st.integers(1, 60), st.integers(1, 6)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.sampled_from([0.0, 0.1, 0.5]) | st.floats(-1, 1, width=32))
)


@given(scores=matrices, percent=st.sampled_from([1, 5, 7, 10, 20, 29, 33.3, 50, 80, 100]))
def test_votes_are_the_originals(scores: np.ndarray, percent: float) -> None:
    chosen = select(scores, fraction=percent / 100)
    assert (chosen.votes == original_votes(scores, percent)).all()
    assert len(chosen.rows) == int((percent / 100) * len(scores))


@given(scores=matrices, fraction=st.sampled_from([0.1, 0.2, 0.5]))
def test_no_row_left_out_has_more_votes_than_one_selected(scores: np.ndarray, fraction: float) -> None:
    chosen = select(scores, fraction)
    left = np.setdiff1d(np.arange(len(scores)), chosen.rows)
    if len(left) and len(chosen.rows):
        assert chosen.votes[left].max() <= chosen.votes[chosen.rows].min()


def test_votes_break_ties_by_mean_percentile_rank_then_by_row() -> None:
    scores = np.array([[9, 1], [1, 9], [8, 2], [3, 8], [2, 3], [2, 3]], np.float32)
    chosen = select(scores, fraction=0.34, num_rows=None)
    rank = (
        np.array(
            [
                sum((column < v).sum() + ((column == v).sum()) / 2 for column, v in zip(scores.T, row, strict=True))
                for row in scores
            ]
        )
        / 12
    )
    assert np.allclose(chosen.percentile_rank, rank)
    assert chosen.votes.tolist() == [1, 1, 1, 1, 0, 0]
    expected = sorted(range(6), key=lambda row: (-chosen.votes[row], -rank[row], row))[:2]
    assert chosen.rows.tolist() == sorted(expected)
    equal = select(np.ones((5, 3), np.float32), num_rows=2)
    assert equal.rows.tolist() == [0, 1]


@pytest.mark.parametrize("method", METHODS)
def test_failed_rows_change_nothing_and_are_never_selected(method: str) -> None:
    extra = dict(EXTRA.get(method, {}))
    whole = np.concatenate([SCORES, np.full((50, 5), np.nan, np.float32)])
    if "values" in extra:
        extra["values"] = np.concatenate([extra["values"], np.full(50, 1e9)])
    if "pairs" in extra:
        extra["pairs"] = {task: np.concatenate([part, np.full_like(part[:50], np.nan)]) for task, part in PAIRS.items()}
    if "train" in extra:
        extra["train"] = np.concatenate([TRAIN, TRAIN[:50]])
    if "budget" in extra:
        extra["budget"] = {"sources": Sources(np.append(np.arange(200) % 3, [0] * 50), ["a", "b", "c"])}
    plain = select(SCORES, method=method, num_rows=40, vote_fraction=0.2, **EXTRA.get(method, {}))
    padded = select(whole, method=method, num_rows=40, vote_fraction=0.2, **extra)
    assert padded.rows.max() < 200
    assert (padded.votes[200:] == 0).all() and np.isnan(padded.score[200:]).all()
    assert (padded.votes[:200] == plain.votes).all()
    if method != "random":  # a permutation of other rows
        assert (padded.rows == plain.rows).all()
    everything = select(whole, fraction=1.0, method=method, **extra)
    assert everything.rows.tolist() == list(range(200))


@pytest.mark.parametrize("method", METHODS)
def test_a_permutation_of_the_rows_permutes_the_selection(method: str) -> None:
    order = np.random.default_rng(1).permutation(200)
    extra = dict(EXTRA.get(method, {}))
    if method in DRAWN:
        return
    plain = select(SCORES, method=method, **extra)
    if "values" in extra:
        extra["values"] = extra["values"][order]
    if "pairs" in extra:
        extra["pairs"] = {task: part[order] for task, part in PAIRS.items()}
    if "train" in extra:
        extra["train"] = TRAIN[order]
    if "budget" in extra:
        extra["budget"] = {"sources": Sources(np.arange(200)[order] % 3, ["a", "b", "c"])}
    moved = select(SCORES[order], method=method, **extra)
    assert sorted(order[moved.rows].tolist()) == plain.rows.tolist()


def slow_order(method: str, scores: np.ndarray) -> list[int]:
    """Every aggregation once more, as a loop over rows."""
    num_rows, num_tasks = scores.shape
    ranks = [[sum(other < v for other in column) for v in column] for column in scores.T]
    if method == "round_robin":
        taken: list[int] = []
        while len(taken) < num_rows:
            for task in range(num_tasks):
                free = [row for row in range(num_rows) if row not in taken]
                if free:
                    taken.append(max(free, key=lambda row: (scores[row, task], -row)))
        return taken
    value = {
        "mean": lambda row: float(np.mean(scores[row].astype(float))),
        "max": lambda row: float(scores[row].max()),
        "rank": lambda row: sum(ranks[task][row] for task in range(num_tasks)),
        "norm": lambda row: sum(
            (float(scores[row, t]) - scores[:, t].astype(float).mean()) / scores[:, t].astype(float).std()
            for t in range(num_tasks)
        ),
        "borda": lambda row: sum(
            max(0, ranks[t][row] - sum(scores[:, t] < np.percentile(scores[:, t], 80)) + 1) for t in range(num_tasks)
        ),
        "direct_merge": lambda row: float(np.average(scores[row].astype(float), weights=[3, 1, 4, 1, 5])),
    }[method]
    tie = [sum(ranks[task][row] for task in range(num_tasks)) for row in range(num_rows)]
    return sorted(range(num_rows), key=lambda row: (-value(row), -tie[row], row))


@pytest.mark.parametrize("method", ["mean", "max", "rank", "norm", "borda", "round_robin", "direct_merge"])
def test_aggregations_equal_a_loop_over_rows(method: str) -> None:
    chosen = select(SCORES, method=method, fraction=0.2, **EXTRA.get(method, {}))
    assert chosen.rows.tolist() == sorted(slow_order(method, SCORES)[:40])


def test_baselines_take_the_highest_and_random_is_seeded() -> None:
    values = EXTRA["loss"]["values"]
    assert select(SCORES, method="loss", values=values).rows.tolist() == sorted(np.argsort(-values)[:40].tolist())
    assert select(SCORES, method="grad_norm", values=values).rows.tolist() == sorted(np.argsort(-values)[:40].tolist())
    one, two, other = (select(SCORES, method="random", seed=seed).rows.tolist() for seed in (3, 3, 4))
    assert one == two != other


def test_weights_count_votes_and_zero_silences_a_task() -> None:
    weighted = select(SCORES, weights={"0": 2.0, "1": 0.0})
    masks = np.column_stack([column >= np.percentile(column, 80) for column in SCORES.T])
    assert np.allclose(weighted.score, masks @ [2, 0, 1, 1, 1])
    assert (weighted.votes == masks.sum(axis=1)).all()
    only = select(SCORES, weights=[0.0, 0.0, 1.0, 0.0, 0.0])
    assert only.rows.tolist() == sorted(np.argsort(-SCORES[:, 2])[:40].tolist())


def test_a_tensor_and_a_store_give_what_an_array_gives() -> None:
    class Store:
        def __init__(self) -> None:
            self.influence, self.tasks = SCORES, list("abcde")
            self.manifest = {"num_validation": [3, 1, 4, 1, 5]}
            self.arrays = {"loss": EXTRA["loss"]["values"]}

    rows = select(SCORES).rows.tolist()
    assert select(torch.from_numpy(SCORES)).rows.tolist() == rows == select(Store()).rows.tolist()
    assert select(Store()).tasks == list("abcde")
    assert len(select(torch.from_numpy(SCORES).bfloat16()).rows) == 40
    assert select(Store(), method="loss").rows.tolist() == select(SCORES, method="loss", **EXTRA["loss"]).rows.tolist()
    merged = select(SCORES, method="direct_merge", **EXTRA["direct_merge"])
    assert select(Store(), method="direct_merge").rows.tolist() == merged.rows.tolist()


def test_source_weights_raise_the_votes_of_a_source() -> None:
    sources = Sources(np.arange(200) % 2, ["even", "odd"])
    chosen = select(SCORES, source_weights={"odd": 100.0}, budget={"sources": sources})
    assert (chosen.rows % 2 == 1).all()


CASES = [
    ({"method": "best"}, "method 'best': expected one of vote"),
    ({"fraction": 1.5}, "fraction: got 1.5"),
    ({"vote_fraction": -0.1}, "vote fraction: got -0.1"),
    ({"weights": {"9": 1.0}}, "weights: no task '9'"),
    ({"weights": [1.0]}, "expected 5 numbers >= 0"),
    ({"weights": [0.0] * 5}, "expected 5 numbers >= 0"),
    ({"method": "direct_merge"}, "direct_merge: got num_validation=None"),
    ({"method": "loss"}, "loss: got no loss per row"),
    ({"source_weights": {"coco": 2.0}}, "source weights: got no sources"),
    ({"budget": {"task_quotas": {"9": 0.5}}}, "quota: no task '9'"),
]


@pytest.mark.parametrize(("arguments", "message"), CASES)
def test_errors_say_what_is_wrong(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("[", r"\[")):
        select(SCORES, **arguments)


def test_source_weights_are_refused_where_they_would_turn_scores_about() -> None:
    sources = {"sources": Sources(np.zeros(200, np.int64), ["all"])}
    with pytest.raises(ValueError, match="negative scores"):
        select(SCORES, method="mean", source_weights={"all": 2.0}, budget=sources)
    with pytest.raises(ValueError, match="weight of source all: got -1"):
        select(SCORES, source_weights={"all": -1.0}, budget=sources)


def test_scores_without_a_task_or_a_scored_row_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one task"):
        select(np.empty((3, 0), np.float32))
    with pytest.raises(ValueError, match="none of the 3 rows"):
        select(np.full((3, 2), np.nan, np.float32))
    with pytest.raises((ValueError, TypeError)):
        select(np.ones(3, np.float32))


def test_a_selection_remembers_what_it_was_asked() -> None:
    chosen = select(SCORES, num_rows=10, seed=7)
    assert isinstance(chosen, Selection) and chosen.method == "vote"
    assert chosen.settings["num_rows"] == 10 and chosen.settings["vote_fraction"] == 0.05
    assert chosen.thresholds.tolist() == [np.percentile(column, 95) for column in SCORES.T]


def test_votes_for_given_thresholds_are_those_of_a_loop() -> None:
    scores = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32)
    scores[4, 1] = np.nan  # no score for one task: no vote for any
    thresholds = np.array([0.1, 0.2, scores[7, 2].item()])  # a row at the threshold votes
    expected = [sum(bool(value >= limit) for value, limit in zip(row, thresholds, strict=True)) for row in scores]
    expected[4] = 0
    assert voted(scores, thresholds).sum(axis=1).tolist() == expected
