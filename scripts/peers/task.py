"""The common task as files, read with torch, transformers and peft alone, so that every peer's environment can.

A folder of it holds:

    task/start/                      model folder that every training begins from
    task/{lora,full}/epoch-{1,2,3}/  trained on the whole pool: adapter or model, with `optimizer.pt`
    task/pool.json, TASK.json        records as `icons` reads them, with their kind and whether the answer is wrong
    task/tokens.json                 the same, as `input_ids` and `labels`, so that every tool sees the same tokens
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
Row = dict[str, list[int]]


@dataclass(frozen=True)
class Task:
    """A common task in a folder."""

    folder: Path

    @property
    def settings(self) -> dict[str, Any]:
        return json.loads((self.folder / "settings.json").read_text())

    @property
    def tokens(self) -> dict[str, list[Row]]:
        """`pool` and each task -> rows of `input_ids` and `labels`."""
        return json.loads((self.folder / "tokens.json").read_text())

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
        from transformers import AutoModelForCausalLM

        trained = checkpoint if checkpoint is not None and way == "full" else self.folder / "start"
        model: Any = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32, attn_implementation="sdpa")
        if way == "lora" and checkpoint is None:
            config = LoraConfig(
                r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
            )
            model = get_peft_model(model, config)
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


def collate(rows: Sequence[Row], pad: int = 0) -> dict[str, Tensor]:
    """Rows padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows])
    return {
        "input_ids": padded("input_ids", pad), "labels": padded("labels", -100), "attention_mask": mask,
        "row": torch.arange(len(rows)),
    }  # fmt: skip


def batches(rows: Sequence[Row], size: int, order: Sequence[int] | None = None) -> Iterator[dict[str, Tensor]]:
    """Batches in the given order; default: as they are."""
    places = list(range(len(rows))) if order is None else list(order)
    for begin in range(0, len(places), size):
        yield collate([rows[place] for place in places[begin : begin + size]])


def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Each row's mean loss over its supervised tokens."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return each.sum(dim=1) / (labels != -100).sum(dim=1)
