"""The demo's findings: shares counted from provenance, votes from thresholds, the paper's Rel. (%)."""

import io

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from icons.demo.comparison_tables import comparison_table, outcome, shares_table, spread, votes_table

RECORDS = [{"provenance": name} for name in ("good", "good", "wrong", "good")]
RUNS = {
    "selected": [{"a": 0.9, "b": 0.4}],
    "random": [{"a": 0.5, "b": 0.4}, {"a": 0.7, "b": 0.2}],
    "full": [{"a": 1.0, "b": 0.8}],
}


def found() -> dict:
    return outcome(RECORDS, np.array([0, 2]), np.array([2, 0, 1, 1]), RUNS, "a note")


def text(table: Table) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_outcome_counts_each_provenance_in_pool_and_selection() -> None:
    assert found()["shares"] == [
        {"name": "good", "pool": 0.75, "selection": 0.5},
        {"name": "wrong", "pool": 0.25, "selection": 0.5},
    ]


def test_outcome_names_the_rows_that_each_method_was_trained_on() -> None:
    methods = {method["name"]: method for method in found()["methods"]}
    assert {name: method["rows"] for name, method in methods.items()} == {"selected": 2, "random": 2, "full": 4}
    assert [run["seed"] for run in methods["random"]["runs"]] == [0, 1]
    assert [name for name, method in methods.items() if method["strong"]] == ["selected"]


def test_comparison_table_has_accuracies_and_rel_to_full() -> None:
    shown = text(comparison_table(found()))
    by_method = {line.split()[0]: line for line in shown.splitlines() if line.split()}
    assert "70.0" in by_method["selected"]  # (0.9 / 1 + 0.4 / 0.8) / 2
    assert "60.0 ±14.1" in by_method["random"] and "30.0 ±14.1" in by_method["random"]
    assert "100.0" in by_method["full"]
    assert "a note" in shown


def test_votes_are_a_histogram_over_all_rows_of_the_pool() -> None:
    assert found()["votes"] == [1, 2, 1]
    assert [line.count("█") for line in text(votes_table(found(), width=10)).splitlines() if "█" in line] == [5, 10, 5]


def test_shares_table_has_the_largest_share_of_the_pool_first() -> None:
    lines = [line for line in text(shares_table(found())).splitlines() if "%" in line]
    assert [line.split()[0] for line in lines] == ["good", "wrong"]


@pytest.mark.parametrize(("values", "shown"), [([50.0], "50.0"), ([50.0, 60.0], "55.0 ±7.1")])
def test_a_spread_is_shown_only_for_several_runs(values: list[float], shown: str) -> None:
    assert spread(values) == shown
