"""Sums over parts of the rows, in files of their own beside a file of Kronecker factors, until all are there."""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from icons.folder_lock import in_turn, lock_alone, opened
from icons.gradients.covariances import CovarianceSums
from icons.models.tensor_files import write_tensors
from icons.output import MARK, is_empty, is_marked, mark, read_object, sweep_partials

COMMAND = "factors"


class FactorParts:
    """The folder `FILE.parts`: a file per part, written whole or not at all. Runs of one machine that do not know of
    each other (shards, or the same line twice) may fill it together, and the last one to end takes it away; one of
    other settings is kept out meanwhile.

    Args:
        file: of the factors.
        key: what must be the same for a part to be taken: the bits depend on batches and threads too.
    """

    def __init__(self, file: Path, key: Mapping[str, Any]) -> None:
        self.folder = file.with_name(file.name + ".parts")
        self.key = json.dumps(dict(key), sort_keys=True, default=str)
        self.descriptor: int | None = None  # of the folder, locked while a run fills it

    def enter(self) -> None:
        """Makes the folder, or joins those that fill it; until `leave` or `remove`.

        Raises:
            ValueError: somebody else's things are there, or parts of other settings are being made.
        """
        if self.folder.exists() and not is_empty(self.folder) and not is_marked(self.folder, COMMAND):
            raise ValueError(
                f"{self.folder}: is where parts of {self.folder.stem} go, and holds something else; expected no such "
                "folder: move it, or write the factors elsewhere"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with in_turn(self.folder.parent):
            made_from = hashlib.sha256(self.key.encode()).hexdigest()
            if not self.alone() and read_object(self.folder / MARK).get("key") != made_from:
                self.leave()
                raise ValueError(
                    f"{self.folder}: another run is making parts of other settings there; wait until it has ended, or "
                    "write the factors elsewhere"
                )
            mark(self.folder, COMMAND, key=made_from)
            with suppress(OSError):
                fcntl.flock(self.opened(), fcntl.LOCK_SH)

    def alone(self) -> bool:
        """Whether nobody else has entered; so it seems where the file system locks no folders."""
        return lock_alone(self.opened())

    def opened(self) -> int:
        if self.descriptor is None:
            self.descriptor = opened(self.folder)
        return self.descriptor

    def leave(self) -> None:
        if self.descriptor is not None:
            with suppress(OSError):  # closing is not enough: workers that read data have it open too
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)
            self.descriptor = None

    def path(self, part: int) -> Path:
        return self.folder / f"{part:02}.safetensors"

    def write(self, part: int, sums: CovarianceSums, reason: str) -> None:
        """`reason`: why the part's first failed row failed, or empty."""
        tensors = sums.tensors()
        write_tensors(self.path(part), tensors, {"key": self.key, "reason": reason, "digest": digest(tensors)})

    def read(self, part: int) -> tuple[CovarianceSums, str] | None:
        """A part's sums and the reason; None: it is not there, not whole, or of something else."""
        try:
            with safe_open(self.path(part), framework="pt") as opened:
                about = opened.metadata() or {}
                if about.get("key") != self.key:
                    return None
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError):
            return None
        return (CovarianceSums.of(tensors), about["reason"]) if about.get("digest") == digest(tensors) else None

    def remove(self) -> None:
        """Takes the parts away, and the folder if nothing else lies there; unless another run is at it, which does."""
        with suppress(FileNotFoundError), in_turn(self.folder.parent):
            if self.alone() and is_marked(self.folder, COMMAND):
                for file in self.folder.glob("[0-9][0-9].safetensors"):
                    file.unlink(missing_ok=True)
                sweep_partials(self.folder)
                if [file.name for file in self.folder.iterdir()] == [MARK]:
                    rmtree(self.folder, ignore_errors=True)
        self.leave()


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (16 hex digits) over names and numbers."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode())
        whole.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]
