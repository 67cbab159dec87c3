"""FailedRows: the callback that counts the rows a fit could not read, and ends it where they are too many."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from icons.batch import Status
from icons.store.failures import Failure, failures_in, kinds, shortened, told

_EVERY, _SENTENCES = 16, 1000


class FailedRows(Callback):
    """Counts failed rows in the first pass over the data, on all ranks together, and keeps why they failed.

    A fit would else train on what is left, be it nothing: a wrong image folder leaves only a loss of 0.

    Args:
        num_rows: rows that are trained on.
        most: share of them that may fail.

    Raises:
        ValueError: from `Trainer.fit`, on every rank: more have failed. Looked at every 16 batches.
    """

    def __init__(self, num_rows: int, most: float) -> None:
        if not 0 <= most <= 1:
            raise ValueError(f"--max-failed {most}: expected a share of the rows, from 0 to 1")
        self.num_rows, self.most = num_rows, most
        self.failures: dict[int, Failure] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0:
            for failure in failures_in(batch):
                kept = shortened(failure) if len(self.failures) < _SENTENCES else failure._replace(id="", reason="")
                self.failures.setdefault(failure.row, kept)
            if (batch_idx + 1) % _EVERY == 0 or trainer.is_last_batch:
                self.check(trainer)

    def check(self, trainer: Trainer) -> None:
        """Raises if too many have failed."""
        failed = gathered(trainer, self.failures)
        if len(failed) > self.most * self.num_rows:
            first = failed[min(failed)]
            raise ValueError(
                f"{len(failed):,} of {self.num_rows:,} rows could not be read, more than --max-failed {self.most:g} of "
                f"them; the first, {first}; mend the cause, or allow more"
            )

    def describe(self, trainer: Trainer) -> dict[str, Any]:
        """What the manifest keeps: the number of failed rows, and why, by kind. To be called on every rank."""
        failed = gathered(trainer, self.failures)
        ordered = [failed[row] for row in sorted(failed)]
        reasons = [
            {"status": kind.status.name.lower(), "rows": kind.count, "examples": [str(one) for one in kind.examples]}
            for kind in kinds(ordered)
        ]
        return {"rows": len(failed), "kinds": reasons}

    def lines(self, trainer: Trainer) -> list[str]:
        """The same as lines of text. To be called on every rank."""
        failed = gathered(trainer, self.failures)
        return list(told(failed[row] for row in sorted(failed)))

    def state_dict(self) -> dict[str, Any]:
        return {"failures": [[one.row, one.id, int(one.status), one.reason] for one in self.failures.values()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for row, name, status, reason in state_dict["failures"]:
            self.failures[row] = Failure(row, name, Status(status), reason)


def gathered(trainer: Trainer, own: dict[int, Failure]) -> dict[int, Failure]:
    """The failures of all ranks."""
    if trainer.world_size == 1:
        return own
    parts: list[dict[int, Failure] | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, own)
    return {row: failure for part in parts for row, failure in (part or {}).items()}
