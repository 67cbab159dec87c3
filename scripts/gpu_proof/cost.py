"""What it costs on a GPU: time and memory of gradients, of `Trainer.predict`, and of influence."""

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from bench_gradients import fastest, moments, peak_bytes
from bench_influence import DIM, make_store, tasks_of
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from gpu_proof.correctness import matmul_precision, other_bits
from gpu_proof.models import large, make_batch, plain, tiny
from gpu_proof.part import CannotRunError, Part, require
from icons.gradients import projected_gradients
from icons.gradients.altered_batches import without_mask
from icons.gradients.paths import KNOWN
from icons.models.loading import checkpoint_layers
from icons.modules.extractor import GradientExtractor
from icons.modules.gradient_writer import GradientWriter
from icons.preconditioner import AdamPreconditioner
from icons.projection import CountSketch
from icons.scores import Scorer, influence
from icons.scores.rows import Block
from icons.store import GradientStore

TOKENS = 8192
RATIO, MORE_GB, IDLE, OF_BANDWIDTH = 1.1, 0.5, 0.1, 0.5  # what speed and memory are held to, on a GPU alone


class Cost:
    """One LLaVA for all parts; small: a tiny one on the CPU."""

    def __init__(self, small: bool) -> None:
        self.small, self.device = small, torch.device("cpu" if small else "cuda")
        self.dim, self.rounds = (64, 1) if small else (5120, 2)

    def parts(self) -> dict[str, Callable[[], Part]]:
        """Checkpointed parts come last, since no model goes back."""
        short, long = (80, 120) if self.small else (700, 2048)
        name = "tiny LLaVA" if self.small else "LLaVA-1.5-7B"
        return {
            "influence": self.influence,
            f"{name}, {short} tokens": partial(self.speed, short),
            f"{name}, {long} tokens": partial(self.speed, long),
            f"{name}, {short} tokens, bf16-mixed": partial(self.speed, short, mixed=True),
            f"{name}, {short} tokens, TF32": partial(self.speed, short, tf32=True),
            f"{name}, {long} tokens, flash-attention": partial(self.speed, long, flash=True),
            f"{name}, Trainer.predict": partial(self.predict, long),
            f"{name}, first pass within 80 GB": partial(self.first_pass, short),
            f"{name}, {short} tokens, checkpointed": partial(self.speed, short, checkpointed=True),
            f"{name}, {long} tokens, checkpointed": partial(self.speed, long, checkpointed=True),
        }

    def influence(self) -> Part:
        """Products of rows on the device, which read each number once; and all of it, from a store."""
        rows = 512 if self.small else 20_000
        with tempfile.TemporaryDirectory() as folder:
            store, tasks = make_store(Path(folder) / "train.zarr", rows), tasks_of()
            seconds = self.fastest({"from a store": lambda: influence(store, tasks, device=self.device)})
            scorer = Scorer.of(store, tasks, device=self.device)
        size = 512 if self.small else 65_536
        one = torch.ones(size, device=self.device)
        gradient = torch.randn(size, DIM, device=self.device)
        block, copy = Block(range(size), gradient, gradient.norm(dim=1), one, one, one > 0), torch.empty_like(gradient)
        host = torch.ones(rows, DIM, dtype=torch.float16)
        seconds |= self.fastest({
            "products": lambda: scorer.checkpoints[0].product(block, one),
            "products and errors": lambda: scorer.score_block([block]),
            "copy": lambda: copy.copy_(gradient), "host to device": lambda: host.to(self.device, copy=True),
        })  # fmt: skip
        limit = seconds["copy"] / 2  # which reads and writes
        figures = {
            "products / limit": seconds["products"] / limit,
            "products and errors / limit": seconds["products and errors"] / limit,
            "bandwidth GB/s": gradient.nbytes / limit / 1e9,
            "from a store / copy to the device": seconds["from a store"] / seconds["host to device"],
            "from a store, rows/s": rows / seconds["from a store"],
        }
        return Part(figures, goals={"products / limit": 1 / OF_BANDWIDTH})

    @cached_property
    def model(self) -> Any:
        return tiny(self.device) if self.small else large(self.device)

    @cached_property
    def sketching(self) -> CountSketch:
        return CountSketch(self.dim)

    @cached_property
    def adam(self) -> AdamPreconditioner:
        return moments(self.model, "adam")

    @cached_property
    def diagonal(self) -> AdamPreconditioner:
        return AdamPreconditioner(self.adam.exp_avg, self.adam.exp_avg_sq, step=100, form="diagonal")

    def batch(self, length: int, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
        """As many rows as `icons gradients` puts into a batch by default: 8,192 tokens."""
        return make_batch(self.model, 2 if self.small else TOKENS // length, length, device, seed)

    def comparable(self, length: int) -> dict[str, Tensor]:
        """As many of them as a plain pass, which needs more memory than ours, has room for: two thirds on 80 GB."""
        tokens = TOKENS if self.small or torch.cuda.mem_get_info()[1] > 100e9 else TOKENS * 2 // 3
        return make_batch(self.model, 2 if self.small else tokens // length, length, self.device)

    def fastest(self, ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
        return fastest({name: partial(self.finished, way) for name, way in ways.items()}, self.rounds)

    def finished(self, way: Callable[[], Any]) -> None:
        way()
        if not self.small:
            torch.cuda.synchronize()

    def mixed(self, way: Callable[[], Any]) -> Any:
        """As under `--trainer.precision bf16-mixed`, which enters autocast anew with each batch."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return way()

    def peak_gb(self, way: Callable[[], Any]) -> float:
        """Above what lies in memory before."""
        if self.small:
            return peak_bytes(way) / 1e9
        self.model.zero_grad()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.finished(way)
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    def speed(
        self, length: int, checkpointed: bool = False, mixed: bool = False, tf32: bool = False, flash: bool = False
    ) -> Part:
        """Against a plain pass in the same precision, with the same attention."""
        if flash:
            require("flash_attn", "flash")
            if self.small:
                raise CannotRunError("flash-attention has no kernels for a CPU")
            self.model.get_base_model().set_attn_implementation("flash_attention_2")
        try:
            with matmul_precision("high" if tf32 else "highest"):
                return self.compare(length, checkpointed, mixed)
        finally:
            if flash:
                self.model.get_base_model().set_attn_implementation("sdpa")

    def compare(self, length: int, checkpointed: bool, mixed: bool) -> Part:
        model, sketch = self.model.to(self.device), self.sketching  # `predict` leaves it on the CPU
        if checkpointed:
            checkpoint_layers(model)
        batch = self.comparable(length)
        forms = {"no preconditioner": None, "diagonal": self.diagonal, "adam": self.adam}
        ways: dict[str, Callable[[], Any]] = {
            "plain": partial(plain, model, batch), "plain without mask": partial(plain, model, without_mask(batch)),
        }  # fmt: skip
        ways |= {name: partial(projected_gradients, model, batch, sketch, form) for name, form in forms.items()}
        if mixed:
            ways = {name: partial(self.mixed, way) for name, way in ways.items()}
        begin = time.perf_counter()
        self.finished(ways["adam"])  # tests itself, makes signs and moments
        figures = {"first pass s": time.perf_counter() - begin}
        seconds = self.fastest(ways)
        peaks = {name: self.peak_gb(way) for name, way in ways.items()}
        different = float(other_bits(ways["adam"](), ways["adam"]()))
        figures |= {"different": different, "plain s": seconds["plain"], "plain GB": peaks["plain"]}
        figures["plain without mask / plain"] = seconds["plain without mask"] / seconds["plain"]
        figures["plain tokens/s"] = float(batch["attention_mask"].sum()) / seconds["plain"]
        ratios = {f"{name} / plain": seconds[name] / seconds["plain"] for name in forms}
        more = {f"{name} GB above plain": peaks[name] - peaks["plain"] for name in forms}
        goals = dict.fromkeys(ratios, RATIO) | dict.fromkeys(more, MORE_GB)
        return Part(figures | ratios | more, {"different": 0}, goals)

    def predict(self, length: int) -> Part:
        """`Trainer.predict` with Adam's moments into a float16 store; batches come from the CPU."""
        model, count = self.model.to(self.device), 2 if self.small else 6
        batches = [self.batch(length, torch.device("cpu"), seed) for seed in range(count)]
        rows = sum(len(batch["row"]) for batch in batches)
        there = self.batch(length, self.device)
        pass_s = self.fastest({"pass": lambda: projected_gradients(model, there, self.sketching, self.adam)})["pass"]
        busy = Busy(self.device)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            path = Path(folder) / "rows.zarr"
            writer = GradientWriter(path, num_rows=rows, dim=self.dim, chunk_rows=len(there["row"]))
            trainer = Trainer(
                accelerator="cpu" if self.small else "gpu", devices=1, logger=False, enable_progress_bar=False,
                enable_checkpointing=False, enable_model_summary=False, inference_mode=False,
                use_distributed_sampler=False, callbacks=[writer, busy],
            )  # fmt: skip
            loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type, var-annotated]
            extractor = GradientExtractor(model, self.sketching, self.adam)
            trainer.predict(extractor, loader, return_predictions=False)
            missing = len(GradientStore.open(path).missing())
        figures = {
            "idle": 1 - busy.busy / busy.seconds, "batch / pass": busy.seconds / count / pass_s,
            "batch s": busy.seconds / count, "units missing": float(missing),
            "no kernel seen": float(busy.busy == 0),
        }  # fmt: skip
        return Part(figures, {"units missing": 0, "no kernel seen": 0}, {"idle": IDLE})

    def first_pass(self, length: int) -> Part:
        """With its proof, which needs a plain pass's memory: more than 80 GB. Its rows are those of the next pass."""
        model, batch = self.model.to(self.device), self.batch(length, self.device)
        KNOWN.pop(model, None)
        total = 0 if self.small else torch.cuda.mem_get_info()[1]
        if total > 85e9:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(80e9 / total)
        try:
            begin = time.perf_counter()
            first = projected_gradients(model, batch, self.sketching, self.adam)
            different = float(other_bits(first, projected_gradients(model, batch, self.sketching, self.adam)))
            seconds = time.perf_counter() - begin
        finally:
            if total > 85e9:
                torch.cuda.set_per_process_memory_fraction(1.0)
        return Part({"two passes s": seconds, "different": different}, {"different": 0})


class Busy(Callback):
    """Seconds of `predict`, and those in which the device worked; stands behind the writer, so that writing counts."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.kind = DeviceType.CUDA if cuda else DeviceType.CPU
        self.profile = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])
        self.seconds = self.busy = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.profile.start()
        self.begin = time.perf_counter()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.kind == DeviceType.CUDA:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.begin
        self.profile.stop()
        events = [event for event in self.profile.events() or [] if event.device_type == self.kind]
        # an annotation spans what happens inside it, idling too
        work = [event.time_range for event in events if not getattr(event, "is_user_annotation", False)]
        self.busy = covered((span.start, span.end) for span in work) / 1e6


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
