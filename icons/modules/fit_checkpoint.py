"""FitCheckpoint: the callback through which an interrupted fit loses minutes at most, and resumes exactly."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from icons.modules.interruption import Interruption

LAST = "last.ckpt"


class Interrupted(SystemExit):
    """SIGTERM has come, and the fit is saved: the same command resumes it."""


class FitCheckpoint(Callback):
    """Saves `folder/last.ckpt` every few minutes, and on SIGTERM before stopping.

    Only between optimizer steps, so that nothing accumulated is lost. Before each batch, the generators that dropout
    draws from are set from (seed, rank, batch): a fit that was stopped and resumed takes the same steps, bit for bit,
    as one that was not, given a data loader that remembers its place.

    Args:
        folder: where `last.ckpt` is kept.
        minutes: between two checkpoints.
        seed: of dropout.

    Raises:
        Interrupted: from `Trainer.fit`, after SIGTERM, with the fit saved.
    """

    def __init__(self, folder: Path, minutes: float = 15.0, seed: int = 0) -> None:
        self.path = folder / LAST
        self.minutes = minutes
        self.seed = seed
        self.saved_at = 0.0
        self.stop = False
        self.interruption = Interruption(self.ask_to_stop)
        self.place: Any = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        loader: Any = trainer.train_dataloader
        if hasattr(loader, "state_dict"):
            checkpoint["train_dataloader"] = loader.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.place = checkpoint.get("train_dataloader")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_at = time.monotonic()
        if self.place is not None:
            # Lightning does so too, unless the loader was made early, as for `estimated_stepping_batches`
            trainer.train_dataloader.load_state_dict(self.place)  # type: ignore[union-attr]
        self.interruption.watch()

    def ask_to_stop(self) -> None:
        self.stop = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        position = (trainer.current_epoch << 32) + batch_idx
        torch.manual_seed((self.seed * 1_000_003 + trainer.global_rank * 1_009 + position) % 2**63)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        due = trainer.is_global_zero and time.monotonic() - self.saved_at > 60 * self.minutes
        stop, due = self.any_rank(trainer, self.stop, due)
        if stop or due:
            trainer.save_checkpoint(self.path)
            self.saved_at = time.monotonic()
        if stop:
            raise Interrupted(f"stopped by SIGTERM; saved {self.path}")

    @staticmethod
    def any_rank(trainer: Trainer, *flags: bool) -> list[bool]:
        """Each flag, true if it is on any rank."""
        if trainer.world_size == 1:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.float32, device=trainer.strategy.root_device)
        return [count > 0 for count in trainer.strategy.reduce(counts, reduce_op="sum").tolist()]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interruption.give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.interruption.give_back()
