"""The bake-off's tables hold the paired differences to both references, corrected together."""

import json

import numpy as np
import pytest
from scipy import stats

from icons.report.comparison import validation
from icons.validation.bakeoff import tables

TASKS = ["a", "b"]


def measured(pools: int, seeds: int, shares: tuple[float, ...] = (0.2,)) -> dict[tuple[str, float], np.ndarray]:
    draw = np.random.default_rng(pools + seeds)
    levels = {"random": 0.7, "vote": 0.72, "good": 0.9}
    return {
        (rule, share): level + 0.01 * draw.standard_normal((pools, seeds, 2))
        for share in shares
        for rule, level in levels.items()
    }


def test_differences_are_those_of_scipys_paired_test_with_pools_as_pairs() -> None:
    found = measured(pools=5, seeds=2)
    content = tables(found, TASKS, "accuracy")
    assert content["columns"] == ["rule", "minus random", "minus vote", "significant against"]
    by_pool = {rule: 100 * values.mean(axis=(1, 2)) for (rule, _), values in found.items()}
    expected = stats.ttest_rel(by_pool["good"], by_pool["vote"])
    interval = expected.confidence_interval(0.95)
    vote, good = content["rows"]
    assert (vote[0], vote[2], good[0]) == ("vote", "itself", "good")
    assert good[2] == pytest.approx([np.mean(by_pool["good"] - by_pool["vote"]), *interval], abs=6e-4)
    assert good[3] == "random, vote"
    assert "3 comparisons" in content["text"]
    assert "over 5 pools" in content["text"]
    reached = content["tables"][0]
    assert reached["columns"] == ["accuracy (%) after training", "a", "b", "mean", "worst pool"]
    assert reached["rows"][2][-2:] == pytest.approx([by_pool["good"].mean(), by_pool["good"].min()], abs=6e-4)


def test_every_share_has_its_own_references() -> None:
    found = measured(pools=1, seeds=4, shares=(0.05, 0.2))
    content = tables(found, TASKS, "loss")
    assert [row[0] for row in content["rows"]] == ["vote, 5 %", "good, 5 %", "vote, 20 %", "good, 20 %"]
    by_seed = {entry: values[0].mean(axis=1) for entry, values in found.items()}
    assert content["rows"][1][1][0] == pytest.approx(np.mean(by_seed["good", 0.05] - by_seed["random", 0.05]), abs=6e-4)
    assert content["tables"][0]["columns"] == ["loss after training", "a", "b", "mean"]
    assert "below zero is better" in content["text"]


def test_a_single_pair_is_said_to_tell_nothing_of_chance(tmp_path_factory: pytest.TempPathFactory) -> None:
    content = tables(measured(pools=1, seeds=1), TASKS, "accuracy")
    assert isinstance(content["rows"][1][1], float)
    assert content["rows"][1][3] == "none"
    assert "One pair of trainings tells nothing of chance: give more --seeds, or --pool." in content["text"]


def test_the_report_shows_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("report") / "bakeoff.json"
    file.write_text(json.dumps(tables(measured(pools=3, seeds=1), TASKS, "accuracy")))
    section = validation(file)
    assert section.title == "Which rule selects best?"
    assert len(section.tables) == 2
    assert section.pictures[0].caption == "minus random, with its interval."
