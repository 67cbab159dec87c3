"""The warm-up folder: adapter in PEFT's form, what else was trained, Adam's moments by name, and what led to them.

| file | holds |
|---|---|
| `adapter_config.json`, `adapter_model.safetensors` | the LoRA adapter, as `peft.PeftModel.from_pretrained` reads it |
| `non_lora.safetensors` | what else was trained (LLaVA's projector), by parameter name |
| `adam.safetensors` | `exp_avg/<name>`, `exp_avg_sq/<name>`; step, betas and eps in the metadata |
| `icons.json` | model folder, preprocessing, data, settings, losses before and after; written last |
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import msgspec
from peft import PeftModel
from torch import Tensor, nn

from icons.manifest import Manifest
from icons.models.folder import ModelFolder
from icons.models.tensor_files import write_tensors
from icons.output import is_marked, put, read_object

MANIFEST = "icons.json"
_FORMAT = 1
_ADAPTER, _NON_LORA, _ADAM = "adapter_model.safetensors", "non_lora.safetensors", "adam.safetensors"
PARTS = ("model", "vision_tower", "mm_projector", "tower_adapter")


@dataclass(frozen=True)
class Trained:
    """The trained parameters and AdamW's state, on the CPU, by the parameter's name in the model.

    Under DeepSpeed the moments are empty: they are in its own checkpoint, which `load_adam_state` reads.
    """

    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    step: int
    betas: tuple[float, float]
    eps: float


class Measured(msgspec.Struct, frozen=True):
    """Task -> what was measured before and after the fit; empty where nothing was."""

    before: dict[str, float] = {}
    after: dict[str, float] = {}


class WarmupManifest(Manifest, frozen=True, kw_only=True):
    """What the manifest of a warm-up folder states."""

    format: int = _FORMAT
    model_folder: dict[str, Any] = {}
    model_fingerprint: str = ""
    beside: dict[str, str] = {}
    preprocessing: dict[str, Any] = {}
    losses: Measured = Measured()
    accuracy: Measured = Measured()


@dataclass(frozen=True)
class WarmupFolder:
    """An opened warm-up folder; `facts` is what this version reads of its `manifest`."""

    model_folder: ModelFolder
    adapter: Path
    manifest: dict[str, Any]

    @property
    def facts(self) -> WarmupManifest:
        return WarmupManifest.read(self.manifest, self.adapter)


def save_warmup(
    folder: Path, model: nn.Module, trained: Trained, model_folder: ModelFolder, manifest: Mapping[str, Any]
) -> None:
    """Writes a warm-up folder; `icons.json` last, so that a folder with it is whole.

    Args:
        folder: made if needed; files of a former warm-up are replaced.
        model: the PEFT model that was trained; its adapter's settings are saved, its weights come from `trained`.
        trained: weights and moments by name, see `icons.modules.moments.gather`.
        model_folder: the base model.
        manifest: further facts, JSON: preprocessing, data, lora, losses, versions.
    """
    assert isinstance(model, PeftModel), "a warm-up trains an adapter"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    config = model.peft_config["default"]
    values = config.to_dict() | {"inference_mode": True, "base_model_name_or_path": str(model_folder.model.resolve())}
    put(folder / "adapter_config.json", json.dumps(values, indent=2, sort_keys=True, default=plain) + "\n")
    lora = {name.replace(".default.", "."): value for name, value in trained.weights.items() if "lora_" in name}
    rest = {name: value for name, value in trained.weights.items() if "lora_" not in name}
    _write_tensors(folder / _ADAPTER, lora, {"format": "pt"})
    _write_tensors(folder / _NON_LORA, rest, {"format": "pt"})
    moments = {f"exp_avg/{name}": value for name, value in trained.exp_avg.items()}
    moments |= {f"exp_avg_sq/{name}": value for name, value in trained.exp_avg_sq.items()}
    settings = {"step": str(trained.step), "betas": json.dumps(list(trained.betas)), "eps": repr(trained.eps)}
    _write_tensors(folder / _ADAM, moments, settings)  # no file under DeepSpeed: they are in its own checkpoint
    described = model_folder.as_dict()
    beside = {name: os.path.relpath(described[name], folder.resolve()) for name in PARTS if described[name] is not None}
    content = {
        "format": _FORMAT,
        "model_folder": described,
        "model_fingerprint": model_folder.fingerprint(),
        "beside": beside,
    }
    put(folder / MANIFEST, json.dumps(content | dict(manifest), indent=2, default=plain) + "\n")


def is_warmup(folder: Path) -> bool:
    """Whether a folder is a warm-up's, finished or not."""
    return is_marked(folder, "warmup") or "model_folder" in read_object(folder / MANIFEST)


def open_warmup(folder: Path | str) -> WarmupFolder:
    """Opens a warm-up folder, and finds the base model: where it was, or in the same place relative to this folder.

    Raises:
        FileNotFoundError: it is no (finished) warm-up folder, or the base model is not there any more.
        ValueError: the base model is not the one that the warm-up started from; or a later version wrote the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected what `icons warmup --out` wrote")
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder}: no finished warm-up here ({MANIFEST} is missing); expected what `icons warmup --out` wrote: "
            "run the same warm-up again, it resumes"
        )
    manifest = json.loads((folder / MANIFEST).read_text())
    facts = WarmupManifest.read(manifest, folder)
    if facts.format != _FORMAT:
        raise ValueError(f"{folder}: has format {facts.format}; expected {_FORMAT}: read it with a newer version")
    model_folder = ModelFolder.from_dict(facts.model_folder)
    for name, relative in facts.beside.items():
        if not getattr(model_folder, name).exists():
            moved = (folder / relative).resolve()
            if not moved.exists():
                raise FileNotFoundError(
                    f"{folder}: its base model ({name}) was {getattr(model_folder, name)}, which is gone, and is not "
                    f"at {moved} either; put it back, or give the parts: --model, --adapter {folder}"
                )
            model_folder = replace(model_folder, **cast(dict[str, Any], {name: moved}))
    now, then = model_folder.fingerprint(), facts.model_fingerprint
    if now != then:
        raise ValueError(
            f"{folder}: was trained on a base model with fingerprint {then}; {model_folder.model} has {now}: expected "
            "the same files"
        )
    return WarmupFolder(model_folder, folder, manifest)


def _write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Replaces `file`; without tensors there is none afterwards."""
    file.unlink(missing_ok=True)
    if tensors:
        write_tensors(file, tensors, metadata)


def plain(value: Any) -> Any:
    """JSON for what is nearly JSON: sets in order, enumerations and paths as text."""
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))
