"""Accuracies after fine-tuning: what the page's and the terminal's comparison of methods both show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from icons.terminal import counted


@dataclass(frozen=True)
class MethodResult:
    """What one method reached, in percent.

    Attributes:
        name: of the method.
        rows: that were trained on; None: not said.
        strong: whether it stands out.
        accuracy: task -> one number for each run.
        relative: Rel. (%), one number for each run.
    """

    name: str
    rows: int | None
    strong: bool
    accuracy: dict[str, list[float]]
    relative: list[float]


def method_results(content: Mapping[str, Any], where: object) -> list[MethodResult]:
    """The methods of a comparison (`icons.report.comparison` says how it is written), in their order.

    Raises:
        ValueError: a method lacks a task, or the reference is not among the methods.
    """
    tasks, methods = list(content["tasks"]), list(content["methods"])
    runs_of = {method["name"]: [run["accuracy"] for run in method["runs"]] for method in methods}
    for name, runs in runs_of.items():
        lost = sorted({task for task in tasks for run in runs if task not in run})
        if lost or not runs:
            raise ValueError(
                f"{where}: method {name!r} has {counted(len(runs), 'run')}; no accuracy for: {', '.join(lost) or 'any'}"
            )
    if content["reference"] not in runs_of:
        raise ValueError(f"{where}: the reference {content['reference']!r} is none of {', '.join(runs_of)}")
    whole = {task: float(np.mean([run[task] for run in runs_of[content["reference"]]])) for task in tasks}
    return [
        MethodResult(
            name=method["name"],
            rows=method.get("rows"),
            strong=bool(method.get("strong")),
            accuracy={task: [100 * run[task] for run in runs_of[method["name"]]] for task in tasks},
            relative=[relative_performance(run, whole, tasks) for run in runs_of[method["name"]]],
        )
        for method in methods
    ]


def relative_performance(accuracy: Mapping[str, float], reference: Mapping[str, float], tasks: Sequence[str]) -> float:
    """Mean over tasks of accuracy divided by the reference's, in percent: the paper's Rel. (%).

    A task where the reference has 0 is left out; NaN when none is left.

    >>> relative_performance({"a": 0.4, "b": 0.9}, {"a": 0.5, "b": 0.9}, ["a", "b"])
    90.0
    """
    ratios = [accuracy[task] / reference[task] for task in tasks if reference[task]]
    return 100 * sum(ratios) / len(ratios) if ratios else float("nan")


def mean_and_spread(values: Sequence[float]) -> tuple[str, str]:
    """The mean, and the standard deviation where there are several.

    >>> mean_and_spread([1.0, 3.0]), mean_and_spread([2.0])
    (('2.0', '1.4'), ('2.0', ''))
    """
    return f"{np.mean(values):.1f}", f"{np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
