"""Runs every tool on the common task, each in its own environment, and judges the scores; results go to a table.

    python scripts/peers/make_task.py --out peers_task
    python scripts/peers/run.py --task peers_task --out peers_run --table scripts/peers/worth.csv \\
        --python bergson_peer=/path/to/bergson/bin/python --python kronfluence_peer=... --python trak_peer=...

A tool without a `--python` is left out, and said to be. What is done is not done again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from table import write
from task import Task

from icons.validation.datamodel import (
    datamodelling_score,
    draw_subsets,
    predicted_gain,
    separation,
    separation_interval,
    spearman,
)

TOOLS = ("ours", "bergson_peer", "kronfluence_peer", "trak_peer", "dattri_peer", "dattri_llm_peer")
REFERENCE = ("ours", "cosine, Adam, exact")
"""The paper's form, without its projection."""
RESAMPLES = 500


def losses(task: Task, way: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Subsets that all seeds were trained on, their mean losses `[subsets, tasks]`, and those seed by seed."""
    found = json.loads((task.folder / way / "losses.json").read_text())
    by_seed: dict[str, dict[int, list[float]]] = {}
    for name, values in found.items():
        place, seed = name.split("/")
        by_seed.setdefault(seed, {})[int(place)] = values
    whole = max(len(part) for part in by_seed.values())
    by_seed = {seed: part for seed, part in by_seed.items() if len(part) == whole}
    places = sorted(set.intersection(*(set(part) for part in by_seed.values())))
    each = np.array([[part[place] for place in places] for part in by_seed.values()])
    return places, each.mean(axis=0), each


def judged(task: Task, way: str, scores: np.ndarray) -> dict[str, Any]:
    """Linear datamodelling score, per task too, and how well the scores tell wrong answers, each with its interval."""
    places, measured, _ = losses(task, way)
    drawn = draw_subsets(len(scores), max(places) + 1, task.settings["share"], 0)
    gain = predicted_gain(scores, [drawn[place] for place in places])
    lds = datamodelling_score(gain, measured, resamples=RESAMPLES)
    pool = json.loads((task.folder / "pool.json").read_text())
    wrong, kinds = (np.array([record[what] for record in pool]) for what in ("wrong", "kind"))
    names = task.names
    own = scores[np.arange(len(kinds)), [names.index(kind) if kind in names else 0 for kind in kinds]]
    areas = [separation(own[kinds == name], wrong[kinds == name]) for name in names if wrong[kinds == name].any()]
    area = float(np.mean(areas))
    ends = separation_interval(area, int(wrong.sum()), int((~wrong).sum()))
    each = dict(zip(names, spearman(gain, -measured), strict=True))
    return {
        "LDS": interval(lds), **{f"LDS {name}": f"{value:.2f}" for name, value in each.items()},
        "AUC": interval((area, *ends)), "subsets": len(places),
    }  # fmt: skip


def difference(task: Task, way: str, scores: np.ndarray, reference: np.ndarray) -> str:
    """Linear datamodelling score minus that of other scores, with the 95 % bootstrap interval over the same subsets."""
    places, measured, _ = losses(task, way)
    drawn = draw_subsets(len(scores), max(places) + 1, task.settings["share"], 0)
    gains = [predicted_gain(each, [drawn[place] for place in places]) for each in (scores, reference)]

    def between(rows: np.ndarray) -> np.ndarray:
        one, other = (spearman(gain[rows], -measured[rows]).mean(axis=-1) for gain in gains)
        return one - other

    again = np.random.default_rng(0).integers(0, len(places), (RESAMPLES, len(places)))
    low, high = np.percentile(between(again), [2.5, 97.5])
    return interval((float(between(np.arange(len(places)))), low, high))


def interval(values: tuple[float, float, float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*values)


def baselines(task: Task, way: str) -> dict[str, np.ndarray]:
    """What needs no gradient: chance; minus the loss at the checkpoint; and, on a task's own rows, 1."""
    import torch
    from task import batches, losses_of

    rows, names = task.tokens["pool"], task.names
    model = task.model(way, task.checkpoint(way, 3))
    with torch.no_grad():
        loss = torch.cat([losses_of(model, batch) for batch in batches(rows, 256)]).numpy()
    kinds = [record["kind"] for record in json.loads((task.folder / "pool.json").read_text())]
    same = np.array([[float(kind == name) for name in names] for kind in kinds])
    return {
        "random, one draw": np.random.default_rng(0).normal(size=(len(rows), len(names))),
        "minus the loss": np.repeat(-loss[:, None], len(names), axis=1),
        "1 for rows of the task's kind": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", type=Path, default=Path("peers_task"))
    parser.add_argument("--out", type=Path, default=Path("peers_run"))
    parser.add_argument("--table", type=Path, default=Path("peers_run") / "worth.csv")
    parser.add_argument("--ways", nargs="+", default=["lora", "full"])
    parser.add_argument("--python", action="append", default=[], help="TOOL=PYTHON, the interpreter of its environment")
    parser.add_argument("--judge-only", action="store_true", help="make the table of what is there")
    given = parser.parse_args()
    task, here = Task(given.task.resolve()), Path(__file__).parent
    pythons = {"ours": sys.executable} | dict(entry.split("=", 1) for entry in given.python)
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    table: list[dict[str, Any]] = []
    for way in given.ways:
        for tool in TOOLS:
            if tool not in pythons:
                print(f"{tool}: left out, no --python {tool}=...", flush=True)
                continue
            if not given.judge_only:
                script = here / f"{tool}.py"
                options = ["--task", str(task.folder), "--way", way, "--out", str(given.out / tool)]
                failed = subprocess.run([pythons[tool], str(script), *options], env=quiet).returncode
                if failed:
                    print(f"{tool}, {way}: failed with exit status {failed}; the rest goes on", flush=True)
        found = {
            (file.parts[-4], file.parts[-2]): np.load(file) for file in sorted(given.out.glob(f"*/{way}/*/scores.npy"))
        }
        found |= {("baseline", name): scores for name, scores in baselines(task, way).items()}
        for (tool, variant), scores in found.items():
            row = {"way": way, "tool": tool.removesuffix("_peer"), "variant": variant} | judged(task, way, scores)
            row["LDS minus reference"] = difference(task, way, scores, found[REFERENCE])
            print(row, flush=True)
            table.append(row)
    write(given.table, table)


if __name__ == "__main__":
    main()
