"""Options of `icons gradients`."""

from dataclasses import dataclass, field
from pathlib import Path

from icons.choices import Collect, ModelDtype, Preconditioning, StoreDtype
from icons.cli.options.groups import (
    MODEL,
    PROJECTION,
    RUN,
    SPEED,
    STORE,
    CheckpointOptions,
    DataOptions,
    LoadingOptions,
    PreprocessingOptions,
    ProjectionOptions,
    StoreOptions,
    TrainerOptions,
)

# 7B in bfloat16, r = 128: 45 GB of activations beside 20 GB of weights and the like (icons/gradients/per_sample.py)
MAX_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class GradientsOptions(
    DataOptions,
    PreprocessingOptions,
    CheckpointOptions,
    ProjectionOptions,
    StoreOptions,
    LoadingOptions,
    TrainerOptions,
):
    """Computes a store of projected per-sample gradients; the same line, run again, resumes.

    $ icons gradients --checkpoint warmup/ --data train.json --images images/ --out train.zarr
    $ icons gradients --checkpoint warmup/ --data gqa.json --images gqa/ --task --out gqa.zarr

    Exit status: 0 all rows are done; 1 something you can mend, said in one line; 2 wrong usage; 75 interrupted
    (SIGTERM): run the same line again to go on.
    """

    out: str
    """the gradient store: a folder, or a URL (s3://bucket/name)"""
    optimizer_state: Path | None = field(default=None, metadata=MODEL)
    """Adam's moments: warm-up folder, Lightning checkpoint, optimizer.pt, or DeepSpeed folder"""
    collect: Collect = "gradients"
    """what a row holds: gradients; representations (the last token's hidden state); the loss alone; or
    image_ablation, gradients with noise in place of the image. In the original, --info_type: grads / reps / loss /
    delta"""
    task: bool = False
    """the rows are a task's validation rows: plain gradients, --preconditioner none (with --factors: kfac)"""
    preconditioner: Preconditioning | None = field(default=None, metadata=PROJECTION)
    """adam (training data) or none (tasks); diagonal is Adam's without its first moment; kfac divides by the root of a
    curvature, training data and tasks alike (--factors); default: kfac with --factors, else adam, and none with --task.
    In the original, --gradient_type: adam / sgd / sign are adam / none / sign here"""
    factors: Path | None = field(default=None, metadata=PROJECTION)
    """the Kronecker factors of --preconditioner kfac, from `icons factors`"""
    damping: float | None = field(default=None, metadata=PROJECTION)
    """of --preconditioner kfac: added to each factor, as a share of its mean eigenvalue; default: 0.1"""
    max_tokens: int | None = field(default=MAX_TOKENS, metadata=SPEED)
    """most tokens per batch, padding included; null: no limit. With the default a 7B model in bfloat16 fits an 80
    GB GPU, and with --gradient-checkpointing one of 48 GB"""
    dim: int | list[int] = field(default=5120, metadata=PROJECTION)
    """numbers per row (K); the paper's is 5120. Given several times: that many stores from one pass, OUT-dim1024,
    OUT-dim5120. In the original, --gradient_projection_dimension"""
    dtype: StoreDtype = field(default="float16", metadata=STORE)
    """number format of the stored rows"""
    codec: str | None = field(default=None, metadata=STORE)
    """compression of the rows (for example zstd); default: none, since gradients hardly compress"""
    model_dtype: ModelDtype = field(default="auto", metadata=SPEED)
    """number format of the model's weights; auto: bfloat16 on a GPU; on a CPU as stored, float16 as
    float32"""
    compile: bool = field(default=False, metadata=SPEED)
    """on a CPU, fuse the elementwise part of --preconditioner adam with torch.compile (half a minute at the start); a
    GPU has a kernel of its own"""
    dry_run: bool = field(default=False, metadata=RUN)
    """print what would be done (rows per rank, bytes, memory) and stop"""
    overwrite: bool = field(default=False, metadata=RUN)
    """write --out even if it holds something else; a store made with other settings is replaced"""
