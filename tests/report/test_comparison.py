"""Results and validation read from JSON files: numbers as the paper has them, errors that name file and culprit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icons.report import comparison
from icons.report.accuracies import relative_performance


@pytest.fixture
def content() -> dict[str, Any]:
    return {
        "tasks": ["shape", "colour"],
        "reference": "full",
        "methods": [
            {"name": "full", "rows": 4000, "runs": [{"seed": 0, "accuracy": {"shape": 0.8, "colour": 0.5}}]},
            {
                "name": "vote",
                "rows": 800,
                "strong": True,
                "runs": [
                    {"seed": 0, "accuracy": {"shape": 0.8, "colour": 0.4}},
                    {"seed": 1, "accuracy": {"shape": 0.6, "colour": 0.5}},
                ],
            },
        ],
        "shares": [
            {"name": "shape", "pool": 0.4, "selection": 0.6},
            {"name": "colour", "pool": 0.15, "selection": 0.15},
            {"name": "text only", "pool": 0.2, "selection": 0.03},
            {"name": "wrong answers", "pool": 0.25, "selection": 0.112},
        ],
    }


def test_results_are_relative_to_the_reference(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    section, facts = comparison.results(path)
    (table,) = section.tables
    assert list(table.columns) == ["method", "rows", "shape", "colour", "Rel. (%)"]
    assert [cell.value for cell in table.rows[0]] == ["full", "4,000", "80.0", "50.0", "100.0"]
    relative = [100 * (1 + 0.8) / 2, 100 * (0.75 + 1) / 2]
    assert table.rows[1][-1].value == f"{np.mean(relative):.1f}"
    assert table.rows[1][-1].note == f"± {np.std(relative, ddof=1):.1f}"
    assert table.strong == [1]
    assert [(fact.label, fact.value) for fact in facts] == [("text only", "20 → 3 %"), ("wrong answers", "25 → 11 %")]


def test_a_task_that_the_reference_never_solves_is_left_out_of_rel() -> None:
    relative = relative_performance
    assert relative({"a": 0.4, "b": 0.9}, {"a": 0.5, "b": 0.0}, ["a", "b"]) == 80
    assert np.isnan(relative({"a": 1.0}, {"a": 0.0}, ["a"]))


def test_results_that_do_not_fit_are_refused(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(FileNotFoundError, match=r"results.json: no such file"):
        comparison.results(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"results.json: not valid JSON"):
        comparison.results(path)
    path.write_text('{"tasks": []}')
    with pytest.raises(ValueError, match="expected an object with tasks, methods, reference; methods, reference miss"):
        comparison.results(path)
    path.write_text(json.dumps(content | {"reference": "half"}))
    with pytest.raises(ValueError, match="the reference 'half' is none of full, vote"):
        comparison.results(path)
    del content["methods"][1]["runs"][1]["accuracy"]["shape"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="method 'vote' has 2 runs; no accuracy for: shape"):
        comparison.results(path)


def test_validation_shows_estimates_with_their_intervals(tmp_path: Path) -> None:
    path = tmp_path / "validation.json"
    rows = [["exact", [0.41, 0.33, 0.48], 0.912345], ["random", [0.01, -0.1, 0.12], "none"]]
    path.write_text(json.dumps({"columns": ["method", "LDS", "area"], "rows": rows}))
    section = comparison.validation(path)
    assert [[(cell.value, cell.note) for cell in row] for row in section.tables[0].rows] == [
        [("exact", ""), ("0.41", "0.33 to 0.48"), ("0.912", "")],
        [("random", ""), ("0.01", "-0.10 to 0.12"), ("none", "")],
    ]
    assert section.pictures[0].alt == "LDS, with its interval."
    path.write_text(json.dumps({"columns": ["method"], "rows": rows}))
    with pytest.raises(ValueError, match="a row of 3 cells; expected 1"):
        comparison.validation(path)
    parts = {"columns": ["trained", "a"], "rows": [["without the top", [0.02, 0.01, 0.03]]], "note": "three seeds"}
    content = {"columns": ["method", "LDS", "area"], "rows": rows, "counterfactual": parts}
    path.write_text(json.dumps(content))
    second = comparison.validation(path).tables[1]
    assert (second.rows[0][1].value, second.rows[0][1].note) == ("0.020", "0.010 to 0.030")
    assert (second.columns, second.caption) == (["trained", "a"], "three seeds")
