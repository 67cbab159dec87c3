"""Keeps a second fit out of a folder: two would write over each other's checkpoints."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.pytorch.utilities import rank_zero_only

_PATIENCE_S = 10.0  # in which what a killed fit has started (workers that read data) notices that it has gone


@contextmanager
def alone_in(folder: Path, patience_s: float = _PATIENCE_S) -> Iterator[None]:
    """Lets no other fit of this machine into `folder` while the block runs; the first rank sees to it for all.

    Under MPI, which numbers its ranks only when there is a Trainer, fits are not kept apart.

    Args:
        folder: of the fit.
        patience_s: how long one that is there is waited for.

    Raises:
        ValueError: one is still there.
    """
    with ExitStack() as stack:
        if getattr(rank_zero_only, "rank", 0) == 0 and folder.is_dir() and not MPIEnvironment.detect():
            descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            until = time.monotonic() + patience_s
            while not _locked(descriptor):
                if time.monotonic() > until:
                    raise ValueError(
                        f"--out {folder}: another run is training there; wait until it has ended and run the same line "
                        "again, or give another folder"
                    )
                time.sleep(0.1)
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system may lock no folders: there fits are not kept apart
        return True
    return True
