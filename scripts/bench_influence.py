"""Measures influence and selection by vote at size: time and memory against the plainest code of the same arithmetic.

    python scripts/bench_influence.py influence            # 100,000 rows x 5,120, 10 tasks of 100 rows; 2 GB of disk
    python scripts/bench_influence.py memory               # 1,000,000 rows, a store of its rows repeated; peak memory
    python scripts/bench_influence.py select               # 7,000,000 rows x 22 tasks

Every figure is measured in a process of its own; `--scale 0.01` tries it at a hundredth of the size.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from icons.consensus import select
from icons.scores import Scorer, influence
from icons.store import GradientStore

DIM, NUM_TASKS, NUM_VALIDATION = 5120, 10, 100


def make_store(path: Path, num_rows: int) -> GradientStore:
    """Random rows; a block of them is repeated, since the disk does not tell."""
    store = GradientStore.create(path, num_rows=num_rows, dim=DIM, manifest={})
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((store.partition.chunk_rows, DIM), dtype=np.float32)
    for unit in range(store.partition.num_units):
        size = len(store.partition.unit_rows(unit))
        one = np.ones(size, np.float32)
        store.write_unit(
            unit,
            {"gradient": rows[:size], "norm": one, "loss": one, "tokens": one.astype("i4"), "status": one.astype("u1")},
        )
    return GradientStore.open(path)


def tasks_of() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {f"task{t}": rng.standard_normal((NUM_VALIDATION, DIM), dtype=np.float32) for t in range(NUM_TASKS)}


def timed(work: Callable[[], object], repeats: int = 3) -> float:
    """The best of some runs: the least disturbed."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench_influence(folder: Path, scale: float) -> None:
    num_rows = int(100_000 * scale)
    store, tasks = make_store(folder / "train.zarr", num_rows), tasks_of()
    raw = folder / "train.raw"
    with raw.open("wb") as file:
        for unit in range(store.partition.num_units):
            rows = store.partition.unit_rows(unit)
            store.gradients[rows.start : rows.stop].tofile(file)
    vectors = torch.stack([torch.from_numpy(rows).mean(dim=0) for rows in tasks.values()])
    validation = torch.nn.functional.normalize(torch.cat([torch.from_numpy(rows) for rows in tasks.values()]))

    def plain_numpy() -> None:
        np.fromfile(raw, dtype=np.float16).reshape(-1, DIM).astype(np.float32) @ vectors.numpy().T

    def plain_torch() -> None:
        torch.from_numpy(np.fromfile(raw, dtype=np.float16)).reshape(-1, DIM).float() @ vectors.T

    def original() -> None:
        train = torch.from_numpy(np.fromfile(raw, dtype=np.float16)).reshape(-1, DIM).float()
        train = torch.nn.functional.normalize(train)
        scores = train @ validation.T
        [part.mean(dim=1) for part in scores.split(NUM_VALIDATION, dim=1)]

    ours = timed(lambda: influence(store, tasks))
    by_numpy, by_torch, by_original = timed(plain_numpy), timed(plain_torch), timed(original)
    print(f"influence of {num_rows:,} rows x {DIM} on {NUM_TASKS} tasks: {ours:.2f} s")
    print(f"  / (fromfile + float32 + matmul), numpy converts: {ours / by_numpy:.2f}  (<= 1.2)")
    print(f"  / (fromfile + float32 + matmul), torch converts: {ours / by_torch:.2f}  (<= 1.2)")
    print(f"  the original's way / ours: {by_original / ours:.2f}  (>= 5)")


class Repeated:
    """A store whose rows are one block over and over: a million rows without the disk."""

    scale = None

    def __init__(self, store: GradientStore, num_rows: int) -> None:
        self.store, self.gradients = store, np.broadcast_to(store.gradients[:1], (num_rows, DIM))
        self.manifest: dict[str, object] = {}
        self.partition = type(store.partition)(num_rows, store.partition.chunk_rows)

    def stored(self, name: str, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.partition.num_rows)
        if name == "gradients":
            return self.store.stored(name, slice(0, stop - start))
        return np.full(stop - start, self.store.stored(name, slice(0, 1)))


def bench_memory(folder: Path, scale: float) -> None:
    one = make_store(folder / "train.zarr", 512)
    before = peak_mb()
    print(f"memory before: {before:.0f} MB (torch, zarr and this script)")
    for num_rows in (int(100_000 * scale), int(1_000_000 * scale)):
        scorer = Scorer.of(Repeated(one, num_rows), tasks_of())
        for _ in scorer.score(range(num_rows)):
            pass
        print(f"peak memory after {num_rows:,} rows: {peak_mb():.0f} MB  (<= 600)")


def bench_select(folder: Path, scale: float) -> None:
    num_rows = int(7_000_000 * scale)
    scores = np.random.default_rng(0).standard_normal((num_rows, 22), dtype=np.float32)
    seconds = timed(lambda: select(scores), repeats=1)
    print(f"select by vote, {num_rows:,} rows x 22 tasks: {seconds:.1f} s (<= 10), peak {peak_mb():.0f} MB (<= 3,000)")


BENCHES = {"influence": bench_influence, "memory": bench_memory, "select": bench_select}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*BENCHES, "all"], nargs="?", default="all")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size")
    parser.add_argument("--folder", type=Path, help="where the data lies meanwhile; default: a temporary folder")
    options = parser.parse_args()
    if options.what == "all":
        for name in BENCHES:
            words = ["--scale", str(options.scale), *(["--folder", str(options.folder)] if options.folder else [])]
            subprocess.run([sys.executable, __file__, name, *words], check=True)
        return
    print(f"# {platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        BENCHES[options.what](Path(folder), options.scale)


if __name__ == "__main__":
    main()
