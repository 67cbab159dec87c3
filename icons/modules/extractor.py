"""GradientExtractor: the predict step that turns batches of conversations into rows of the gradient store."""

import hashlib
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from icons.batch import Batch, Status, supervised_tokens
from icons.gradients import projected_gradients
from icons.preconditioner import Preconditioner
from icons.projection import Projector

SAMPLED_VALUES = 1024
Fields = dict[str, Tensor]  # what is measured of each sample, by name


class GradientExtractor(LightningModule):
    """Projected per-sample gradients of a model's trainable parameters, through `Trainer.predict`.

    Use `Trainer(inference_mode=False, use_distributed_sampler=False)` and `return_predictions=False`, with a
    `GradientWriter` among the callbacks. The model is put into eval mode: dropout would make a row depend on chance.

    Args:
        model: any Hugging Face causal or image-text model; the parameters with `requires_grad` are differentiated.
        projector: maps the gradient to K numbers; the same map for training and validation rows.
        preconditioner: turns the gradient into an optimizer's step (training side); None leaves it as it is
            (validation side).

    Source: arXiv 2501.00654, section 3 (stage 1); LESS, arXiv 2402.04333, section 3.2.
    """

    def __init__(self, model: nn.Module, projector: Projector, preconditioner: Preconditioner | None = None) -> None:
        super().__init__()
        self.model = model.eval()
        self.projector = projector
        self.preconditioner = preconditioner

    def on_predict_start(self) -> None:
        """Refuses a Trainer whose gradients would be silent zeros, before anything is computed.

        Raises:
            ValueError: the Trainer runs in inference mode.
        """
        if self.trainer.predict_loop.inference_mode:
            raise ValueError(
                "GradientExtractor: the Trainer runs predict in inference mode, where every gradient is a silent zero; "
                "got Trainer(inference_mode=True), expected Trainer(inference_mode=False)"
            )

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """One entry per row of the batch, failed rows included: a row is never dropped.

        Returns:
            `row [B]` int64, `status [B]` uint8, `gradient [B, K]` float32 (0 for a failed row), `norm [B]` and
            `loss [B]` float32 (NaN for a failed row), `tokens [B]` int32.
        """
        return self.rows_of(batch, self.compute(self.answerable(batch)))

    def compute(self, batch: Batch) -> Fields:
        """What this extractor measures of samples that can be differentiated: the fields but `row` and `status`."""
        found = projected_gradients(self.model, batch, self.projector, self.preconditioner)
        return {"gradient": found.gradient, "norm": found.norm, "loss": found.loss, "tokens": found.tokens.int()}

    def answerable(self, batch: Batch) -> Batch:
        """The batch, checked to hold only rows with a supervised token (the dataset has failed the others)."""
        empty = batch["row"][supervised_tokens(batch["labels"]) == 0].tolist()
        if empty:
            raise ValueError(
                f"GradientExtractor: rows {empty} have no supervised token, so their loss is undefined; expected at "
                "least one label other than -100: leave them out of the batch and name them in failed_row"
            )
        return batch

    def rows_of(self, batch: Batch, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Puts the computed samples and the batch's failed rows into one set of rows, each with its status."""
        row, device = batch["row"], found["loss"].device
        failed_row = batch.get("failed_row", row.new_empty(0)).to(device)
        failed_status = batch.get("failed_status", torch.empty(0, dtype=torch.uint8)).to(device)
        finite = torch.ones(len(row), dtype=torch.bool, device=device)
        for value in found.values():
            finite &= value.flatten(1).isfinite().all(dim=1) if value.dim() > 1 else value.isfinite()
        status = torch.where(finite, int(Status.DONE), int(Status.NON_FINITE)).to(torch.uint8)
        rows = {"row": torch.cat([row.to(device), failed_row]), "status": torch.cat([status, failed_status])}
        for name, value in found.items():
            nothing = blank(name)
            value = torch.where(finite.view(-1, *[1] * (value.dim() - 1)), value, nothing)
            rows[name] = torch.cat([value, value.new_full((len(failed_row), *value.shape[1:]), nothing)])
        return rows

    def describe(self) -> dict[str, Any]:
        """This extractor's part of the manifest: what must agree for two stores to be combined."""
        return {
            "model": {"class": type(self.model).__name__, "fingerprint": base_fingerprint(self.model)},
            "adapter": {"parameters": num_trainable(self.model), "fingerprint": adapter_fingerprint(self.model)},
            "projector": self.projector.describe(),
            "preconditioner": {"form": "none"} if self.preconditioner is None else self.preconditioner.describe(),
        }


def blank(field: str) -> float | int:
    """What a failed row holds: zeros where a gradient would be, NaN for what was measured, no token."""
    return 0 if field in ("gradient", "tokens") else float("nan")


def num_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapter_fingerprint(model: nn.Module) -> str:
    """SHA-256 (16 hex digits) over names, shapes and all values of the trainable parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(as_bytes(parameter.detach().float()))
    return digest.hexdigest()[:16]


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 (16 hex digits) over names, shapes, dtypes and up to 1,024 evenly spaced values of each frozen tensor.

    A sample, since hashing 7 billion numbers would take longer than it is worth; a fine-tuned base differs in nearly
    every value.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
            values = parameter.detach().flatten()
            digest.update(as_bytes(values[:: max(1, len(values) // SAMPLED_VALUES)][:SAMPLED_VALUES]))
    return digest.hexdigest()[:16]


def as_bytes(values: Tensor) -> bytes:
    return values.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
