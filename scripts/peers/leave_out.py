"""Does a task's loss rise without the rows that a score calls best, and fall without those it calls worst?

    python scripts/peers/leave_out.py --task peers_task --out peers_run --table scripts/peers/leave_out.csv

For each score and task, the start is trained on the pool without its 5 % highest rows, and without its 5 % lowest.
Both are compared, seed by seed, with trainings without as many random rows, drawn anew for each seed. Trainings
without the same rows are made once. What is done is not done again; the table has of each score the seeds that are
whole.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import REFERENCE, baselines, interval
from scipy.stats import t
from table import write
from task import Task
from training import retrained

SHARE = 0.05
DRAWS = 4
"""Random sets of each seed."""
SCORES: tuple[tuple[str, str], ...] = (
    REFERENCE,
    ("ours", "product, kfac, exact"),
    ("kronfluence_peer", "ekfac"),
    ("bergson_peer", "trackstar-adam"),
    ("baseline", "minus the loss"),
    ("trak_peer", "trak"),
    ("bergson_peer", "cosine-adam"),
    ("dattri_llm_peer", "ekfac-relative"),
    ("baseline", "random, one draw"),
)
KIND = ("baseline", "random rows of the task's kind")
Rows = tuple[int, ...]
Losses = dict[str, list[float]]


class Trainings:
    """Losses of all tasks after training without some rows, kept in a file as they come."""

    def __init__(self, task: Task, way: str) -> None:
        self.task, self.way, self.file = task, way, task.folder / way / "leave_out.json"
        self.found: Losses = json.loads(self.file.read_text()) if self.file.exists() else {}

    def name(self, rows: Rows, seed: int) -> str:
        return f"{hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:16]}/{seed}"

    def make(self, rows: Rows, seed: int) -> None:
        name = self.name(rows, seed)
        if name not in self.found:
            kept = sorted(set(range(self.task.settings["pool"])) - set(rows))
            self.found[name] = retrained(self.task, self.way, kept, seed)
            self.file.with_suffix(".partial").write_text(json.dumps(self.found))
            self.file.with_suffix(".partial").replace(self.file)

    def known(self, sets: Sequence[Rows], seed: int) -> bool:
        return all(self.name(rows, seed) in self.found for rows in sets)

    def losses(self, rows: Rows, seed: int) -> list[float]:
        return self.found[self.name(rows, seed)]


def random_sets(task: Task, seed: int, count: int) -> list[Rows]:
    """As many rows, whatever their kind."""
    draw = np.random.default_rng(seed)
    return [tuple(draw.permutation(task.settings["pool"])[:count].tolist()) for _ in range(DRAWS)]


def kind_sets(task: Task, seed: int, count: int) -> list[Rows]:
    """As many rows of each task's own kind."""
    draw = np.random.default_rng([seed, 1])
    kinds = np.array([record["kind"] for record in json.loads((task.folder / "pool.json").read_text())])
    return [tuple(draw.permutation(np.flatnonzero(kinds == name))[:count].tolist()) for name in task.names]


def ends_of(scores: np.ndarray, count: int) -> dict[str, list[Rows]]:
    """`top` and `bottom` -> each task's rows; of equal scores the earlier row comes first."""
    order = np.argsort(-scores, axis=0, kind="stable")
    return {
        "top": [tuple(column[:count].tolist()) for column in order.T],
        "bottom": [tuple(column[-count:].tolist()) for column in order.T],
    }


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over seeds, and Student's 95 % interval."""
    wide = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), values.mean() - wide, values.mean() + wide


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", type=Path, default=Path("peers_task"))
    parser.add_argument("--out", type=Path, default=Path("peers_run"), help="folder of run.py, with the scores")
    parser.add_argument("--table", type=Path, default=Path("peers_run") / "leave_out.csv")
    parser.add_argument("--way", choices=("lora", "full"), default="lora")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--judge-only", action="store_true", help="make the table of what is there")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    task = Task(given.task)
    count = round(SHARE * task.settings["pool"])
    scores: Mapping[tuple[str, str], np.ndarray] = {
        ("baseline", name): values for name, values in baselines(task, given.way).items()
    } | {(file.parts[-4], file.parts[-2]): np.load(file) for file in given.out.glob(f"*/{given.way}/*/scores.npy")}
    for missing in sorted(set(SCORES) - set(scores)):
        print(f"{', '.join(missing)}: left out, it has no scores in {given.out}", flush=True)
    by_score = {name: ends_of(scores[name], count) for name in SCORES if name in scores}
    trainings, seeds = Trainings(task, given.way), range(1, given.seeds + 1)
    chosen = {
        (*name, end): dict.fromkeys(seeds, ends[end]) for end in ("top", "bottom") for name, ends in by_score.items()
    }
    chosen[*KIND, "any"] = {seed: kind_sets(task, seed, count) for seed in seeds}
    by_chance = {seed: random_sets(task, seed, count) for seed in seeds}
    for sets in chosen.values() if not given.judge_only else ():
        for seed in seeds:
            for rows in [*by_chance[seed], *sets[seed]]:
                trainings.make(rows, seed)
    write(given.table, judged(task, trainings, chosen, by_chance))


Sets = Mapping[int, Sequence[Rows]]
"""Seed -> sets of rows."""


def judged(
    task: Task, trainings: Trainings, chosen: Mapping[tuple[str, str, str], Sets], by_chance: Sets
) -> list[dict[str, Any]]:
    """Of each score and end: the change of a task's loss, mean over tasks, with its interval over seeds."""
    changes = {}
    for name, sets in chosen.items():
        known = {seed: trainings.known([*sets[seed], *by_chance[seed]], seed) for seed in sets}
        changes[name] = {seed: change(trainings, seed, sets[seed], by_chance[seed]) for seed in sets if known[seed]}
    table: list[dict[str, Any]] = []
    for (tool, variant, end), by_seed in changes.items():
        reference = changes[*REFERENCE, "top" if end == "any" else end]
        both = sorted(set(by_seed) & set(reference))
        if len(by_seed) < 3:
            print(f"{tool}, {variant}, {end}: left out, {len(by_seed)} seeds are whole", flush=True)
            continue
        values = np.array(list(by_seed.values()))
        each = dict(zip(task.names, values.mean(axis=0), strict=True))
        row = {
            "tool": tool.removesuffix("_peer"), "variant": variant, "left out": end,
            "change of loss": interval(mean_interval(values.mean(axis=1))),
            **{name: f"{value:.2f}" for name, value in each.items()}, "seeds": len(by_seed),
            "minus reference": interval(
                mean_interval(np.array([by_seed[seed] - reference[seed] for seed in both]).mean(axis=1))
            ),
        }  # fmt: skip
        print(row, flush=True)
        table.append(row)
    return table


def change(trainings: Trainings, seed: int, sets: Sequence[Rows], by_chance: Sequence[Rows]) -> np.ndarray:
    """`[tasks]`: each task's loss without its own rows, against random ones."""
    own = [trainings.losses(rows, seed)[place] for place, rows in enumerate(sets)]
    return np.array(own) - np.mean([trainings.losses(rows, seed) for rows in by_chance], axis=0)


if __name__ == "__main__":
    main()
