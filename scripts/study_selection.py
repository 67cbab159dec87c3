"""Which rule selects best? Pools x rules x fine-tunes on two real data sets; keeps every fine-tune as a row of a table.

    python scripts/digits_vqa.py --out study/digits_start
    python scripts/study_selection.py --out study --table scripts/study_selection.csv

Per pool, with the demo's settings and the package's own commands: data, warm-up, gradients, influence; pool, test
questions (development images) and warm-up take the pool's number as their seed. Then, per rule, share and seed, the
selected rows, a fine-tune on them, and the tasks' accuracy. The same line, run again, goes on where it was stopped; a
plan is read again after every fine-tune, so that it can be changed meanwhile.

A fine-tune is `icons warmup`'s own, made cheaper (see study_training.py).
"""

import argparse
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits_vqa import make_digits_data
from study_table import write_table
from study_training import TRAINER, fine_tune

import icons
from icons.cli import call
from icons.cli.demo import QUICK, DemoSettings
from icons.datamodules.easy_vqa import DemoData, make_demo_data

DATA_SETS: dict[str, Callable[..., DemoData]] = {
    "easy-vqa": partial(make_demo_data, test="development"),
    "digits": make_digits_data,
}
PLAN = """
easy-vqa 0,1,3,4,5,7 random,vote,filtered_random,balanced,vote@drop3,coverage@drop3 0.2 0
easy-vqa 8-19 random,vote,filtered_random,vote@drop3,coverage@drop3 0.2 0
digits 0-3 random,vote,filtered_random,vote@drop3,coverage@drop3 0.2 0
easy-vqa 8-11 random,vote,coverage@drop3 0.05 0
"""
DRAWN = ("random", "filtered_random")
"""Rules that draw anew for every fine-tune; the others' selections are one and the same."""


@dataclass(frozen=True)
class Job:
    """One fine-tune."""

    data_set: str
    pool: int
    rule: str
    """a method of `icons select`, or METHOD@dropN: by scores made with `--drop-axes N`"""
    fraction: float
    seed: int

    @property
    def selection(self) -> str:
        return f"{self.rule}-{self.fraction}-{self.seed if self.rule in DRAWN else 0}.json"

    @property
    def result(self) -> str:
        return f"{self.rule}-{self.fraction}-{self.seed}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder for everything that is made")
    parser.add_argument("--plan", type=Path, help="lines: data set, pools, rules, shares, seeds; default: the study's")
    parser.add_argument("--table", type=Path, help="CSV to write; default: OUT/study_selection.csv")
    parser.add_argument("--wait", action="store_true", help="with nothing left to do, wait for the plan to change")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the quick demo's sizes, to see the stages")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    study = Study(given.out, QUICK if given.quick else DemoSettings())
    file = given.table or given.out / "study_selection.csv"
    while True:
        planned = list(read_plan(given.plan.read_text() if given.plan else PLAN))
        if not study.next_of(planned):
            if not given.wait:
                break
            time.sleep(10)
        write_results(file, study)


def read_plan(text: str) -> Iterator[Job]:
    """The fine-tunes of a plan, line by line; within a line seed by seed, pool by pool.

    >>> [job.result for job in read_plan("digits 0-1 vote 0.2 0,1")]
    ['vote-0.2-0.json', 'vote-0.2-0.json', 'vote-0.2-1.json', 'vote-0.2-1.json']
    """
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        data_set, pools, rules, fractions, seeds = line.split()
        for seed in numbers(seeds):
            for pool in numbers(pools):
                for fraction in fractions.split(","):
                    for rule in rules.split(","):
                        yield Job(data_set, pool, rule, float(fraction), seed)


def numbers(text: str) -> list[int]:
    """
    >>> numbers("1,4-6")
    [1, 4, 5, 6]
    """
    ends = [part.partition("-") for part in text.split(",")]
    return [number for first, _, last in ends for number in range(int(first), int(last or first) + 1)]


class Study:
    """All pools below one folder: `out/DATA_SET/NUMBER/`, with `selections/` and `results/` in each."""

    def __init__(self, out: Path, settings: DemoSettings) -> None:
        self.out, self.settings = out, settings
        self.waiting: set[Job] = set()
        """fine-tunes whose selection neither lies there nor can be made by this code"""

    def folder(self, job: Job) -> Path:
        return self.out / job.data_set / f"{job.pool:02d}"

    def next_of(self, planned: Sequence[Job]) -> bool:
        """Does the first job that is not done; False: none is left that could be."""
        for job in planned:
            folder = self.folder(job)
            result = folder / "results" / job.result
            if result.exists() or (job in self.waiting and not (folder / "selections" / job.selection).exists()):
                continue
            began = time.monotonic()
            pool = prepared(folder, job.data_set, job.pool, self.settings)
            rows = selection(folder, job)
            if rows is None:
                self.waiting.add(job)
                continue
            made = time.monotonic()
            measured = fine_tune(folder, pool, rows, job.seed, self.settings)
            content = asdict(job) | measured | {"rows": rows.tolist(), "seconds": round(time.monotonic() - made, 1)}
            result.parent.mkdir(exist_ok=True)
            result.with_suffix(".partial").write_text(json.dumps(content))
            result.with_suffix(".partial").replace(result)
            mean = np.mean(list(measured["accuracy"].values()))
            stamp = f"{time.strftime('%H:%M:%S')} prepared {made - began:.0f} s, tuned {time.monotonic() - made:.0f} s"
            print(f"{stamp}: {job.data_set} {job.pool} {job.result[:-5]} {100 * mean:.1f}", flush=True)
            return True
        return False


def prepared(folder: Path, data_set: str, number: int, options: DemoSettings) -> DemoData:
    """A pool with its warm-up, gradients and scores."""
    found = folder / "data.json"
    if not found.exists():
        num_pool = options.num_pool if data_set == "easy-vqa" else 4 * options.num_pool // 5  # as far as images go
        sizes = {"num_pool": num_pool, "num_validation": options.num_validation, "num_test": options.num_test}
        data = DATA_SETS[data_set](folder, seed=number, **sizes)
        with resources.as_file(resources.files("icons") / "configs" / "demo_start") as shipped:
            start = folder.parent.parent / "digits_start" if data_set == "digits" else shipped
            shutil.copytree(start, folder / "start", dirs_exist_ok=True, ignore=shutil.ignore_patterns("images"))
        kept = {"validation": data.validation, "test": data.test}
        found.write_text(json.dumps({part: list(files) for part, files in kept.items()}))
    tasks = json.loads(found.read_text())
    data = DemoData(
        folder / "pool.json", folder / "images", {task: folder / f"{task}.json" for task in tasks["validation"]},
        {task: folder / f"{task}_test.json" for task in tasks["test"]},
    )  # fmt: skip
    if (folder / "scores.zarr").exists() and (folder / "scored").exists():
        return data
    lora = {"lora_rank": options.lora_rank, "lora_alpha": 2.0 * options.lora_rank}
    done(
        "warmup", model=folder / "start", images=data.images, data=data.pool, out=folder / "warmup", min_rows=1,
        task=[f"{task}={file}:{data.images}" for task, file in data.validation.items()], held_out=0.0, seed=number,
        fraction=options.warmup_fraction, epochs=options.warmup_epochs, batch_size=options.warmup_batch_size,
        learning_rate=options.warmup_learning_rate, projector_learning_rate=options.projector_learning_rate,
        trainer=TRAINER, **lora,
    )  # fmt: skip
    for name, file in {"train": data.pool, **data.validation}.items():
        done(
            "gradients", checkpoint=folder / "warmup", data=file, images=data.images, out=str(folder / f"{name}.zarr"),
            dim=options.dim, batch_size=32, preconditioner="adam" if name == "train" else "none", trainer=TRAINER,
        )  # fmt: skip
    scored(folder, 0)
    (folder / "scored").touch()
    return data


def scored(folder: Path, drop_axes: int) -> Path:
    """The pool's scores, without so many leading axes of the validation rows (`icons influence --drop-axes`)."""
    out = folder / (f"scores-{drop_axes}.zarr" if drop_axes else "scores.zarr")
    tasks = json.loads((folder / "data.json").read_text())["validation"]
    if not (out.exists() and not icons.ScoreStore.open(str(out)).missing()):
        done(
            "influence", train=[str(folder / "train.zarr")], out=str(out), drop_axes=drop_axes,
            task=[f"{task}={folder / f'{task}.zarr'}" for task in tasks],
        )  # fmt: skip
    return out


def done(command: str, **options: Any) -> None:
    """Calls a command; ends this process with its exit status if that is not 0."""
    if status := call(command, **options):
        raise SystemExit(status)


def selection(folder: Path, job: Job) -> np.ndarray | None:
    """The rule's rows, ascending; from `selections/` if they lie there; None: this code does not know the rule."""
    file = folder / "selections" / job.selection
    if file.exists():
        return np.array(json.loads(file.read_text()))
    rule, _, drop = job.rule.partition("@drop")
    store = icons.ScoreStore.open(str(scored(folder, int(drop or 0))))
    if rule == "filtered_random":  # drawn here, as it was before the package had it: the table's rows stay the same
        mean = np.asarray(store.influence[:]).mean(axis=1)
        better = np.argsort(-mean, kind="stable")[: len(mean) // 2]
        rows = np.sort(np.random.default_rng(job.seed).permutation(better)[: int(job.fraction * len(mean))])
    else:
        try:
            rows = icons.select(store, job.fraction, rule, seed=job.seed).rows
        except ValueError as error:
            print(f"{job}: {error}", flush=True)
            return None
    file.parent.mkdir(exist_ok=True)
    file.with_suffix(".partial").write_text(json.dumps(rows.tolist()))
    file.with_suffix(".partial").replace(file)
    return rows


def write_results(file: Path, study: Study) -> None:
    """Every result below the study's folder as a row of a CSV file."""
    found = []
    for result in sorted(study.out.glob("*/*/results/*.json")):
        content = json.loads(result.read_text())
        found.append(described(content, composition(result.parent.parent / "pool.json")))
    if found:
        write_table(file, found)


@lru_cache(maxsize=64)
def composition(pool: Path) -> tuple[np.ndarray, np.ndarray]:
    """Each record's provenance and answer."""
    records = json.loads(pool.read_text())
    answers = [record["conversations"][1]["value"] for record in records]
    return np.array([record["provenance"] for record in records]), np.array(answers)


def described(content: dict[str, Any], pool: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """A row of the table: the fine-tune, its accuracy (%), and what its rows are made of (shares)."""
    rows = content["rows"]
    provenance, answer = (column[rows] for column in pool)
    row = {name: content[name] for name in ("data_set", "pool")} | {"warmup_seed": content["pool"]}
    row |= {name: content[name] for name in ("rule", "fraction", "seed")} | {"rows": len(rows)}
    accuracy = list(content["accuracy"].values())
    row |= {"mean": round(100 * float(np.mean(accuracy)), 3)}
    row |= {f"task_{place}": round(100 * value, 2) for place, value in enumerate(accuracy, 1)}
    row |= {"said_yes": round(content["said_yes"], 4), "right_yes": round(content["right_yes"], 4)}
    for name in ("wrong", "text-only", "duplicate"):
        row[name.replace("-", "_")] = round(float((provenance == name).mean()), 4)
    for name in ("yes", "no"):
        row[name] = round(float((answer == name).mean()), 4)
    shares = np.array(list(Counter(answer.tolist()).values())) / len(rows)
    row["effective_answers"] = round(float(np.exp(-(shares * np.log(shares)).sum())), 2)
    return row | {"seconds": content["seconds"]}


if __name__ == "__main__":
    main()
