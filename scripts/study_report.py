"""The tables of the study of rules, from its CSV files, as Markdown.

    python scripts/study_report.py scripts/study_selection.csv --health scripts/study_health.csv

Paired differences are over pools, each the mean of its fine-tunes: 95 % intervals by Student's t, p-values after Holm's
correction for all comparisons of a table.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from icons.validation.paired import corrected, paired_difference

Row = dict[str, str]
SETS: dict[str, Callable[[Row], bool]] = {
    "easy-VQA, pools for choosing": lambda row: row["data_set"] == "easy-vqa" and int(row["pool"]) < 8,
    "easy-VQA, held-out pools": lambda row: row["data_set"] == "easy-vqa" and int(row["pool"]) >= 8,
    "digits": lambda row: row["data_set"] == "digits" and int(row["pool"]) < 99,
}
REFERENCES = ("random", "vote", "filtered_random")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("--health", type=Path, help="what study_health.py wrote")
    given = parser.parse_args()
    rows = list(csv.DictReader(given.table.open()))
    for name, belongs in SETS.items():
        for fraction in sorted({float(row["fraction"]) for row in rows if belongs(row)}):
            chosen = [row for row in rows if belongs(row) and float(row["fraction"]) == fraction]
            print(f"\n## {name}, {100 * fraction:g} %\n")
            print("\n".join(accuracies(chosen)), "\n")
            print("\n".join(differences(chosen)))
    if given.health is not None:
        print("\n## Health: which measures foretell\n")
        print("\n".join(foretelling(rows, list(csv.DictReader(given.health.open())))))


def by_pool(rows: Sequence[Row], column: str = "mean") -> dict[str, dict[int, list[float]]]:
    """Rule -> pool -> the values of its fine-tunes."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["rule"]][int(row["pool"])].append(float(row[column]))
    return found


def accuracies(rows: Sequence[Row]) -> list[str]:
    """Mean accuracy of the tasks per rule and pool; bold where it is below random's mean on that pool."""
    found = by_pool(rows)
    pools = sorted({pool for values in found.values() for pool in values})
    composition = {column: by_pool(rows, column) for column in ("wrong", "yes", "no")}
    lines = ["| rule | " + " | ".join(map(str, pools)) + " | mean | worst | below random | wrong | yes | no |"]
    lines.append("|---" * (len(pools) + 7) + "|")
    for rule, values in sorted(found.items(), key=lambda item: float(np.mean([np.mean(v) for v in item[1].values()]))):
        means = {pool: float(np.mean(each)) for pool, each in values.items()}
        below = [pool for pool in means if pool in found["random"] and means[pool] < np.mean(found["random"][pool])]
        cells = [
            f"**{means[pool]:.1f}**" if pool in below else f"{means[pool]:.1f}" if pool in means else ""
            for pool in pools
        ]
        whole = list(means.values())
        made = [f"{100 * np.mean([np.mean(v) for v in composition[c][rule].values()]):.1f} %" for c in composition]
        count = f"{len(below)} of {len(means)}"
        lines.append(f"| {rule} | {' | '.join([*cells, f'{np.mean(whole):.1f}', f'{min(whole):.1f}', count, *made])} |")
    return lines


def differences(rows: Sequence[Row]) -> list[str]:
    """Paired differences of each rule to the references, over the pools that both have."""
    found = by_pool(rows)
    compared, pairs = [], []
    for rule in found:
        for reference in REFERENCES:
            both = sorted(set(found[rule]) & set(found.get(reference, ())))
            if rule != reference and (reference, rule) not in compared and len(both) > 1:  # each pair once
                ours, theirs = (np.array([[np.mean(found[name][pool])] for pool in both]) for name in (rule, reference))
                compared.append((rule, reference))
                pairs.append(paired_difference(ours, theirs))
    held = dict(zip(compared, corrected(pairs), strict=True))
    lines = ["| rule | " + " | ".join(f"minus {reference}" for reference in REFERENCES) + " |", "|---|---|---|---|"]
    for rule in found:
        cells = []
        for reference in REFERENCES:
            one = held.get((rule, reference))
            star = " *" if one is not None and one.is_significant else ""
            cells.append(f"{one.mean:+.1f} ({one.low:+.1f} to {one.high:+.1f}){star}" if one is not None else "")
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return lines


def foretelling(rows: Sequence[Row], health: Sequence[Row]) -> list[str]:
    """Per measure: its rank correlation with the gain over random rows of the same pool, and what a threshold flags.

    The threshold is chosen on the pools for choosing: the one that flags most failures (accuracy below random's mean)
    with at most 10 % false alarms. Measures are turned so that higher is worse. Random selections are left out.
    """
    gains = {}
    for data_set in {row["data_set"] for row in rows}:
        found = by_pool([row for row in rows if row["data_set"] == data_set and float(row["fraction"]) == 0.2])
        for rule, pools in found.items():
            for pool, values in pools.items():
                if rule != "random" and pool in found["random"]:
                    gains[data_set, pool, rule] = float(np.mean(values) - np.mean(found["random"][pool]))
    measures = [name for name in health[0] if name.endswith(("_up", "_down"))]
    lines = [
        "| measure | rank correlation: choosing | held-out | digits | threshold | failures flagged, false alarms: "
        "choosing | held-out and digits |",
        "|---|---|---|---|---|---|---|",
    ]
    parts: dict[str, dict[tuple[str, int, str], Row]] = {name: {} for name in SETS}
    for row in health:
        key = (row["data_set"], int(row["pool"]), row["rule"])
        for name, belongs in SETS.items():
            if belongs(row) and float(row["fraction"]) == 0.2 and key in gains:
                parts[name][key] = row
    for measure in measures:
        sign = 1 if measure.endswith("_up") else -1
        columns = [
            (np.array([sign * float(row[measure]) for row in part.values()]), np.array([gains[key] for key in part]))
            for part in parts.values()
        ]
        cells = [f"{stats.spearmanr(*column).statistic:+.2f}" if len(column[0]) > 2 else "" for column in columns]
        threshold = chosen_threshold(*columns[0])
        later = [np.concatenate(both) for both in zip(*columns[1:], strict=True)]
        flagged = [flags(value, gain, threshold) for value, gain in (columns[0], later)]
        lines.append(f"| {measure} | {' | '.join(cells)} | {sign * threshold:.3g} | {flagged[0]} | {flagged[1]} |")
    return lines


def chosen_threshold(value: np.ndarray, gain: np.ndarray) -> float:
    """The lowest threshold with at most 10 % of the good selections at or above it: it flags most of the failures."""
    good = np.sort(value[gain >= 0])
    return float(np.nextafter(good[int(np.ceil(0.9 * len(good))) - 1], np.inf))


def flags(value: np.ndarray, gain: np.ndarray, threshold: float) -> str:
    failed, flagged = gain < 0, value >= threshold
    return f"{(failed & flagged).sum()} of {failed.sum()}, {(~failed & flagged).sum()} of {(~failed).sum()}"


if __name__ == "__main__":
    main()
