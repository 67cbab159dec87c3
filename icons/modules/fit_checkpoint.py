"""FitCheckpoint: the callback through which an interrupted fit loses minutes at most, and resumes exactly."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from icons.interruption import RESUME, Interruption
from icons.modules.ranks import launched_by, leave, own_signals, release
from icons.output import flush_path, flush_tree, remove

LAST, BEFORE, NEW = "last.ckpt", "before.ckpt", "new.ckpt"


class Interrupted(SystemExit):
    """A signal has come, and the fit is saved: the same command resumes it.

    Attributes:
        status: the exit status.
    """

    def __init__(self, said: str, status: int = RESUME) -> None:
        super().__init__(said)
        self.status = status


class FitCheckpoint(Callback):
    """Saves `folder/last.ckpt` every few minutes, and on SIGTERM or SIGUSR1 before stopping.

    Only between optimizer steps, so that nothing accumulated is lost. Before each batch, the generators that dropout
    draws from are set from (seed, rank, batch): a fit that was stopped and resumed takes the same steps, bit for bit,
    as one that was not, given a data loader that remembers its place.

    Args:
        folder: where `last.ckpt` is kept, and the one before it as `before.ckpt`.
        minutes: between two checkpoints.
        seed: of dropout.

    Raises:
        Interrupted: from `Trainer.fit`, after a signal, with the fit saved.
    """

    def __init__(self, folder: Path, minutes: float = 15.0, seed: int = 0) -> None:
        self.folder, self.path = folder, folder / LAST
        self.minutes = minutes
        self.seed = seed
        self.saved_at = 0.0
        self.interruption = Interruption(lambda: None)
        self.loader_state: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        own_signals(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        loader: Any = trainer.train_dataloader
        if hasattr(loader, "state_dict"):
            checkpoint["train_dataloader"] = loader.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.loader_state = checkpoint.get("train_dataloader")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_at = time.monotonic()
        if self.loader_state is not None:
            # Lightning does so too, unless the loader was made early, as for `estimated_stepping_batches`
            trainer.train_dataloader.load_state_dict(self.loader_state)  # type: ignore[union-attr]
        self.interruption.watch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        position = (trainer.current_epoch << 32) + batch_idx
        torch.manual_seed((self.seed * 1_000_003 + trainer.global_rank * 1_009 + position) % 2**63)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        long_ago = trainer.is_global_zero and time.monotonic() - self.saved_at > 60 * self.minutes
        status, due = self.any_rank(trainer, self.interruption.status or 0, long_ago)
        if status or due:
            self.save(trainer)
            self.saved_at = time.monotonic()
        if status:
            release(launched_by(trainer.strategy))
            raise Interrupted(f"stopped by a signal; saved {self.path}", status)

    def save(self, trainer: Trainer) -> None:
        """Saves beside `last.ckpt`, and gives the checkpoint its name once it is whole and durable."""
        if trainer.is_global_zero:
            remove(self.folder / NEW)
        trainer.strategy.barrier()
        trainer.save_checkpoint(self.folder / NEW)
        if trainer.is_global_zero:
            flush_tree(self.folder / NEW)
            if self.path.exists():
                remove(self.folder / BEFORE)
                self.path.replace(self.folder / BEFORE)
            (self.folder / NEW).replace(self.path)
            flush_path(self.folder)

    @staticmethod
    def any_rank(trainer: Trainer, *values: int) -> list[int]:
        """Of each value the highest of all ranks."""
        if trainer.world_size == 1:
            return list(values)
        own = torch.tensor(values, dtype=torch.int64, device=trainer.strategy.root_device)
        return [int(value) for value in trainer.strategy.reduce(own, reduce_op="max").tolist()]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interruption.give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.interruption.give_back()
        leave(launched_by(trainer.strategy))


def checkpoint_of(folder: Path, say: Callable[[str], None], check: Callable[[Path], None]) -> Path | None:
    """The newest checkpoint that can be read; says so of one that cannot. None: there is none.

    Args:
        folder: of the fit.
        say: called with what the user should know.
        check: raises ValueError for a checkpoint that cannot be read.

    Raises:
        ValueError: there are some, and none can be read: the newest one's error.
    """
    files = [file for file in (folder / LAST, folder / BEFORE) if file.exists()]
    errors: list[ValueError] = []
    for file in files:
        try:
            if file.is_file() and file.stat().st_size == 0:
                raise ValueError(f"{file}: cannot be read as the checkpoint of a fit (it is empty)")
            check(file)
        except ValueError as error:
            errors.append(error)
            continue
        except OSError as error:  # torch's word for half a file
            errors.append(ValueError(f"{file}: cannot be read as the checkpoint of a fit ({error.strerror})"))
            continue
        for failure in errors:
            say(f"{failure}; taking {file.name}, the checkpoint before it")
        return file
    if errors:
        raise errors[0]
    return None
