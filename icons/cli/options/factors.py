"""Options of `icons factors`."""

from dataclasses import dataclass, field
from pathlib import Path

from icons.choices import FactorLabels, ModelDtype, Target
from icons.cli.options.gradients import MAX_TOKENS
from icons.cli.options.groups import (
    MODEL,
    RUN,
    SPEED,
    CheckpointOptions,
    DataOptions,
    LoadingOptions,
    PreprocessingOptions,
    TrainerOptions,
)


@dataclass(frozen=True, kw_only=True)
class FactorsOptions(DataOptions, PreprocessingOptions, CheckpointOptions, LoadingOptions, TrainerOptions):
    """Kronecker factors of a checkpoint's curvature, for --preconditioner kfac; the same line, run again, goes on.

    $ icons factors --checkpoint warmup/ --data train.json --images images/ --out factors.safetensors
    $ icons score --checkpoint warmup/ --preconditioner kfac --factors factors.safetensors --normalize none ...

    One pass over some rows of the training data. Exit status: 0 the factors are there; 1 something you can mend, said
    in one line; 2 wrong usage; 75 interrupted (SIGTERM): run the same line again to go on.
    """

    out: Path
    """the file of the factors (safetensors)"""
    rows: int | None = field(default=2000, metadata={"least": 1})
    """how many rows they are made of, drawn from the data; null: all"""
    labels: FactorLabels = "drawn"
    """drawn from what the model predicts at each supervised position (the Fisher matrix), or the data's own (the
    empirical one: a forward pass less, and a little worse)"""
    width: int = field(default=1024, metadata={"least": 0})
    """sides of a layer up to this wide have a whole covariance, wider ones its diagonal: of LoRA's two matrices one
    side is its rank, the other the model's width"""
    seed: int = 0
    """of the rows and the labels that are drawn"""
    batch_size: int = field(default=8, metadata={**SPEED, "least": 1})
    """most rows per batch"""
    max_tokens: int | None = field(default=MAX_TOKENS, metadata=SPEED)
    """most tokens per batch, padding included; null: no limit"""
    target: Target = field(default="lora", metadata=MODEL)
    """factors of the LoRA parameters, or of all that the warm-up trained; as for `icons gradients`"""
    model_dtype: ModelDtype = field(default="auto", metadata=SPEED)
    """number format of the model's weights; auto: as stored on a CPU, bfloat16 on a GPU"""
    shard: str | None = field(default=None, metadata=RUN)
    """I/N: only this share of 32 parts of the rows, without any communication (array jobs); I counts from 0. The job
    that finishes last writes --out"""
    dry_run: bool = field(default=False, metadata=RUN)
    """print what would be done (rows per rank, bytes, memory) and stop"""
    overwrite: bool = field(default=False, metadata=RUN)
    """write --out even if it holds something else, or factors of other settings"""
