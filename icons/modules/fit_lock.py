"""Who may train in a folder: one fit at a time, whose ranks all begin from the same."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.utilities import rank_zero_only

from icons.folder_lock import lock_alone, opened

_PATIENCE_S = 10.0  # in which what a killed fit has started (workers that read data) notices that it has gone


@contextmanager
def alone_in(folder: Path, patience_s: float = _PATIENCE_S) -> Iterator[ValueError | None]:
    """Lets no other fit of this machine into `folder` while the block runs, for two would write over each other's
    checkpoints; the first rank sees to it for all. Gives why this one may not be there; None: it may.

    Under MPI, which numbers its ranks only when there is a Trainer, fits are not kept apart.

    Args:
        folder: of the fit.
        patience_s: how long one that is there is waited for.
    """
    with ExitStack() as stack:
        refused = None
        if getattr(rank_zero_only, "rank", 0) == 0 and folder.is_dir() and not MPIEnvironment.detect():
            descriptor = opened(folder)
            stack.callback(os.close, descriptor)
            until = time.monotonic() + patience_s
            while not lock_alone(descriptor):
                if time.monotonic() > until:
                    refused = ValueError(
                        f"--out {folder}: another run is training there; wait until it has ended and run the same line "
                        "again, or give another folder"
                    )
                    break
                time.sleep(0.1)
        yield refused


def others_wait(ranks: int) -> bool:
    """Whether other ranks have been started beside this one, and not by it: they wait until it meets them."""
    return ranks > 1 and _get_rank() is not None


class SameStart(Callback):
    """Has all ranks begin from the same, or none: called when they first meet, with what each has found in the folder.

    Args:
        refused: why the fit may not begin; what rank 0 has found counts, which alone locks the folder.
        last: the checkpoint that it goes on with; None: from the start.
    """

    def __init__(self, refused: ValueError | None, last: Path | None) -> None:
        self.refused, self.last = refused, last

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """
        Raises:
            ValueError: on every rank.
        """
        refused, last = trainer.strategy.broadcast((self.refused, self.last), src=0)
        if refused is not None:
            raise refused
        other = torch.tensor(int(last != self.last), device=trainer.strategy.root_device)
        if int(trainer.strategy.reduce(other, reduce_op="max")):
            raise ValueError(
                f"{trainer.default_root_dir}: has changed while the ranks began (rank 0 goes on with {last}, another "
                "rank does not); run the same line again"
            )
