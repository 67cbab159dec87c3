"""`icons export`: the fine-tuned model as one folder, for evaluation."""

from pathlib import Path
from typing import Literal

from rich.console import Console

from icons.models.export.folder import export_model
from icons.models.folder import ModelFolder
from icons.models.warmup_folder import open_warmup

console = Console()


def export(
    out: Path,
    checkpoint: Path | None = None,
    model: Path | None = None,
    vision_tower: Path | None = None,
    mm_projector: Path | None = None,
    adapter: Path | None = None,
    format: Literal["huggingface", "llava"] = "huggingface",
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored",
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> int:
    """Merges the adapter into the model and writes it as one folder.

    Args:
        out: a new folder; for LLaVA's own scripts its name must contain `llava`.
        checkpoint: folder of a warm-up or a fine-tune; in its place --model and --adapter name the parts.
        model: Hugging Face folder, or an original LLaVA base folder (with --vision-tower and --mm-projector).
        vision_tower: CLIP folder of an original LLaVA model.
        mm_projector: mm_projector.bin of an original LLaVA model.
        adapter: LoRA adapter folder; without, the base model is written as it is.
        format: huggingface, for transformers, vLLM and lmms-eval; llava, for LLaVA's own evaluation scripts.
        dtype: of the written weights; stored: as in the base model.
        trust_remote_code: run code that comes with the model folder.
        overwrite: write --out even if something lies there that is no former export; its weights are replaced.
    """
    if (checkpoint is None) == (model is None):
        got = "neither" if model is None else "both"
        raise ValueError(f"model: got {got} of --checkpoint and --model; give one: a warm-up folder, or the parts")
    if checkpoint is not None:
        for option, value in (
            ("--adapter", adapter), ("--vision-tower", vision_tower), ("--mm-projector", mm_projector)
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"{option} {value}: the folder {checkpoint} names its own; leave the option out")
        warmup = open_warmup(checkpoint)
        folder, adapter = warmup.model_folder, warmup.adapter
    else:
        assert model is not None
        folder = ModelFolder.open(model, vision_tower=vision_tower, mm_projector=mm_projector, adapter=adapter)
    export_model(folder, adapter, out, format, dtype, trust_remote_code, overwrite)
    said = f"{out}: {'LLaVA' if format == 'llava' else 'Hugging Face'} layout"
    console.print(said, markup=False, soft_wrap=True)
    if format == "llava" and "llava" not in out.resolve().name.lower():
        said = f"LLaVA's scripts load a folder as LLaVA by its name; rename {out.name} to llava-..."
        console.print(said, style="yellow", markup=False, soft_wrap=True)
    return 0
