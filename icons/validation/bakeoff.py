"""A bake-off's tables: what training on each rule's selection reached, and which differences are more than chance."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float

from icons.terminal import counted
from icons.validation.paired import Difference, corrected, paired_difference

REFERENCES = ("random", "vote")
"""What every rule is compared with."""
Measure: TypeAlias = Literal["accuracy", "loss"]
Measured: TypeAlias = Mapping[tuple[str, float], Float[np.ndarray, "pools seeds tasks"]]
"""(rule, share) -> what each training measured on each task; the same pools, seeds and tasks throughout."""


def tables(measured: Measured, tasks: Sequence[str], measure: Measure) -> dict[str, Any]:
    """The content of a bake-off's JSON file: paired differences to `random` and to `vote`, and a table per task.

    Every rule, `vote` among them, is compared with both references at its own share; a rule that is a reference is not
    compared with itself. p-values are corrected for the number of comparisons in the table (Holm).

    Args:
        measured: both references are there at every share.
        tasks: their names.
        measure: accuracies are shares, shown as percentages; losses are shown as they are.

    Returns:
        The form that `icons.report.comparison.validation` reads.
    """
    factor = 100 if measure == "accuracy" else 1
    means = {entry: factor * values.mean(axis=2) for entry, values in measured.items()}
    compared = [
        ((rule, share), reference)
        for rule, share in measured
        for reference in REFERENCES
        if rule not in ("random", reference)
    ]
    tested = corrected([paired_difference(means[entry], means[against, entry[1]]) for entry, against in compared])
    differences = dict(zip(compared, tested, strict=True))
    shares = {share for _, share in measured}
    rows = []
    for rule, share in measured:
        if rule == "random":
            continue
        own = {against: differences.get(((rule, share), against)) for against in REFERENCES}
        significant = [against for against, one in own.items() if one is not None and one.is_significant]
        rows.append([_label(rule, share, shares), *map(_cell, own.values()), ", ".join(significant) or "none"])
    unit, worst = ("accuracy (%)", np.min) if measure == "accuracy" else ("loss", np.max)
    reached = [[_label(*entry, shares), *_spread(factor * values, worst)] for entry, values in measured.items()]
    several = ["worst pool"] if len(next(iter(means.values()))) > 1 else []
    return {
        "title": "Which rule selects best?",
        "text": _explained(measured, unit, len(compared)),
        "columns": ["rule", "minus random", "minus vote", "significant against"],
        "rows": rows,
        "tables": [{"columns": [f"{unit} after training", *tasks, "mean", *several], "rows": reached}],
    }


def _label(rule: str, share: float, shares: set[float]) -> str:
    """
    >>> _label("vote", 0.2, {0.2}), _label("vote", 0.2, {0.05, 0.2})
    ('vote', 'vote, 20 %')
    """
    return rule if len(shares) == 1 else f"{rule}, {100 * share:.4g} %"


def _cell(difference: Difference | None) -> Any:
    """A table's cell: an estimate with its interval; of a single pair the estimate alone."""
    if difference is None:
        return "itself"
    if difference.num_pairs == 1:
        return round(difference.mean, 3)
    return [round(number, 3) for number in (difference.mean, difference.low, difference.high)]


def _spread(
    values: Float[np.ndarray, "pools seeds tasks"], worst: Callable[[Float[np.ndarray, " pools"]], Any]
) -> list[float]:
    """Means over pools and seeds, task by task and over all tasks; of several pools also the worst one's mean."""
    by_task, by_pool = values.mean(axis=(0, 1)), values.mean(axis=(1, 2))
    shown = [*by_task, by_task.mean(), *([worst(by_pool)] if len(by_pool) > 1 else [])]
    return [round(float(value), 3) for value in shown]


def _explained(measured: Measured, unit: str, num_comparisons: int) -> str:
    pools, seeds, _ = next(iter(measured.values())).shape
    pairs, what = (pools, "pools") if pools > 1 else (seeds, "seeds")
    better = "above" if unit.startswith("accuracy") else "below"
    text = (
        f"{counted(pools * seeds * len(measured), 'training')}, each on what a rule selects: {counted(pools, 'pool')}, "
        f"{counted(seeds, 'seed')} each. Shown is the mean over tasks of the {unit}, "
        f"minus that of random rows and of the vote with the same pool and seed; {better} zero is better."
    )
    if pairs == 1:
        return f"{text} One pair of trainings tells nothing of chance: give more --seeds, or --pool."
    return (
        f"{text} Intervals are 95 % by Student's t over {pairs} {what}; significant at 5 % after Holm's correction for "
        f"{num_comparisons} comparisons."
    )
