"""Measures the store against plain files, in one run: `python scripts/bench_store.py` (2 GB of disk and of memory).

Prints a table: measured, the figure to reach, the machine. `--rows 4096 --resume-rows 20000 --scaling-rows 64` is a
quick look; `--gradients demo/train.zarr` (the store that `icons demo` makes) adds what compression does to real rows.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from lightning import LightningDataModule, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cosine_similarity
from zarr.registry import get_codec_class
from zarr.storage import MemoryStore

from icons.datamodules.sampler import UnitBatchSampler, unit_dataloader
from icons.modules.gradient_writer import GradientWriter
from icons.projection import CountSketch
from icons.store import GradientStore
from icons.store.encoding import FIELDS, encode_rows
from icons.store.unit_writer import UnitWriter

DIM, BATCH_ROWS, REPEATS = 5120, 64, 5
CHUNK_ROWS = 1024  # the default for 65,536 rows; for fewer it would be smaller, and so would be the memory
CODECS: list[dict[str, Any]] = [
    {"name": "blosc", "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "shuffle", "typesize": 2}},
    {"name": "blosc", "configuration": {"cname": "zstd", "clevel": 5, "shuffle": "bitshuffle", "typesize": 2}},
    {"name": "zstd", "configuration": {"level": 3}},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--resume-rows", type=int, default=1_000_000)
    parser.add_argument("--scaling-rows", type=int, default=2048)
    parser.add_argument("--gradients", help="a float16 gradient store, to be compressed")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: a temporary folder here")
    parser.add_argument("--measure", choices=["memory", "ranks"], help=argparse.SUPPRESS)
    parser.add_argument("--devices", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure == "memory":
        return print_memory(given.folder, given.rows)
    if given.measure == "ranks":
        return predict(given.folder, given.rows, given.devices)
    place = given.folder or Path.cwd()
    try:
        place.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="bench_store_", dir=place))
    except OSError as error:
        sys.exit(f"--folder {place}: {error.strerror}; expected a folder to write to, or a place for one")
    try:
        report(given, folder)
    finally:
        shutil.rmtree(folder)
    return None


def report(given: argparse.Namespace, folder: Path) -> None:
    table = Table("measured", "value", "to reach", title=f"{given.rows:,} x {DIM} float16")
    write, read, through_zarr = against_plain_files(folder, given.rows)
    table.add_row("writing through the writer / tofile with fsync", f"{write:.2f}", "<= 1.3")
    table.add_row("reading in units / fromfile", f"{read:.2f}", "<= 0.9")
    table.add_row("the same by zarr itself, as a notebook may / fromfile", f"{through_zarr:.2f}", "")
    one, two, apart = scaling(folder, given.scaling_rows)
    table.add_row(f"two ranks / one rank ({two:.0f} / {one:.0f} rows a second)", f"{two / one:.2f}", ">= 1.85")
    table.add_row("two unrelated runs side by side / one: what this machine has to give", f"{apart / one:.2f}", "")
    table.add_row(f"resume of a finished store, {given.resume_rows:,} rows", f"{resume(folder, given):.2f} s", "<= 1 s")
    memory = ", ".join(f"{peak_megabytes(folder, rows):.0f}" for rows in (given.rows // 2, given.rows))
    table.add_row("memory of the writer, half the rows and all", f"{memory} MB", "the same")
    table.add_row("int8: error added to a cosine / the projection's own", f"{int8_error():.3f}", "< 1")
    for codec in CODECS if given.gradients else []:
        ratio, packed, unpacked = compression(GradientStore.open(given.gradients), codec)
        name = f"{codec['name']} {codec['configuration'].get('cname', '')}".strip()
        table.add_row(f"{name}: bytes left, MB/s in, MB/s out", f"{ratio:.2f}, {packed:.0f}, {unpacked:.0f}", "")
    (console := Console(width=110)).print(table)
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    busy = " ".join(f"{load:.1f}" for load in os.getloadavg())
    machine = f"{model.partition(': ')[2]}, {os.cpu_count()} cores, load {busy}, {time.strftime('%Y-%m-%d')}"
    console.print(f"{machine}: best of {REPEATS}")


def against_plain_files(folder: Path, rows: int) -> tuple[float, float, float]:
    """Ratios of the best times of writing, and of reading in two ways; store and plain file take turns."""
    batch = np.random.default_rng(0).standard_normal((BATCH_ROWS, DIM)).astype(np.float32)
    whole = np.concatenate([batch.astype(np.float16)] * (rows // BATCH_ROWS))
    names = ("write plain", "write", "read plain", "read", "read by zarr")
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(REPEATS):
        # What was written before gives its pages back, so that both find the page cache in the same state, and keeps
        # its names: a file system that hands out no file number again soon (ext4 without a journal) would look at each
        # one that was just given up whenever it makes a file.
        for former in (*folder.glob("plain*"), *folder.glob("store*/gradients/c/*/0")):
            os.truncate(former, 0)
        times["write plain"].append(seconds(partial(write_plain, folder / f"plain{number}", whole)))
        times["write"].append(seconds(partial(write_store, folder / f"store{number}", rows, batch)))
    store = GradientStore.open(folder / f"store{REPEATS - 1}")
    np.testing.assert_array_equal(store.gradients[-BATCH_ROWS:], whole[-BATCH_ROWS:])
    del whole  # with less free memory, fromfile alone would take ten times as long
    for _ in range(REPEATS):
        times["read plain"].append(seconds(lambda: np.fromfile(folder / f"plain{REPEATS - 1}", np.float16)))
        times["read"].append(seconds(partial(read_units, store, partial(store.stored, "gradients"))))
        times["read by zarr"].append(seconds(partial(read_units, store, store.gradients.__getitem__)))
    best = {name: min(values) for name, values in times.items()}
    print({name: [round(value, 2) for value in values] for name, values in times.items()}, file=sys.stderr)
    reading = best["read plain"]
    return best["write"] / best["write plain"], best["read"] / reading, best["read by zarr"] / reading


def write_plain(path: Path, whole: np.ndarray) -> None:
    with path.open("wb") as file:
        whole.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def write_store(path: Path, rows: int, batch: np.ndarray) -> None:
    """All rows through the writer, in batches as `Trainer.predict` brings them."""
    writer = UnitWriter(GradientStore.create(path, num_rows=rows, dim=DIM, chunk_rows=CHUNK_ROWS))
    ones = np.ones(BATCH_ROWS, np.float32)
    results = {"gradient": batch, "norm": ones, "loss": ones, "tokens": ones, "status": ones}
    for start in range(0, rows, BATCH_ROWS):
        writer.collect(np.arange(start, start + BATCH_ROWS), results)
    writer.finish()


def read_units(store: GradientStore, read: Callable[[slice], object]) -> None:
    for unit in range(store.partition.num_units):
        rows = store.partition.unit_rows(unit)
        np.asarray(read(slice(rows.start, rows.stop)))


def resume(folder: Path, given: argparse.Namespace) -> float:
    """Opens a store of which every unit is done, and finds that nothing is missing: what a resume does before it ends.

    Only its status is on the disk, since a resume looks at nothing else.
    """
    options = {"num_rows": given.resume_rows, "dim": DIM, "manifest": {"data": {"fingerprint": "x"}}}
    store = GradientStore.create(folder / "resume", **options)
    for unit in range(store.partition.num_units):
        done = store.chunks.parts("status", np.ones(len(store.partition.unit_rows(unit)), np.uint8))
        store.storage.put_together({store.chunks.key("status", unit): done})
    store.storage.flush()

    def again() -> None:
        writer = UnitWriter(GradientStore.open_or_create(folder / "resume", **options))
        writer.sweep()
        assert writer.store.missing() == []
        writer.finish()

    return min(seconds(again) for _ in range(2))


def peak_megabytes(folder: Path, rows: int) -> float:
    remove(folder / "memory")
    return float(ended(start_child("memory", folder / "memory", rows)))


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


def scaling(folder: Path, rows: int) -> tuple[float, float, float]:
    """Rows per second: of one rank, of two, and of two runs that know nothing of each other; best of three in turn."""
    found = [[rows_per_second(folder, rows, *layout) for layout in ((1, 1), (2, 1), (1, 2))] for _ in range(3)]
    print({"one, two, apart": [[round(speed) for speed in speeds] for speeds in found]}, file=sys.stderr)
    one, two, apart = (max(speeds) for speeds in zip(*found, strict=True))
    return one, two, apart


def rows_per_second(folder: Path, rows: int, devices: int, runs: int) -> float:
    """Of a computation that keeps one thread busy, from the first batch to the last stored unit, of all runs."""
    paths = [folder / f"ranks{run}" for run in range(runs)]
    for path in paths:
        remove(path)
    for child in [start_child("ranks", path, rows // runs, devices) for path in paths]:
        ended(child)
    speed = 0.0
    for path in paths:
        spans = [json.loads(path.with_name(f"{path.name}.rank{rank}.json").read_text()) for rank in range(devices)]
        speed += rows / runs / (max(end for _, end in spans) - min(start for start, _ in spans))
    return speed


class Rows(LightningDataModule):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.dataset, self.plan = range(rows), None

    def predict_dataloader(self) -> object:
        assert self.plan is not None
        sampler = UnitBatchSampler(self.plan, lambda rows: [1] * len(rows), 8)
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
    flags: dict[str, Any] = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False
    )
    flags |= {"accelerator": "cpu", "devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    trainer = Trainer(callbacks=[writer], inference_mode=False, use_distributed_sampler=False, **flags)
    trainer.predict(Busy(path), datamodule=Rows(rows), return_predictions=False)


def int8_error() -> float:
    """Standard deviation of what int8 adds to cosines, over that of what the projection to 5,120 numbers adds."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 256, 20 * DIM, generator=generator)
    right += 0.3 * left
    sketch, rows, restored = CountSketch(DIM, seed=0), [], []
    for block in (left, right):
        rows.append(sketch.start(len(block), {"w": block[0].shape}, torch.device("cpu")))
        sketch.add(rows[-1], "w", block)
        stored = encode_rows({"gradient": rows[-1].numpy(), **dict.fromkeys(FIELDS[1:], np.ones(len(block)))}, "int8")
        restored.append(torch.from_numpy(stored["gradients"] * stored["scale"][:, None]))
    projected = cosine_similarity(rows[0], rows[1])
    added = cosine_similarity(restored[0], restored[1]) - projected
    return float(added.std() / (projected - cosine_similarity(left, right)).std())


def compression(store: GradientStore, codec: dict[str, Any]) -> tuple[float, float, float]:
    """Bytes that a codec leaves of a store's rows, as a share, and MB/s of packing and unpacking, in memory."""
    rows = np.asarray(store.gradients[: min(store.num_rows, 4096)])
    memory: dict[str, Any] = {}
    chunks, packer = (min(CHUNK_ROWS, len(rows)), store.dim), get_codec_class(codec["name"]).from_dict(codec)
    options: Any = {"shape": rows.shape, "chunks": chunks, "dtype": rows.dtype, "compressors": [packer]}
    array = zarr.create_array(MemoryStore(memory), **options)
    packed = min(seconds(partial(array.__setitem__, slice(None), rows)) for _ in range(3))
    unpacked = min(seconds(partial(array.__getitem__, slice(None))) for _ in range(3))
    left = sum(len(chunk) for key, chunk in memory.items() if "/" in key) / rows.nbytes
    return left, rows.nbytes / packed / 1e6, rows.nbytes / unpacked / 1e6


def start_child(measure: str, path: Path, rows: int, devices: int = 1) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--measure", measure, "--folder", path, "--rows", rows, "--devices", devices]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([*map(str, command)], env=environment, stdout=pipe, stderr=pipe, text=True)


def ended(child: "subprocess.Popen[str]") -> str:
    output, errors = child.communicate()
    if child.returncode:
        sys.exit(errors)
    return output.strip().rpartition("\n")[2]


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
