from pathlib import Path

import numpy as np
import pytest
import torch

from icons import influence
from icons.consensus import Pairs
from icons.consensus.composition import OTHERS, Kind, composition
from icons.consensus.health import Health, Limits
from icons.consensus.random_sets import Compared, effective_rows, random_sets
from icons.scores import Scorer

RNG = np.random.default_rng(12)
TRAIN = RNG.normal(0.3, 1, size=(300, 20)).astype(np.float32)
TASKS = {"a": RNG.normal(0.2, 1, size=(9, 20)).astype(np.float32), "b": RNG.normal(size=(5, 20)).astype(np.float32)}
SCORED = np.ones(300, bool)
SCORED[[3, 7]] = False
WORST = np.argsort(influence(TRAIN, TASKS).numpy().mean(axis=1))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows.astype(float) / np.linalg.norm(rows, axis=1, keepdims=True)


def health(rows: np.ndarray, **given: object) -> Health:
    return Health.of(np.sort(rows), SCORED, Scorer.of(TRAIN, TASKS, pairwise=True), **given)


def test_hurt_shares_equal_sums_over_the_selection_and_random_sets_surround_their_expectation() -> None:
    rows = np.setdiff1d(WORST[:60], [3, 7])
    found = health(rows)
    for task, validation in TASKS.items():
        products = unit(TRAIN) @ unit(validation).T
        assert found.hurt[task].value == np.mean(products[rows].sum(axis=0) < 0)
        draws = [RNG.permutation(np.flatnonzero(SCORED))[: len(rows)] for _ in range(2000)]
        shares = [np.mean(products[draw].sum(axis=0) < 0) for draw in draws]
        assert abs(found.hurt[task].mean - np.mean(shares)) < 0.06
        assert abs(found.hurt[task].low - np.percentile(shares, 2.5)) <= 0.25
    assert found.hurt["a"].value > found.hurt["a"].high


def test_products_that_are_there_already_give_the_same() -> None:
    arrays = {task: unit(TRAIN) @ unit(rows).T for task, rows in TASKS.items()}
    with Pairs.of_arrays(arrays, ["a", "b"], dtype="float32") as pairs:
        assert health(WORST[100:150], pairs=pairs).hurt == health(WORST[100:150]).hurt


def test_effective_rows_are_those_of_the_covariance() -> None:
    rows = unit(RNG.normal(size=(50, 20)))
    gram = rows @ rows.T
    values = np.linalg.eigvalsh(gram)
    assert effective_rows((gram**2), num=50) == pytest.approx(values.sum() ** 2 / (values**2).sum())
    same = np.tile(TRAIN[:1], (300, 1))
    mixed = np.where(np.arange(300)[:, None] < 60, same, TRAIN)
    found = Health.of(np.arange(60), np.ones(300, bool), Scorer.of(mixed, TASKS, pairwise=True)).effective
    assert found is not None and found.value == pytest.approx(1, abs=1e-3) and found.low > 3


def test_random_sets_are_of_scored_rows_and_seeded() -> None:
    one, two = (random_sets(np.array([0, 1, 2]), SCORED, 50, seed=4) for _ in range(2))
    assert (one == two).all() and (one.sum(axis=0) == 3).all() and not one[[3, 7]].any()
    assert np.flatnonzero(one[:, 0]).tolist() == [0, 1, 2] and len(np.unique(one, axis=1).T) > 40


def test_groups_and_checkpoints_and_failed_validation_rows_are_measured() -> None:
    holed = TASKS["a"].copy()
    scorer = Scorer.of(
        [TRAIN, TRAIN], {"a": [holed, holed], "b": [TASKS["b"]] * 2}, groups={"ab": ["a", "b"]}, pairwise=True,
        weights=[1.0, 3.0], reduce="mean",
    )  # fmt: skip
    found = Health.of(WORST[:40], SCORED, scorer, groups={"ab": ["a", "b"]})
    products = unit(TRAIN) @ unit(np.concatenate([*TASKS.values()])).T
    assert found.hurt["ab"].value == np.mean(products[WORST[:40]].sum(axis=0) < 0)


def kinds() -> list[Kind]:
    answers = np.array(["yes"] * 50 + ["no"] * 50 + ["red"] * 100, dtype=object)
    selected = np.zeros(200, bool)
    selected[[*range(30), 50, *range(100, 109)]] = True
    asked = {"t": np.array(["yes", "no"], dtype=object), "u": np.array(["red", "red", "blue", "no"], dtype=object)}
    return composition({"answer": answers}, selected, {task: {"answer": words} for task, words in asked.items()})


def test_composition_counts_shares_and_puts_the_largest_differences_first() -> None:
    found = {kind.value: kind for kind in kinds()}
    assert [kind.value for kind in kinds()] == ["yes", "red", "no"] or kinds()[0].value == "yes"
    assert (found["yes"].selected, found["yes"].pool, found["yes"].tasks) == (0.75, 0.25, 0.25)
    assert (found["no"].selected, found["no"].pool, found["no"].tasks) == (0.025, 0.25, 0.375)
    assert found["red"].tasks == 0.25 and found["blue"].pool == 0 and found["blue"].tasks == 0.125
    draws = [np.mean(np.random.default_rng(seed).permutation(200)[:40] < 50) for seed in range(3000)]
    assert found["yes"].deviation == pytest.approx((0.75 - 0.25) / np.std(draws), rel=0.05)


def test_rare_words_are_counted_together() -> None:
    words = np.array(["yes"] * 100 + [f"word {place}" for place in range(100)], dtype=object)
    found = {kind.value: kind for kind in composition({"answer": words}, np.arange(200) >= 150)}
    assert len(found) == 41 and sum(kind.pool for kind in found.values()) == pytest.approx(1)
    assert found["yes"].pool == 0.5 and found[OTHERS].pool == pytest.approx(61 / 200)
    assert sum(kind.selected for kind in found.values()) == pytest.approx(1)


def test_marks_of_failure_are_warned_of_and_measures_are_numbers() -> None:
    found = Health(
        40,
        {"qa": Compared(0.6, 0.3, 0.2, 0.4), "ok": Compared(0.3, 0.3, 0.2, 0.4)},
        Compared(3.0, 10.0, 9.0, 11.0),
        kinds(),
    )
    said = found.warnings(Limits(scarce=0.4))
    assert len(found.warnings()) == 3, "scarce answers are left out by default"
    assert said[0] == "the selection hurts 60 % of the validation rows of qa; random sets hurt 30 % (20 to 40 %)"
    assert said[1].startswith("the selection is redundant: 1,000 of its rows are worth 3, of random rows 10")
    assert "the selection is full of one answer: “yes” has 75 % of the selection, 25 % of the pool, 25 %" in said[2]
    assert said[3].startswith("the selection has lost an answer that tasks ask for: “no” has 2 % of the selection")
    assert len(said) == 4
    measured = found.measures()
    assert measured["hurt_excess_worst_up"] == pytest.approx(0.3) and measured["hurt_mean_up"] == pytest.approx(0.45)
    assert measured["effective_rows_ratio_down"] == 0.3 and measured["scarcest_answer_ratio_down"] == pytest.approx(0.1)
    assert measured["answer_excess_up"] == 0.5 and measured["answer_gap_up"] > 0
    lenient = Limits(hurt=1.0, effective=0.0, answers=0.0, scarce=0.0, frequent=1.0)
    assert found.warnings(lenient) == []
    few = Limits(hurt=1.0, effective=0.0, answers=0.9, scarce=0.0, frequent=1.0)
    assert found.warnings(few)[0].startswith("the selection has few different answers:")


def test_it_goes_through_json_and_says_nothing_of_what_it_does_not_know(tmp_path: Path) -> None:
    import json

    found = health(WORST[:50], kinds=kinds(), notes=["no file"])
    assert Health.from_plain(json.loads(json.dumps(found.plain()))) == found
    empty = Health.of(np.array([], np.int64), SCORED, None)
    assert empty.measures() == {} and empty.warnings() == [] and Health.from_plain(empty.plain()) == empty
    assert torch.is_grad_enabled()  # nothing global was touched
