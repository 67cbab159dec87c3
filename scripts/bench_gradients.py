"""Time and memory of per-sample gradients against a plain forward and backward pass of the same batch.

Usage: OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_gradients.py [--json FILE] [--quick] [--proportions NAME ...]

Random LLaVAs in two proportions, hidden size 512 and a head of 2 % of the weights as LLaVA-1.5-7B has it:

- `llava`: LoRA on 4 % of the weights, rows of 576 image and 80 to 144 text tokens;
- `short`: LoRA on 20 % (r = 64), rows of 64 image and 16 to 32 text tokens, where each pass over `[B, O, I]` counts.

The plain pass is one training step without its optimizer, once with its output layer narrowed to the supervised
positions as ours is, once on all positions. Full fine-tuning stands beside a plain pass of its own. Ways are timed in
turns, in seconds of the processor, and the fastest turn of each counts: a busy machine disturbs ratios little. The
first pass over a model, in which every layer is proven, happens once a run and is given apart.
"""

import argparse
import json
import logging
import platform
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from icons.batch import model_inputs, sample_losses
from icons.gradients import TaskMatrix, per_sample_gradients, projected_gradients, scored_gradients
from icons.gradients.output_layer import SupervisedPositions
from icons.models.llava import Llava
from icons.models.lora import LoraSettings, add_lora
from icons.modules.extractor import GradientExtractor
from icons.modules.gradient_writer import GradientWriter
from icons.preconditioner import AdamPreconditioner
from icons.projection import CountSketch, Projector, Rademacher

IMAGE, TASKS = -200, 10
CLOCK = time.process_time  # of the processor, which a busy machine stretches less than the wall's
NARROWED, WHOLE = "plain pass, output layer narrowed", "plain pass, all positions"


@dataclass(frozen=True)
class Proportions:
    """Sizes of a model and its batches."""

    rank: int
    image_tokens: int
    text_tokens: tuple[int, int]
    rows: int
    layers: int = 2
    hidden: int = 512
    vocabulary: int = 247

    @property
    def length(self) -> int:
        return self.image_tokens + self.text_tokens[1]


PROPORTIONS = {
    "llava": Proportions(rank=13, image_tokens=576, text_tokens=(80, 144), rows=2),
    "short": Proportions(rank=64, image_tokens=64, text_tokens=(16, 32), rows=16),
}
QUICK: dict[str, Any] = {"layers": 1, "hidden": 32, "rank": 4, "rows": 2, "image_tokens": 16}


def bench_model(sizes: Proportions, lora: bool = True) -> nn.Module:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden * 43 // 16,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
    )
    side = 8 * int(sizes.image_tokens**0.5)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=side, patch_size=8
    )
    model: nn.Module = Llava.of(
        LlavaForConditionalGeneration(
            LlavaConfig(text_config=text, vision_config=vision, image_token_index=sizes.vocabulary - 1)
        ),
        IMAGE,
    )
    if not lora:  # as LLaVA is fine-tuned: all but the tower
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("vision_tower" not in name)
        return model.eval()
    model = add_lora(model, LoraSettings(rank=sizes.rank, alpha=2 * sizes.rank))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def bench_batch(sizes: Proportions, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size, length, side = sizes.rows, sizes.length, 8 * int(sizes.image_tokens**0.5)
    ids = torch.randint(3, sizes.vocabulary - 1, (size, length), generator=generator)
    ids[:, 4 : 4 + sizes.image_tokens] = IMAGE
    least, most = (sizes.image_tokens + tokens for tokens in sizes.text_tokens)
    tokens = torch.randint(least, most + 1, (size, 1), generator=generator)
    mask = torch.arange(length) < tokens
    labels = ids.masked_fill(~mask, -100)
    labels[:, : sizes.image_tokens + 8] = -100
    return {
        "input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels,
        "row": torch.arange(size), "pixel_values": torch.randn(size, 3, side, side, generator=generator),
    }  # fmt: skip


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def moments(model: nn.Module, form: Any) -> AdamPreconditioner:
    generator = torch.Generator().manual_seed(1)
    first = {name: 1e-4 * torch.randn(value.shape, generator=generator) for name, value in trainable(model).items()}
    second = {name: 1e-7 * torch.rand(value.shape, generator=generator) for name, value in trainable(model).items()}
    return AdamPreconditioner(first, second, step=100, form=form)


def plain(model: nn.Module, batch: dict[str, Tensor], narrow: bool) -> None:
    """What one training step costs, without its optimizer."""
    model.zero_grad()
    SupervisedPositions(model, batch["labels"], narrow).run(model, batch).mean().backward()


def fastest(
    ways: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Seconds of the fastest of `rounds` calls, the ways taking turns after one unmeasured call each."""
    for way in ways.values():
        way()
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            begin = clock()
            way()
            found[name] = min(found[name], clock() - begin)
    return found


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_bytes(way: Callable[[], Any]) -> int:
    way()
    with LiveBytes() as memory:
        way()
    return memory.peak


def predict_seconds(model: nn.Module, sizes: Proportions, form: Any, dim: int, count: int) -> float:
    """Seconds per batch through `Trainer.predict` into a float16 store, the first batch not counted."""
    size = sizes.rows
    rows = size * count
    batches = [
        bench_batch(sizes, seed) | {"row": torch.arange(size * seed, size * seed + size)} for seed in range(count)
    ]
    extractor = GradientExtractor(model, CountSketch(dim), moments(model, form))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = GradientWriter(Path(folder) / "bench.zarr", num_rows=rows, dim=dim, chunk_rows=4 * size)
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, inference_mode=False, use_distributed_sampler=False, callbacks=[writer],
        )  # fmt: skip
        loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        projected_gradients(model, batches[0], extractor.projector, extractor.preconditioner)
        begin = CLOCK()
        trainer.predict(extractor, loader, return_predictions=False)
        return (CLOCK() - begin) / len(batches)


def one_at_a_time(model: nn.Module, batch: dict[str, Tensor], projector: Projector) -> Tensor:
    """The original's method: one backward pass per sample, rows kept, then a dense projection."""
    rows: dict[str, list[Tensor]] = {name: [] for name in trainable(model)}
    for sample in range(len(batch["labels"])):
        single = {name: value[sample : sample + 1] for name, value in batch.items()}
        loss = sample_losses(model(**model_inputs(single), use_cache=False).logits, single["labels"]).sum()
        for name, gradient in zip(rows, torch.autograd.grad(loss, list(trainable(model).values())), strict=True):
            rows[name].append(gradient)
    return project(projector, model, {name: torch.stack(found) for name, found in rows.items()})


def project(projector: Projector, model: nn.Module, blocks: dict[str, Tensor]) -> Tensor:
    shapes = {name: value.shape for name, value in trainable(model).items()}
    total = projector.start(len(next(iter(blocks.values()))), shapes, torch.device("cpu"))
    for name, block in blocks.items():
        sign = projector.sign(name, block.shape[1:], block.device)
        projector.add(total, name, block if sign is None else block * sign)
    return total


def rank_agreement(model: nn.Module, sizes: Proportions, dim: int) -> dict[str, float]:
    """Spearman correlation of projected with exact cosines, the rows of one batch against another's."""
    train, task = (per_sample_gradients(model, bench_batch(sizes, seed)) for seed in (100, 101))
    rows = torch.cat([train, task])
    named = trainable(model)
    pieces = rows.split([value.numel() for value in named.values()], dim=1)
    blocks = {name: piece.reshape(-1, *named[name].shape) for name, piece in zip(named, pieces, strict=True)}

    def cosines(values: Tensor) -> Tensor:
        unit = nn.functional.normalize(values, dim=1)
        return (unit[: sizes.rows] @ unit[sizes.rows :].mT).flatten()

    exact = cosines(rows)
    projectors = {"count sketch": CountSketch(dim), "dense signs": Rademacher(dim)}
    return {
        name: float(spearmanr(exact.numpy(), cosines(project(projector, model, blocks)).numpy()).statistic)
        for name, projector in projectors.items()
    }


def measure(sizes: Proportions, dim: int, rounds: int, dense: bool) -> dict[str, Any]:
    """The figures of one pair of proportions; ratios are to the narrowed and to the whole plain pass."""
    model, batch = bench_model(sizes), bench_batch(sizes, 0)
    named = trainable(model)
    sketch, diagonal, adam = CountSketch(dim), moments(model, "diagonal"), moments(model, "adam")
    generator = torch.Generator().manual_seed(2)
    vectors = [{name: torch.randn(v.shape, generator=generator) for name, v in named.items()} for _ in range(TASKS)]
    tasks = TaskMatrix(model, vectors)
    begin = CLOCK()
    projected_gradients(model, batch, sketch)
    first = CLOCK() - begin
    ways: dict[str, Callable[[], Any]] = {
        NARROWED: lambda: plain(model, batch, True),
        WHOLE: lambda: plain(model, batch, False),
        "projected, no preconditioner": lambda: projected_gradients(model, batch, sketch),
        "projected, diagonal": lambda: projected_gradients(model, batch, sketch, diagonal),
        "projected, adam": lambda: projected_gradients(model, batch, sketch, adam),
        "exact scores, 10 tasks, no preconditioner": lambda: scored_gradients(model, batch, tasks),
        "exact scores, 10 tasks, adam": lambda: scored_gradients(model, batch, tasks, adam),
    }
    seconds = fastest(ways, rounds, CLOCK)
    memory = {name: peak_bytes(way) for name, way in ways.items()}
    for form in ("diagonal", "adam"):
        times = (predict_seconds(model, sizes, form, dim, rounds) for _ in range(max(1, rounds // 4)))
        seconds[f"Trainer.predict into a store, {form}"] = min(times)
    if dense:
        begin = CLOCK()
        one_at_a_time(model, batch, Rademacher(dim))
        seconds["one sample at a time, dense signs (the original)"] = CLOCK() - begin
    seconds["the first pass of a run, proofs included"] = first
    weights = sum(value.numel() for value in model.parameters()) - sum(v.numel() for v in named.values())
    return {
        "sizes": asdict(sizes), "parameters": weights, "trainable": sum(value.numel() for value in named.values()),
        "seconds": seconds,
        "ratio": {name: (value / seconds[NARROWED], value / seconds[WHOLE]) for name, value in seconds.items()},
        "peak_mb_above_plain": {name: (value - memory[NARROWED]) / 1e6 for name, value in memory.items()},
        "largest_layer_mb": sizes.rows * 4 * max(value.numel() for value in named.values()) / 1e6,
        "spearman": rank_agreement(model, sizes, dim) if dense else {},
    }  # fmt: skip


def measure_full(sizes: Proportions, dim: int, rounds: int) -> dict[str, Any]:
    """The figures of a full fine-tune, every weight but the tower's, to a plain pass of the same."""
    model, batch = bench_model(sizes, lora=False), bench_batch(sizes, 0)
    sketch, diagonal = CountSketch(dim), moments(model, "diagonal")
    ways: dict[str, Callable[[], Any]] = {
        NARROWED: lambda: plain(model, batch, True),  # not narrowed: an output layer that is trained never is
        "projected, no preconditioner": lambda: projected_gradients(model, batch, sketch),
        "projected, diagonal": lambda: projected_gradients(model, batch, sketch, diagonal),
    }
    seconds = fastest(ways, rounds, CLOCK)
    return {"seconds": seconds, "ratio": {name: (value / seconds[NARROWED],) * 2 for name, value in seconds.items()}}


def show(title: str, found: dict[str, Any]) -> None:
    print(f"\n{title:52} {'':10} {'narrowed':>9} {'whole':>7}")
    for name, value in found["seconds"].items():
        narrowed, whole = found["ratio"][name]
        print(f"{name:52} {value:8.3f} s {narrowed:9.2f} {whole:7.2f}", flush=True)
    for key in ("parameters", "trainable", "peak_mb_above_plain", "largest_layer_mb", "spearman"):
        if key in found:
            print(key, found[key])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--rounds", type=int, default=8, help="turns; the fastest of each way counts")
    parser.add_argument("--proportions", nargs="+", default=list(PROPORTIONS), choices=list(PROPORTIONS))
    parser.add_argument("--full", action=argparse.BooleanOptionalAction, default=True, help="full fine-tuning too")
    parser.add_argument(
        "--dense", action=argparse.BooleanOptionalAction, default=True, help="the original's method too"
    )
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    dim = 64 if options.quick else 5120
    result: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "dim": dim,
    }  # fmt: skip
    for name in options.proportions:
        sizes = replace(PROPORTIONS[name], **QUICK) if options.quick else PROPORTIONS[name]
        result[name] = measure(sizes, dim, options.rounds, options.dense)
        show(f"{name}, LoRA", result[name])
        if options.full:
            result[f"{name}, full"] = measure_full(sizes, dim, options.rounds)
            show(f"{name}, full fine-tune", result[f"{name}, full"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
