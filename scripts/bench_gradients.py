"""Time and memory of per-sample gradients against a plain forward and backward pass of the same batch.

Usage: OMP_NUM_THREADS=2 .venv/bin/python scripts/bench_gradients.py [--json FILE] [--quick]

The model is a random LLaVA of about 24 M parameters with LoRA on every linear layer of its language model (P = 3.7 M);
batches of 16 rows with 80 to 96 tokens, 64 of them an image. Ways are timed in turns and the fastest turn of each
counts, so that a busy machine disturbs ratios little.
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
from icons.models.llava import Llava
from icons.models.lora import LoraSettings, add_lora
from icons.modules.extractor import GradientExtractor
from icons.modules.gradient_writer import GradientWriter
from icons.preconditioner import AdamPreconditioner
from icons.projection import CountSketch, Projector, Rademacher

IMAGE, IMAGE_TOKENS, TASKS = -200, 64, 10


def bench_model(quick: bool) -> nn.Module:
    torch.manual_seed(0)
    layers, rank, vocabulary = (2, 4, 500) if quick else (12, 64, 28000)
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=688, num_hidden_layers=layers, num_attention_heads=4
    )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8
    )
    llava = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=vocabulary - 1)
    )
    model = add_lora(Llava.of(llava, IMAGE), LoraSettings(rank=rank, alpha=2 * rank))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def bench_batch(seed: int, size: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    length = 96
    ids = torch.randint(3, 400, (size, length), generator=generator)
    ids[:, 4 : 4 + IMAGE_TOKENS] = IMAGE
    tokens = torch.randint(80, length + 1, (size, 1), generator=generator)
    mask = torch.arange(length) < tokens
    labels = ids.masked_fill(~mask, -100)
    labels[:, : IMAGE_TOKENS + 8] = -100
    return {
        "input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels,
        "row": torch.arange(size), "pixel_values": torch.randn(size, 3, 64, 64, generator=generator),
    }  # fmt: skip


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def moments(model: nn.Module, form: Any) -> AdamPreconditioner:
    generator = torch.Generator().manual_seed(1)
    first = {name: 1e-4 * torch.randn(value.shape, generator=generator) for name, value in trainable(model).items()}
    second = {name: 1e-7 * torch.rand(value.shape, generator=generator) for name, value in trainable(model).items()}
    return AdamPreconditioner(first, second, step=100, form=form)


def plain(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """What one training step costs, without its optimizer."""
    model.zero_grad()
    sample_losses(model(**model_inputs(batch), use_cache=False).logits, batch["labels"]).mean().backward()


def fastest(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of `rounds` calls, the ways taking turns after one unmeasured call each."""
    for way in ways.values():
        way()
    found = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            found[name] = min(found[name], time.perf_counter() - begin)
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


def predict_seconds(model: nn.Module, form: Any, dim: int, rows: int) -> float:
    """Seconds per batch of 16 through `Trainer.predict` into a float16 store, the first batch not counted."""
    batches = [bench_batch(seed) | {"row": torch.arange(16 * seed, 16 * seed + 16)} for seed in range(rows // 16)]
    extractor = GradientExtractor(model, CountSketch(dim), moments(model, form))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = GradientWriter(Path(folder) / "bench.zarr", num_rows=rows, dim=dim, chunk_rows=64)
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, inference_mode=False, use_distributed_sampler=False, callbacks=[writer],
        )  # fmt: skip
        loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        projected_gradients(model, batches[0], extractor.projector, extractor.preconditioner)
        begin = time.perf_counter()
        trainer.predict(extractor, loader, return_predictions=False)
        return (time.perf_counter() - begin) / len(batches)


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


def rank_agreement(model: nn.Module, dim: int) -> dict[str, float]:
    """Spearman correlation of projected with exact cosines, 16 training rows against 16 others."""
    train, task = (per_sample_gradients(model, bench_batch(seed)) for seed in (100, 101))
    rows = torch.cat([train, task])
    named = trainable(model)
    pieces = rows.split([value.numel() for value in named.values()], dim=1)
    blocks = {name: piece.reshape(-1, *named[name].shape) for name, piece in zip(named, pieces, strict=True)}

    def cosines(values: Tensor) -> Tensor:
        unit = nn.functional.normalize(values, dim=1)
        return (unit[:16] @ unit[16:].mT).flatten()

    exact = cosines(rows)
    projectors = {"count sketch": CountSketch(dim), "dense signs": Rademacher(dim)}
    return {
        name: float(spearmanr(exact.numpy(), cosines(project(projector, model, blocks)).numpy()).statistic)
        for name, projector in projectors.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--rounds", type=int, default=8, help="turns; the fastest of each way counts")
    parser.add_argument(
        "--dense", action=argparse.BooleanOptionalAction, default=True, help="the original's method too"
    )
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    dim = 64 if options.quick else 5120
    model, batch = bench_model(options.quick), bench_batch(0)
    named = trainable(model)
    sketch, diagonal, adam = CountSketch(dim), moments(model, "diagonal"), moments(model, "adam")
    generator = torch.Generator().manual_seed(2)
    vectors = [{name: torch.randn(v.shape, generator=generator) for name, v in named.items()} for _ in range(TASKS)]
    tasks = TaskMatrix(model, vectors)
    ways: dict[str, Callable[[], Any]] = {
        "plain forward + backward": lambda: plain(model, batch),
        "projected, no preconditioner": lambda: projected_gradients(model, batch, sketch),
        "projected, diagonal": lambda: projected_gradients(model, batch, sketch, diagonal),
        "projected, adam": lambda: projected_gradients(model, batch, sketch, adam),
        "exact scores, 10 tasks, no preconditioner": lambda: scored_gradients(model, batch, tasks),
        "exact scores, 10 tasks, adam": lambda: scored_gradients(model, batch, tasks, adam),
    }
    seconds = fastest(ways, options.rounds)
    for form in ("diagonal", "adam"):
        seconds[f"Trainer.predict into a store, {form}"] = min(predict_seconds(model, form, dim, 128) for _ in range(3))
    if options.dense:
        begin = time.perf_counter()
        one_at_a_time(model, batch, Rademacher(dim))
        seconds["one sample at a time, dense signs (the original)"] = time.perf_counter() - begin
    base = seconds["plain forward + backward"]
    above = {name: peak_bytes(way) for name, way in ways.items()}
    held = max(16 * 4 * value.numel() for value in named.values())
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
        "parameters": sum(value.numel() for value in model.parameters()) - sum(v.numel() for v in named.values()),
        "trainable": sum(value.numel() for value in named.values()), "dim": dim,
        "seconds": seconds, "ratio": {name: value / base for name, value in seconds.items()},
        "peak_mb_above_plain": {name: (v - above["plain forward + backward"]) / 1e6 for name, v in above.items()},
        "largest_layer_mb": held / 1e6,
        "spearman": rank_agreement(model, dim) if options.dense else {},
    }  # fmt: skip
    for name, value in seconds.items():
        print(f"{name:52} {value:8.3f} s  {value / base:7.2f}")
    for key in ("parameters", "trainable", "peak_mb_above_plain", "largest_layer_mb", "spearman"):
        print(key, result[key])
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
