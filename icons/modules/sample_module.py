"""SampleModule: what all modules have in common that measure something of every sample through `Trainer.predict`."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from icons.batch import Batch, Status, supervised_tokens
from icons.models.fingerprint import adapter_fingerprint, base_description, num_trainable
from icons.modules.sharding import ShardedModule

Fields = dict[str, Tensor]
"""What is measured of each sample, by name."""


class SampleModule(ShardedModule):
    """Measures each sample of a batch as if it were alone, and gives a failed row its place among them.

    Use `Trainer(inference_mode=False, use_distributed_sampler=False)` and `return_predictions=False`. The model is put
    into eval mode: dropout would make a row depend on chance.

    Args:
        model: any Hugging Face causal or image-text model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()

    def on_predict_start(self) -> None:
        """Refuses a Trainer whose gradients would be silent zeros, before anything is computed.

        Raises:
            ValueError: the Trainer runs in inference mode.
        """
        if self.trainer.predict_loop.inference_mode:
            raise ValueError(
                f"{type(self).__name__}: the Trainer runs predict in inference mode, where every gradient is a silent "
                "zero; got Trainer(inference_mode=True), expected Trainer(inference_mode=False)"
            )

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """One entry per row of the batch, failed rows included: a row is never dropped.

        Returns:
            `row [B]` int64, `status [B]` uint8, and what `compute` gives: of a failed row `gradient` and `tokens` are
            0, all else NaN.
        """
        return self.rows_of(batch, self.compute(self.check_supervised(batch)))

    @abstractmethod
    def compute(self, batch: Batch) -> Fields:
        """What is measured of samples that have a supervised token: the fields but `row` and `status`."""

    def check_supervised(self, batch: Batch) -> Batch:
        """The batch, checked to hold only rows with a supervised token (the dataset has failed the others)."""
        empty = batch["row"][supervised_tokens(batch["labels"]) == 0].tolist()
        if empty:
            raise ValueError(
                f"{type(self).__name__}: rows {empty} have no supervised token, so their loss is undefined; expected "
                "at least one label other than -100: leave them out of the batch and name them in failed_row"
            )
        return batch

    def rows_of(self, batch: Batch, fields: dict[str, Tensor]) -> dict[str, Tensor]:
        """Puts the computed samples and the batch's failed rows into one set of rows, each with its status."""
        row, device = batch["row"], fields["loss"].device
        failed_row = batch.get("failed_row", row.new_empty(0)).to(device)
        failed_status = batch.get("failed_status", torch.empty(0, dtype=torch.uint8)).to(device)
        finite = torch.ones(len(row), dtype=torch.bool, device=device)
        for value in fields.values():
            finite &= value.flatten(1).isfinite().all(dim=1) if value.dim() > 1 else value.isfinite()
        status = torch.where(finite, int(Status.DONE), int(Status.NON_FINITE)).to(torch.uint8)
        rows = {"row": torch.cat([row.to(device), failed_row]), "status": torch.cat([status, failed_status])}
        for name, value in fields.items():
            nothing = blank(name)
            value = torch.where(finite.view(-1, *[1] * (value.dim() - 1)), value, nothing)
            rows[name] = torch.cat([value, value.new_full((len(failed_row), *value.shape[1:]), nothing)])
        return rows

    def describe(self) -> dict[str, Any]:
        """The model's part of the manifest."""
        return {
            "model": base_description(self.model),
            "adapter": {"parameters": num_trainable(self.model), "fingerprint": adapter_fingerprint(self.model)},
        }


def blank(field: str) -> float | int:
    """What a failed row holds: zeros where a gradient would be, NaN for what was measured, no token."""
    return 0 if field in ("gradient", "tokens") else float("nan")
