"""Measures the rules that read single validation rows or gradients at size: time and peak memory, 20 % selected.

    python scripts/bench_rules.py --out bench              # 665,000 rows x 5,120, 10 tasks of 200 rows; 10 GB of disk
    python scripts/bench_rules.py --out bench --scale 0.1 --rule balanced --rule coverage

Each rule is measured in a process of its own, its pass over the gradients included. Stores in --out are kept and used
again.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric

import icons
from icons.consensus.rules import RULES
from icons.modules.scoring import Scoring
from icons.store import GradientStore

NUM_ROWS, DIM, NUM_TASKS, NUM_VALIDATION = 665_000, 5120, 10, 200
MOST_SECONDS, MOST_BYTES = 900, 3e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the stores")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of training rows")
    parser.add_argument("--rule", action="append", help="again for each; default: all that read more than the scores")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    num_rows = int(NUM_ROWS * given.scale)
    folder = given.out / str(num_rows)
    if given.one:
        measure(folder, given.one)
        return
    make(folder, num_rows)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, {given.threads} threads; {num_rows:,} rows", flush=True)
    for rule in given.rule or [name for name, rule in RULES.items() if rule.reads_pairs or rule.reads_gradients]:
        words = [sys.executable, *sys.argv, "--one", rule]
        print(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout, end="", flush=True)


def measure(folder: Path, rule: str) -> None:
    store, began, used = icons.ScoreStore.open(folder / "scores.zarr"), time.perf_counter(), time.process_time()
    chosen = icons.select(store, 0.2, rule)
    wall, cpu = time.perf_counter() - began, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{rule:<18} {len(chosen.rows):>8,} rows {wall:8.1f} s (<= {MOST_SECONDS}) {cpu:8.1f} s of CPU "
        f"{peak / 1e9:6.2f} GB (<= {MOST_BYTES / 1e9:.0f})"
    )


def make(folder: Path, num_rows: int) -> None:
    """Random gradients with a direction in common, so that scores differ as real ones do, and their scores."""
    rng = np.random.default_rng(0)
    common = rng.standard_normal((NUM_TASKS, DIM), dtype=np.float32)
    tasks = {f"task{place}": [str(folder / f"task{place}.zarr")] for place in range(NUM_TASKS)}
    for place, paths in enumerate(tasks.values()):
        write(paths[0], NUM_VALIDATION, common[[place]], rng)
    write(str(folder / "train.zarr"), num_rows, common, rng)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    Scoring([str(folder / "train.zarr")], tasks, str(folder / "scores.zarr")).run(fabric)


def write(path: str, num_rows: int, common: np.ndarray, rng: np.random.Generator) -> None:
    """A block of random rows, turned by one place from unit to unit, so that no two rows are the same."""
    store = GradientStore.open_or_create(path, num_rows=num_rows, dim=DIM, manifest={})
    noise = rng.standard_normal((store.partition.chunk_rows, DIM), dtype=np.float32)
    for unit in store.missing():
        size = len(store.partition.unit_rows(unit))
        rows = np.roll(noise[:size], unit, axis=1)
        rows += common[rng.integers(len(common), size=size)] * rng.normal(0, 0.3, size=(size, 1)).astype(np.float32)
        one = np.ones(size, np.float32)
        store.write_unit(
            unit,
            {"gradient": rows, "norm": one, "loss": one, "tokens": one.astype("i4"), "status": one.astype("u1")},
        )


if __name__ == "__main__":
    main()
