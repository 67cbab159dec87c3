"""Options of `icons score`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from icons.choices import Preconditioning, StoreDtype
from icons.cli.options.groups import (
    MODEL,
    RUN,
    SPEED,
    DataOptions,
    LoadingOptions,
    ProjectionOptions,
    StoreOptions,
    TaskOptions,
    TrainerOptions,
)

KEPT = {"group": "gradients kept beside the scores"}
TASKS = {"group": "tasks"}


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(DataOptions, TaskOptions, StoreOptions, LoadingOptions, ProjectionOptions, TrainerOptions):
    """Scores every training row on every task exactly; the same line, run again, resumes.

    $ icons score --checkpoint warmup/ --data train.json --images images/ --task gqa=gqa.json:gqa/ --out scores.zarr

    The score store is what `icons influence` writes (standard error zero): select, compare and report work on it.
    Exit status: 0 all rows are done; 1 something you can mend, said in one line; 2 wrong usage; 75 interrupted
    (SIGTERM): run the same line again to go on.
    """

    checkpoint: list[Path] = field(metadata=MODEL)
    """warm-up folder; repeat it for further checkpoints"""
    out: Path
    """the score store"""
    task: list[str] = field(metadata=TASKS)
    """NAME=FILE or NAME=FILE:IMAGES, a task's validation file and its image folder; repeat it for each task"""
    task_vectors: Path | None = field(default=None, metadata=TASKS)
    """folder where task vectors are kept and found again; default: OUT.tasks"""
    reuse: Path | None = None
    """a finished score store of the same data and model: its columns are copied, and only tasks that it lacks are
    scored (give every --task and --group that the new store is to have)"""
    weights: list[float] | None = field(default=None, metadata=MODEL)
    """a weight for each checkpoint (LESS: their learning rates); default: the mean"""
    optimizer_state: list[Path] | None = field(default=None, metadata=MODEL)
    """Adam's moments, one for each checkpoint; default: the warm-up folder's own"""
    normalize: Literal["exact", "none"] = "exact"
    """exact: divide every gradient by its norm (cosine similarity); none: do not (inner product)"""
    preconditioner: Preconditioning | None = None
    """preconditioner of the training rows; tasks are always plain. kfac divides by a curvature (--factors), and is
    meant for --normalize none; default: adam, kfac with --factors"""
    factors: list[Path] | None = field(default=None, metadata=MODEL)
    """the Kronecker factors of --preconditioner kfac, from `icons factors`, one file for each checkpoint"""
    damping: float | None = None
    """of --preconditioner kfac: added to each factor, as a share of its mean eigenvalue; default: 0.1"""
    chunk_rows: int | None = None
    """rows per unit of writing and resuming; default: 1,024"""
    model_dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata=SPEED)
    """number format of the model's weights"""
    vector_dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata=SPEED)
    """number format of the task vectors: S x P numbers on the device"""
    offload: bool = field(default=False, metadata=SPEED)
    """keep the task vectors in the CPU's memory and copy each parameter's part when it is needed"""
    keep_gradients: Path | None = field(default=None, metadata=KEPT)
    """also write the projected gradients to this store, from the same pass (one checkpoint only)"""
    dim: int = field(default=5120, metadata=KEPT)
    """numbers per row (K)"""
    dtype: StoreDtype = field(default="float16", metadata=KEPT)
    """number format of the stored rows"""
    projector: str = field(default="count_sketch", metadata=KEPT | {"choices": "projectors"})
    """kind of random projection"""
    seed: int = field(default=0, metadata=KEPT)
    """seed of the projection"""
    overwrite: bool = field(default=False, metadata=RUN)
    """write --out and --keep-gradients even if something else lies there; stores of other settings are replaced"""
