"""Measures the store against plain files, in one run: `python scripts/bench_store.py` (2 GB of disk and of memory).

Prints a table: measured, the figure to reach, the machine. `--rows 4096 --resume-rows 20000 --scaling-rows 64` is a
quick look.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from icons.datamodules.sampler import UnitBatchSampler, unit_dataloader
from icons.modules.writer import GradientWriter
from icons.store import GradientStore
from icons.store.unit_writer import UnitWriter

DIM, BATCH_ROWS, REPEATS = 5120, 64, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--resume-rows", type=int, default=1_000_000)
    parser.add_argument("--scaling-rows", type=int, default=2048)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: a temporary folder here")
    parser.add_argument("--measure", choices=["memory", "ranks"], help=argparse.SUPPRESS)
    parser.add_argument("--devices", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure == "memory":
        return print_memory(given.folder, given.rows)
    if given.measure == "ranks":
        return predict(given.folder, given.rows, given.devices)
    folder = Path(tempfile.mkdtemp(prefix="bench_store_", dir=given.folder or Path.cwd()))
    try:
        report(given, folder)
    finally:
        shutil.rmtree(folder)
    return None


def report(given: argparse.Namespace, folder: Path) -> None:
    table = Table("measured", "value", "to reach", title=f"{given.rows:,} x {DIM} float16")
    write, read = against_plain_files(folder, given.rows)
    table.add_row("writing through the writer / tofile with fsync", f"{write:.2f}", "<= 1.5")
    table.add_row("reading in units / fromfile", f"{read:.2f}", "<= 1.5")
    one, two = (rows_per_second(folder, given.scaling_rows, devices) for devices in (1, 2))
    table.add_row(f"two ranks / one rank ({two:.0f} / {one:.0f} rows a second)", f"{two / one:.2f}", ">= 1.85")
    table.add_row(f"resume of a finished store, {given.resume_rows:,} rows", f"{resume(folder, given):.2f} s", "<= 3 s")
    small, large = (peak_megabytes(folder, rows) for rows in (given.rows // 2, given.rows))
    table.add_row("memory of the writer, half the rows and all", f"{small:.0f}, {large:.0f} MB", "the same")
    console = Console(width=110)
    console.print(table)
    machine = f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}"
    console.print(f"{machine}: best of {REPEATS}")


def against_plain_files(folder: Path, rows: int) -> tuple[float, float]:
    """Ratios of the best times of writing and of reading; store and plain file take turns."""
    batch = np.random.default_rng(0).standard_normal((BATCH_ROWS, DIM)).astype(np.float32)
    whole = np.concatenate([batch.astype(np.float16)] * (rows // BATCH_ROWS))
    times: dict[str, list[float]] = {"write plain": [], "write": [], "read plain": [], "read": []}
    for _ in range(REPEATS):
        for name in ("plain", "store"):
            remove(folder / name)
        times["write plain"].append(seconds(lambda: write_plain(folder / "plain", whole)))
        times["write"].append(seconds(lambda: write_store(folder / "store", rows, batch)))
        store = GradientStore.open(folder / "store")
        times["read plain"].append(seconds(lambda: np.fromfile(folder / "plain", np.float16)))
        times["read"].append(seconds(partial(read_units, store)))
    np.testing.assert_array_equal(store.gradients[-BATCH_ROWS:], whole[-BATCH_ROWS:])
    best = {name: min(values) for name, values in times.items()}
    print({name: [round(value, 2) for value in values] for name, values in times.items()}, file=sys.stderr)
    return best["write"] / best["write plain"], best["read"] / best["read plain"]


def write_plain(path: Path, whole: np.ndarray) -> None:
    with path.open("wb") as file:
        whole.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def write_store(path: Path, rows: int, batch: np.ndarray) -> None:
    """All rows through the writer, in batches as `Trainer.predict` brings them."""
    writer = UnitWriter(GradientStore.create(path, num_rows=rows, dim=DIM))
    ones = np.ones(BATCH_ROWS, np.float32)
    results = {"gradient": batch, "norm": ones, "loss": ones, "tokens": ones, "status": ones}
    for start in range(0, rows, BATCH_ROWS):
        writer.collect(np.arange(start, start + BATCH_ROWS), results)
    writer.finish()


def read_units(store: GradientStore) -> None:
    rows = store.partition.chunk_rows
    for start in range(0, store.num_rows, rows):
        np.asarray(store.gradients[start : start + rows])


def resume(folder: Path, given: argparse.Namespace) -> float:
    """Opens a store of which every unit is done, and finds that nothing is missing: what a resume does before it ends.

    Only its status is on the disk, since a resume looks at nothing else.
    """
    options = {"num_rows": given.resume_rows, "dim": DIM, "manifest": {"data": {"fingerprint": "x"}}}
    store = GradientStore.create(folder / "resume", **options)
    for unit in range(store.partition.num_units):
        store.write_chunk("status", unit, np.ones(len(store.partition.unit_rows(unit)), np.uint8))
    store.storage.flush()

    def again() -> None:
        writer = UnitWriter(GradientStore.open_or_create(folder / "resume", **options))
        writer.sweep()
        assert writer.store.missing() == []
        writer.finish()

    return min(seconds(again) for _ in range(2))


def peak_megabytes(folder: Path, rows: int) -> float:
    remove(folder / "memory")
    return float(in_child("memory", folder / "memory", rows))


def print_memory(path: Path, rows: int) -> None:
    """The highest resident memory while rows are written, above that before; the first rows warm the imports up."""
    batch = np.ones((BATCH_ROWS, DIM), np.float32)
    write_store(path.with_name("warm"), BATCH_ROWS, batch)
    shutil.rmtree(path.with_name("warm"))
    Path("/proc/self/clear_refs").write_text("5")  # the mark of the highest memory starts anew
    before = resident("VmRSS")
    write_store(path, rows, batch)
    print((resident("VmHWM") - before) / 1e3)


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def rows_per_second(folder: Path, rows: int, devices: int) -> float:
    """Of a computation that keeps one thread busy, from the first batch to the last stored unit, on all ranks."""
    remove(folder / "ranks")
    in_child("ranks", folder / "ranks", rows, devices)
    times = [json.loads(file.read_text()) for file in folder.glob("ranks.rank*.json")]
    assert len(times) >= devices
    spans = times[:devices]
    for file in folder.glob("ranks.rank*.json"):
        file.unlink()
    return rows / (max(end for _, end in spans) - min(start for start, _ in spans))


class Rows(LightningDataModule):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.dataset, self.plan = range(rows), None

    def predict_dataloader(self) -> object:
        assert self.plan is not None
        sampler = UnitBatchSampler.of_plan(self.plan, lambda rows: [1] * len(rows), 8)
        return unit_dataloader(self.dataset, sampler, lambda rows: {"row": torch.tensor(rows)})


class Busy(LightningModule):
    """Some twenty milliseconds of matrix products per row."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.weight = path, torch.nn.Parameter(torch.randn(768, 768) / 28)

    def on_predict_start(self) -> None:
        self.trainer.strategy.barrier()
        self.start = time.time()

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> dict[str, torch.Tensor]:
        count = len(batch["row"])
        hidden = torch.ones(8 * count, 768)
        for _ in range(24):
            hidden = torch.tanh(hidden @ self.weight)
        rows = hidden[:count, :1].expand(count, DIM).float()
        one = torch.ones(count)
        return {"row": batch["row"], "gradient": rows + 1, "norm": one, "loss": one, "tokens": one, "status": one}

    def on_predict_end(self) -> None:  # called after the callbacks': everything is stored
        path = self.path.with_name(f"{self.path.name}.rank{self.global_rank}.json")
        path.write_text(json.dumps([self.start, time.time()]))


def predict(path: Path, rows: int, devices: int) -> None:
    torch.set_num_threads(1)
    writer = GradientWriter(path, dim=DIM, chunk_rows=64, manifest={})
    flags = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    flags |= {"accelerator": "cpu", "devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    trainer = Trainer(callbacks=[writer], inference_mode=False, use_distributed_sampler=False, **flags)
    trainer.predict(Busy(path), datamodule=Rows(rows), return_predictions=False)


def in_child(measure: str, path: Path, rows: int, devices: int = 1) -> str:
    command = [sys.executable, __file__, "--measure", measure, "--folder", path, "--rows", rows, "--devices", devices]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip().rpartition("\n")[2]


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
