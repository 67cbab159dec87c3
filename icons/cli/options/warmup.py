"""Options of `icons warmup`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icons.choices import ModelDtype, Preset
from icons.cli.options.groups import (
    ADAPTER,
    DATA,
    RUN,
    SPEED,
    DataOptions,
    LearningOptions,
    LoadingOptions,
    PartsOptions,
    TrainerOptions,
)

_LEARNING = {"group": "training"}


@dataclass(frozen=True, kw_only=True)
class WarmupOptions(DataOptions, PartsOptions, LearningOptions, LoadingOptions, TrainerOptions):
    """Trains LoRA (and the projector) as LLaVA does, and keeps the adapter with Adam's moments in a warm-up folder.

    $ icons warmup --model M --data train.json --images images/ --fraction 0.05 --out warmup/
    $ icons warmup --model M --data selected.json --images images/ --out final/

    The same line, run again, goes on where a fit was interrupted. Exit status: 0 the fit is done; 1 something you can
    mend, said in one line; 2 wrong usage; 75 interrupted (SIGTERM) and saved: run the same line again.
    """

    model: Path = field()
    out: Path
    """the warm-up folder to write"""
    fraction: float = field(default=1.0, metadata=DATA)
    """random share of the data to train on: 0.05 for the paper's warm-up, 1 for the final fine-tune"""
    min_rows: int = field(default=256, metadata=DATA)
    """train on this many rows at least, however small the share; two steps of 128 are the least to learn from"""
    held_out: float = field(default=0.02, metadata=DATA)
    """without --task: share of the data held out to measure the loss on, at most 256 rows"""
    task: list[str] | None = field(default=None, metadata=DATA)
    """NAME=FILE or NAME=FILE:IMAGES, a file to measure loss and exact matches on before and after; repeat it for
    each"""
    max_failed: float = field(default=0.01, metadata=DATA)
    """share of the rows that may fail (image missing, no conversation, ...) before the fit stops"""
    template: str = field(default="auto", metadata=DATA)
    """conversation template; auto: the one that the model folder calls for"""
    max_length: int = field(default=2048, metadata=DATA)
    """tokens at which a conversation is cut"""
    preset: Preset = field(default="llava-train", metadata=DATA)
    """llava-train prepares data as LLaVA is trained, icons-release as the released ICONS scripts do"""
    processor: dict[str, Any] | None = field(default=None, metadata=DATA)
    """a setting of an image-text model's image processor, as --processor.max_pixels 400000; default: the model
    folder's"""
    accumulate: int = field(default=1, metadata={**_LEARNING, "least": 1})
    """batches per optimizer step"""
    projector_learning_rate: float = field(default=2e-5, metadata=_LEARNING)
    """learning rate of the projector between vision tower and language model"""
    warmup_ratio: float = field(default=0.03, metadata=_LEARNING)
    """share of the steps over which the learning rate rises; after that it falls along a cosine"""
    weight_decay: float = field(default=0.0, metadata=_LEARNING)
    """weight decay of the adapter's and the projector's matrices"""
    seed: int = field(default=0, metadata=_LEARNING)
    """seed of the choice of rows, their order, the adapter's first values and dropout"""
    lora_targets: str | None = field(default=None, metadata={**ADAPTER, "pattern": True})
    """regular expression over module names; default: the language model's linear layers"""
    train_projector: bool = field(default=True, metadata=ADAPTER)
    """train the projector too, as LLaVA does"""
    dtype: ModelDtype = field(default="auto", metadata=SPEED)
    """number format of the frozen weights and the computation; auto: bfloat16 on a GPU, float32 on a CPU"""
    checkpoint_minutes: float = field(default=15.0, metadata=RUN)
    """minutes between two checkpoints of the fit"""
    resume: bool = field(default=True, metadata=RUN)
    """continue an interrupted fit in --out; false starts over"""
    dry_run: bool = field(default=False, metadata=RUN)
    """print what would be done (settings, rows per rank, bytes, memory, time) and stop"""
    overwrite: bool = field(default=False, metadata=RUN)
    """write --out even if it holds something other than an earlier warm-up"""
