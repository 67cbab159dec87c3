"""Does a task's loss rise without the rows that a score calls best, and fall without those it calls worst?

    python scripts/peers/leave_out.py --task peers_task --out peers_run --table scripts/peers/leave_out.csv

For each score and task, the start is trained on the pool without its 5 % highest rows, and without its 5 % lowest.
Both are compared, seed by seed, with trainings without as many random rows, drawn anew for each seed. Trainings
without the same rows are made once. What is done is not done again; the table has the seeds that are whole.
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
    ("ours", "cosine, Adam, exact, 3 checkpoints"),
    ("ours", "product, kfac, exact"),
    ("kronfluence_peer", "ekfac"),
    ("bergson_peer", "ekfac"),
    ("bergson_peer", "trackstar-adam"),
    ("bergson_peer", "cosine-adam"),
    ("trak_peer", "trak"),
    ("dattri_peer", "ekfac"),
    ("baseline", "minus the loss"),
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
    parser.add_argument("--seeds", type=int, default=5)
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
    chosen = {
        (*name, end): sets for name in SCORES if name in scores for end, sets in ends_of(scores[name], count).items()
    }
    trainings, seeds = Trainings(task, given.way), range(1, given.seeds + 1)
    for seed in () if given.judge_only else seeds:
        by_task = [one for sets in chosen.values() for one in sets] + kind_sets(task, seed, count)
        for rows in random_sets(task, seed, count) + by_task:
            trainings.make(rows, seed)
    whole = [
        seed for seed in seeds
        if all(
            trainings.name(rows, seed) in trainings.found
            for sets in [*chosen.values(), kind_sets(task, seed, count), random_sets(task, seed, count)]
            for rows in sets
        )
    ]  # fmt: skip
    write(given.table, judged(task, trainings, chosen, whole, count))


def judged(
    task: Task,
    trainings: Trainings,
    chosen: Mapping[tuple[str, str, str], Sequence[Rows]],
    seeds: list[int],
    count: int,
) -> list[dict[str, Any]]:
    """Of each score and end: the change of a task's loss, mean over tasks, with its interval over seeds."""
    by_chance = np.array([
        np.mean([trainings.losses(rows, seed) for rows in random_sets(task, seed, count)], axis=0) for seed in seeds
    ])  # fmt: skip

    def change(sets: Sequence[Sequence[Rows]]) -> np.ndarray:
        """`[seeds, tasks]`: each task's loss without its own rows, against random ones."""
        own = [[trainings.losses(rows, seed)[place] for place, rows in enumerate(sets[number])]
               for number, seed in enumerate(seeds)]  # fmt: skip
        return np.array(own) - by_chance

    changes = {name: change([sets] * len(seeds)) for name, sets in chosen.items()}
    changes[*KIND, "any"] = change([kind_sets(task, seed, count) for seed in seeds])
    table: list[dict[str, Any]] = []
    for (tool, variant, end), values in changes.items():
        each = dict(zip(task.names, values.mean(axis=0), strict=True))
        row = {
            "tool": tool.removesuffix("_peer"), "variant": variant, "left out": end,
            "change of loss": interval(mean_interval(values.mean(axis=1))),
            **{name: f"{value:.2f}" for name, value in each.items()}, "seeds": len(seeds),
        }  # fmt: skip
        reference = changes[*REFERENCE, "top" if end == "any" else end]
        row["minus reference"] = interval(mean_interval((values - reference).mean(axis=1)))
        print(row, flush=True)
        table.append(row)
    return table


if __name__ == "__main__":
    main()
