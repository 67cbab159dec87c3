"""What is right on a GPU."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_gradients import IMAGE, moments
from torch import Tensor, nn

from gpu_proof.models import alone, fill_adapter, make_batch, tiny, tiny_base
from gpu_proof.part import CannotRunError, Part, require
from icons.gradients import ProjectedGradients, per_sample_gradients, projected_gradients
from icons.models.folder import ModelFolder
from icons.models.loading import load_model
from icons.models.lora import LoraSettings
from icons.projection import CountSketch

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
