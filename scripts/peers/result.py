"""What every peer's script is given and leaves behind: scores, and what they cost."""

import argparse
import json
import resource
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from task import Task

EPOCH = 3
KILLED = "as a killed run left it"
"""The variants of kill.py, which go on with what is there, end so."""


@dataclass(frozen=True)
class Job:
    """One variant of one tool on one way of training; `out` is its folder."""

    task: Task
    way: str
    out: Path

    @property
    def checkpoint(self) -> Path:
        return self.task.checkpoint(self.way, EPOCH)


def mean_by_task(task: Task, each: np.ndarray) -> np.ndarray:
    """Scores on every validation row, in the tasks' order, -> their mean per task, `[rows, tasks]`."""
    ends = np.cumsum([len(task.tokens[name]) for name in task.names])[:-1]
    return np.stack([part.mean(axis=1) for part in np.split(each.astype(np.float64), ends, axis=1)], axis=1)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(variants: Mapping[str, Callable[[Job], np.ndarray]]) -> None:
    """Runs the variants that the command line names, those that are done excepted, each into `--out/WAY/VARIANT`.

    A variant returns `[rows, tasks]`, higher is better. Seconds count from after the imports to the scores, models'
    loading included; the peak is that of this process or, if larger, of its largest child, and belongs to a variant
    alone only if it is the first. Bytes are what the variant left in its folder besides scores.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--way", choices=("lora", "full"), required=True)
    usual = [name for name in variants if not name.endswith(KILLED)]
    parser.add_argument("--variant", choices=tuple(variants), nargs="+", default=usual)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    failed: list[str] = []
    for name in given.variant:
        out = given.out / given.way / name
        if (out / "scores.npy").exists():
            continue
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        begin, cpu = time.perf_counter(), cpu_seconds()
        try:
            scores = variants[name](Job(Task(given.task), given.way, out))
        except Exception:  # the other variants are worth having
            traceback.print_exc()
            failed.append(name)
            continue
        cost = {
            "seconds": time.perf_counter() - begin, "cpu_seconds": cpu_seconds() - cpu, "peak_mb": peak_mb(),
            "bytes": size_of(out),
        }  # fmt: skip
        (out / "cost.json").write_text(json.dumps(cost))
        np.save(out / "scores.partial.npy", scores)
        (out / "scores.partial.npy").replace(out / "scores.npy")
        print(f"{given.way}, {name}: {cost['cpu_seconds']:.1f} s of CPU", flush=True)
    if failed:
        raise SystemExit(f"{given.way}: failed: {', '.join(failed)}")


USED = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def cpu_seconds() -> float:
    """Of this process and its finished children."""
    used = [resource.getrusage(who) for who in USED]
    return sum(one.ru_utime + one.ru_stime for one in used)


def peak_mb() -> float:
    """Of this process or its largest child."""
    return max(resource.getrusage(who).ru_maxrss for who in USED) / 1024
