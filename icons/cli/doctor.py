"""`icons doctor`: what this machine has, and a seconds-long self-test of the method's parts."""

import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from icons.batch import sample_losses
from icons.cli.console import results
from icons.cli.options.doctor import DoctorOptions
from icons.gradients import per_sample_gradients, projected_gradients
from icons.projection import CountSketch
from icons.store import GradientStore
from icons.terminal import counted

log = logging.getLogger(__name__)

_PACKAGES = (
    "torch", "lightning", "transformers", "peft", "torchmetrics", "numpy", "zarr", "numcodecs", "jsonargparse",
    "safetensors",
)  # fmt: skip
_OPTIONAL = {
    "flash-attn": "flash",
    "bitsandbytes": "quantize",
    "obstore": "s3",
    "deepspeed": "deepspeed",
    "pyarrow": "table",
}


def doctor(options: DoctorOptions) -> int:
    """Prints versions, accelerator, attention kernels and disk, and runs a self-test on a tiny model."""
    if not options.folder.is_dir():
        raise FileNotFoundError(f"--folder {options.folder}: no such folder; expected the one that stores will lie in")
    table = Table("", "", box=None, show_header=False)
    for name, value in {**_software(), **_hardware(options.folder)}.items():
        table.add_row(name, value)
    results.print(table)
    failed = 0
    for name, check in SELF_TEST.items():
        begun = time.monotonic()
        try:
            problem = check()
        except Exception as error:  # whatever breaks here is the answer the user asked for
            log.debug("where this comes from:", exc_info=True)
            problem = f"{type(error).__name__}: {error}"
        log.debug("%s: %.2f s", name, time.monotonic() - begun)
        failed += problem is not None
        results.print(f"[red]failed[/] {name}: {escape(problem)}" if problem else f"[green]ok[/]     {name}")
    return int(failed > 0)


def _software() -> dict[str, str]:
    """Versions of what the package stands on, and which extras are missing."""
    versions = {"icons": importlib.metadata.version("icons-lightning"), "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    for name, extra in _OPTIONAL.items():
        present = importlib.util.find_spec(name.replace("-", "_")) is not None
        versions[name] = importlib.metadata.version(name) if present else f"not installed (extra `{extra}`)"
    return versions


def _hardware(folder: Path) -> dict[str, str]:
    """Accelerators, processor cores, attention kernels and free disk space."""
    facts = {"cpu": f"{counted(os.cpu_count() or 1, 'core')}, {counted(torch.get_num_threads(), 'thread')}"}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        facts[f"gpu {index}"] = (
            f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute {device.major}.{device.minor}"
        )
    if not torch.cuda.is_available():
        facts["gpu"] = "none: everything runs on the CPU"
    flash = "flash_attention_2, " if importlib.util.find_spec("flash_attn") and torch.cuda.is_available() else ""
    facts["attention"] = f"{flash}sdpa, eager"
    facts["disk"] = f"{shutil.disk_usage(folder).free / 2**30:.0f} GiB free in {folder.resolve()}"
    return facts


def _tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)  # of the self-test's own process; the model is thrown away
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("_proj" in name)
    return model


def _tiny_batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(1, 25).reshape(2, 12)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "row": torch.arange(2)}


def _check_gradients() -> str | None:
    """One batched backward pass against one backward pass per sample."""
    model, batch = _tiny_model(), _tiny_batch()
    batched = per_sample_gradients(model, batch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for sample in range(2):
        ids = batch["input_ids"][sample : sample + 1]
        loss = sample_losses(model(input_ids=ids, use_cache=False).logits, ids).sum()
        alone = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])
        error = float((batched[sample] - alone).norm() / alone.norm())
        if not error < 1e-4:
            return f"sample {sample} differs from its own backward pass by {error:.1e}, expected below 1e-4"
    return None


def _check_projection() -> str | None:
    """Inner products survive the projection."""
    model, batch = _tiny_model(), _tiny_batch()
    gradient = per_sample_gradients(model, batch)
    projected = projected_gradients(model, batch, CountSketch(2048)).gradient
    cosine, kept = (torch.nn.functional.cosine_similarity(rows[0], rows[1], dim=0) for rows in (gradient, projected))
    error = float((cosine - kept).abs())
    return None if error < 0.15 else f"a cosine of {cosine:.3f} became {kept:.3f}"


def _check_store() -> str | None:
    """What is written is what is read."""
    rows = np.arange(24, dtype=np.float32).reshape(4, 6)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "self-test.zarr"
        store = GradientStore.create(path, num_rows=4, dim=6, dtype="float32", chunk_rows=2, manifest={"format": 1})
        one = np.ones(2, np.float32)
        scalars: dict[str, np.ndarray] = {"norm": one, "loss": one, "tokens": one.astype(np.int32)}
        scalars["status"] = one.astype(np.uint8)
        for unit in range(2):
            store.write_unit(unit, {"gradient": rows[2 * unit : 2 * unit + 2], **scalars})
        read = GradientStore.open(path).rows(slice(0, 4))
    return None if np.array_equal(read, rows) else f"got {read.tolist()}, expected {rows.tolist()}"


SELF_TEST: dict[str, Callable[[], str | None]] = {
    "per-sample gradients equal one backward pass per sample": _check_gradients,
    "projection keeps inner products": _check_projection,
    "store returns what was written": _check_store,
}
