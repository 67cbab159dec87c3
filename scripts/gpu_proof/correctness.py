"""What is right on a GPU."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_gradients import IMAGE, moments
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gpu_proof.models import alone, fill_adapter, make_batch, tiny, tiny_base
from gpu_proof.part import CannotRunError, Part, require
from icons.gradients import ProjectedGradients, per_sample_gradients, projected_gradients
from icons.gradients.projected_rows import ProjectedRows
from icons.models.folder import ModelFolder
from icons.models.loading import load_model
from icons.models.lora import LoraSettings
from icons.modules.extractor import GradientExtractor
from icons.modules.gradient_writer import GradientWriter
from icons.modules.shared_model_strategy import SharedModelStrategy
from icons.preconditioner import AdamPreconditioner
from icons.projection import CountSketch
from icons.store import GradientStore

HALVES = torch.bfloat16, torch.float16
CPU = torch.device("cpu")


class Correctness:
    """A tiny model on the device against the same on the CPU, where one plain backward pass per sample is the truth."""

    def __init__(self, small: bool) -> None:
        self.small, self.device = small, torch.device("cpu" if small else "cuda")
        self.rows, self.length, self.dim = (2, 80, 64) if small else (8, 96, 5120)

    def parts(self) -> dict[str, Callable[[], Part]]:
        precisions = {
            f"gradients in {str(each)[6:]}": partial(self.precision, each) for each in (torch.float32, *HALVES)
        }
        return precisions | {
            "gradients in bfloat16, adapter in TF32": partial(self.precision, torch.bfloat16, tf32=True),
            "count sketch, bit for bit": self.sketch,
            "two runs, bit for bit": self.twice,
            "flash-attention": self.flash,
            "4-bit base weights": self.four_bit,
            "fused kernel": self.fused,
            "sharded by NCCL, one rank": self.sharded,
        }

    def batch(self, model: Any, device: torch.device) -> dict[str, Tensor]:
        return make_batch(model, self.rows, self.length, device)

    def precision(self, dtype: torch.dtype, tf32: bool = False) -> Part:
        """Half precisions may be twice as far from the float32 gradient as the CPU's are."""
        model = tiny(CPU)
        batch = self.batch(model, CPU)
        truth = alone(model, batch)
        with matmul_precision("high" if tf32 else "highest"):
            found = self.error(tiny(self.device, dtype), truth)
        if dtype not in HALVES:
            return Part({"error": found}, {"error": 1e-4})
        on_cpu = error(per_sample_gradients(tiny(CPU, dtype), batch), truth)
        return Part({"error": found, "error on the CPU": on_cpu}, {"error": 2 * on_cpu})

    def error(self, model: nn.Module, truth: Tensor) -> float:
        return error(per_sample_gradients(model, self.batch(model, self.device)), truth)

    def sketch(self) -> Part:
        """Whole numbers, whose sums are exact in any order; shapes are those of LoRA on a 7B model."""
        different = 0
        for shape in [(4, 96), (96, 4)] if self.small else [(128, 4096), (4096, 128), (128, 11008), (11008, 128)]:
            block = torch.randint(-8, 9, (2, *shape), generator=torch.Generator().manual_seed(0)).float()
            found = []
            for device in (torch.device("cpu"), self.device):
                projector, layout = CountSketch(self.dim), {"w": torch.Size(shape)}
                total = projector.start(2, layout, device)
                projector.add(total, "w", block.to(device) * projector.sign("w", layout["w"], device))
                found.append(total.cpu())
            different += int((found[0] != found[1]).sum())
        return Part({"different": different}, {"different": 0})

    def twice(self) -> Part:
        """The same model made and run twice, in each precision, with Adam's moments."""
        figures = {}
        for dtype in (torch.float32, *HALVES):
            runs = []
            for _ in range(2):
                model = tiny(self.device, dtype)
                batch, adam = self.batch(model, self.device), moments(model, "adam")
                runs.append(projected_gradients(model, batch, CountSketch(self.dim), adam))
            figures[f"different in {str(dtype)[6:]}"] = float(other_bits(*runs))
        return Part(figures, dict.fromkeys(figures, 0.0))

    def fused(self) -> Part:
        """Against the steps that it fuses, on blocks of the shapes that LoRA has on a 7B model."""
        if self.small:
            raise CannotRunError("the fused kernel is for a GPU")
        figures = {}
        for form in ("none", "diagonal", "adam"):
            worst = 0.0
            for shape in [(128, 4096), (4096, 128), (128, 11008), (11008, 128), (4096,)]:
                block = torch.randn(11, *shape, device=self.device) * 1e-3
                first, second = torch.randn_like(block[0]) * 1e-4, torch.rand_like(block[0]) * 1e-6
                state = None if form == "none" else AdamPreconditioner({"w": first}, {"w": second}, step=50, form=form)
                shapes = {"w": torch.Size(shape)}
                ways = [ProjectedRows(11, shapes, self.device, CountSketch(self.dim), state) for _ in range(2)]
                ways[1].fused = None
                for way in ways:
                    way.receive("w", block.clone(), slice(0, 11))
                apart = (ways[0].total - ways[1].total).norm(dim=1), (ways[0].norm() - ways[1].norm()).abs()
                worst = max(worst, float((torch.maximum(*apart) / ways[1].norm()).max()))
            figures[f"error, {form}"] = worst
        return Part(figures, dict.fromkeys(figures, 1e-6))

    def sharded(self) -> Part:
        """Under FSDP2 of NCCL, with one rank, against the same model whole."""
        if self.small:
            raise CannotRunError("NCCL is for GPUs; on CPUs the tests shard by gloo, over several ranks")
        batches = [make_batch(tiny(CPU), self.rows, self.length, CPU, seed) for seed in range(3)]
        stores = []
        with tempfile.TemporaryDirectory() as folder:
            for strategy in ("auto", SharedModelStrategy()):
                path = Path(folder) / f"{len(stores)}.zarr"
                writer = GradientWriter(path, num_rows=3 * self.rows, dim=self.dim, chunk_rows=self.rows)
                trainer = Trainer(
                    accelerator="gpu", devices=1, strategy=strategy, logger=False, enable_progress_bar=False,
                    enable_checkpointing=False, enable_model_summary=False, inference_mode=False,
                    use_distributed_sampler=False, callbacks=[writer],
                )  # fmt: skip
                loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type, var-annotated]
                model = tiny(CPU, torch.bfloat16)
                trainer.predict(GradientExtractor(model, CountSketch(self.dim)), loader, return_predictions=False)
                stores.append(GradientStore.open(path))
            rows = [store.rows(slice(None)) for store in stores]
        figures = {"different": float((rows[0] != rows[1]).sum()), "all zero": float(not rows[0].any())}
        return Part(figures, {"different": 0, "all zero": 0})

    def flash(self) -> Part:
        """May be twice as far from the float32 gradient as sdpa is."""
        require("flash_attn", "flash")
        if self.small:
            raise CannotRunError("flash-attention has no kernels for a CPU")
        model, figures = tiny(CPU), {}
        truth = alone(model, self.batch(model, CPU))
        model = tiny(self.device, torch.bfloat16)
        for kernel in ("sdpa", "flash_attention_2"):
            model.get_base_model().set_attn_implementation(kernel)
            figures[f"error of {kernel}"] = self.error(model, truth)
        return Part(figures, {"error of flash_attention_2": 2 * figures["error of sdpa"]})

    def four_bit(self) -> Part:
        """Against one plain backward pass per sample of the same 4-bit model."""
        require("bitsandbytes", "quantize")
        if self.small:
            raise CannotRunError(
                "on a CPU bitsandbytes packs weights in eval mode, and their kernel has no backward pass"
            )
        with tempfile.TemporaryDirectory() as folder:
            tiny_base().save_pretrained(folder)
            lora = LoraSettings(rank=4, alpha=8.0)
            model: Any = load_model(ModelFolder.open(Path(folder)), dtype="float32", quantize="4bit", lora=lora)
        model.image_token = model.get_base_model().image_token = IMAGE
        fill_adapter(model)
        model = model.to(self.device).eval()
        layers = [
            name for name, module in model.named_modules() if type(module).__module__ == "bitsandbytes.nn.modules"
        ]
        outside = sum("language_model.layers" not in name for name in layers)
        found = self.error(model, alone(model, self.batch(model, self.device)))
        figures = {"error": found, "layers": len(layers), "none": float(not layers), "outside language model": outside}
        return Part(figures, {"error": 1e-3, "none": 0, "outside language model": 0})


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """How float32 matrices are multiplied: "highest" in float32, "high" in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def error(found: Tensor, truth: Tensor) -> float:
    """The largest relative error of a row."""
    truth = truth.to(found)
    return float(((found - truth).norm(dim=1) / truth.norm(dim=1)).max())


def other_bits(one: ProjectedGradients, two: ProjectedGradients) -> int:
    """Values that differ in any bit."""
    pairs = ((one.gradient, two.gradient), (one.norm, two.norm), (one.loss, two.loss))
    return sum(int((left.view(torch.int32) != right.view(torch.int32)).sum()) for left, right in pairs)
