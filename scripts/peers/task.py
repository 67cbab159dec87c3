"""The common task as files, read with torch, transformers and peft alone, so that every peer's environment can.

A folder of it holds:

    task/start/                      model folder that every training begins from
    task/{lora,full}/epoch-{1,2,3}/  trained on the whole pool: adapter or model, with `optimizer.pt`
    task/pool.json, TASK.json        records as `icons` reads them, with their kind and whether the answer is wrong
    task/tokens.json                 the same, as `input_ids` and `labels`, so that every tool sees the same tokens
    task/images.pt                   of a task with images: what rows' `image` counts, `[images, 3, height, width]`
    task/{lora,full}/losses.json     each task's loss after training on each subset
    task/settings.json               what it was made with
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RANK, ALPHA = 8, 16
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "pixel_values")
"""What of a batch a model is given, where the batch has it."""
Row = dict[str, Any]
"""`input_ids` and `labels`, lists; `pixel_values` `[1, 3, height, width]` of a row with an image; or, in place of ids
and image, `inputs_embeds` `[length, width]`."""


@dataclass(frozen=True)
class Task:
    """A common task in a folder."""

    folder: Path

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads((self.folder / "settings.json").read_text())

    @property
    def tokens(self) -> dict[str, list[Row]]:
        """`pool` and each task -> rows."""
        rows: dict[str, list[Row]] = json.loads((self.folder / "tokens.json").read_text())
        if (self.folder / "images.pt").exists():
            images = torch.load(self.folder / "images.pt", weights_only=True)
            for row in (row for part in rows.values() for row in part if "image" in row):
                place = row.pop("image")
                row["pixel_values"] = images[place : place + 1]
        return rows

    def stackable(self, model: nn.Module) -> dict[str, list[Row]]:
        """`tokens`, for tools that take one tensor of all rows. With images: the embeddings that the language model is
        given of words and images, both made by what is not trained."""
        tokens = self.tokens
        if (self.folder / "images.pt").exists():
            return {name: [embedded(model, row) for row in part] for name, part in tokens.items()}
        return tokens

    @property
    def names(self) -> list[str]:
        """The tasks."""
        return [name for name in self.tokens if name != "pool"]

    def checkpoint(self, way: str, epoch: int) -> Path:
        return self.folder / way / f"epoch-{epoch}"

    def model(self, way: str, checkpoint: Path | None = None) -> nn.Module:
        """The start with a fresh adapter (`lora`) or as it is (`full`), or a trained checkpoint; in eval mode, what is
        trained with `requires_grad`."""
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        kind: Any = AutoModelForImageTextToText if (self.folder / "images.pt").exists() else AutoModelForCausalLM
        trained = checkpoint if checkpoint is not None and way == "full" else self.folder / "start"
        model: Any = kind.from_pretrained(trained, dtype=torch.float32, attn_implementation="sdpa")
        if way == "lora" and checkpoint is None:
            given = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS} | self.settings.get("adapter", {})
            model = get_peft_model(model, LoraConfig(lora_dropout=0.0, task_type="CAUSAL_LM", **given))
        elif way == "lora":
            model = PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)
        else:
            choose_linear(model)
        model.eval()
        return cast(nn.Module, model)


def choose_linear(model: nn.Module) -> None:
    """Full fine-tuning of the linear layers inside the blocks: what every peer can differentiate."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(f"{target}." in name for target in TARGETS))


def collate(rows: Sequence[Row], pad: int = 0, length: int = 0) -> dict[str, Tensor]:
    """Rows padded on the right, to the longest or to `length`."""
    lengths = [len(row["labels"]) for row in rows]
    longest = max(length, *lengths)

    def padded(name: str, fill: int) -> Tensor:
        return pad_sequence([*map(torch.as_tensor, (row[name] for row in rows))], fill, longest)

    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    inputs = "inputs_embeds" if "inputs_embeds" in rows[0] else "input_ids"
    images = [row["pixel_values"] for row in rows if "pixel_values" in row]
    return {
        inputs: padded(inputs, pad), "labels": padded("labels", -100), "attention_mask": mask.long(),
        "row": torch.arange(len(rows)),
    } | ({"pixel_values": torch.cat(images)} if images else {})  # fmt: skip


def pad_sequence(values: Sequence[Tensor], fill: int, length: int) -> Tensor:
    """`[rows, length, ...]`, filled up on the right."""
    found = torch.full((len(values), length, *values[0].shape[1:]), fill, dtype=values[0].dtype)
    for place, value in enumerate(values):
        found[place, : len(value)] = value
    return found


@torch.no_grad()
def embedded(model: nn.Module, row: Row) -> Row:
    """A row of a model with images, as its language model is given it."""
    caught: list[Tensor] = []
    part = next(module for name, module in model.named_modules() if name.endswith("model.language_model"))
    listening = part.register_forward_pre_hook(
        lambda module, args, given: caught.append(given["inputs_embeds"]), with_kwargs=True
    )
    batch = collate([row])
    model(**{name: batch[name] for name in INPUTS if name in batch})
    listening.remove()
    return {"inputs_embeds": caught[0][0], "labels": row["labels"]}


def batches(rows: Sequence[Row], size: int, order: Sequence[int] | None = None) -> Iterator[dict[str, Tensor]]:
    """Batches in the given order; default: as they are."""
    places = list(range(len(rows))) if order is None else list(order)
    for begin in range(0, len(places), size):
        yield collate([rows[place] for place in places[begin : begin + size]])


def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Each row's mean loss over its supervised tokens."""
    logits = model(**{name: batch[name] for name in INPUTS if name in batch}, use_cache=False).logits
    labels = batch["labels"][:, 1:]
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return each.sum(dim=1) / (labels != -100).sum(dim=1)
