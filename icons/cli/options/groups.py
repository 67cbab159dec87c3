"""Groups of options that several commands share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icons.choices import Attention, Preset, Quantize, Reduce, Target
from icons.cli.pairs import parse

MODEL, DATA, PROJECTION, STORE, ADAPTER, SPEED, RUN = (
    {"group": name} for name in ("model", "data", "projection", "store", "adapter", "memory and speed", "run")
)
"""Metadata of a command's own field that stands under a shared heading."""


@dataclass(frozen=True, kw_only=True)
class _CodeOptions:
    """model"""

    trust_remote_code: bool = False
    """run code that comes with the model folder"""


@dataclass(frozen=True, kw_only=True)
class PartsOptions(_CodeOptions):
    """model"""

    model: Path | None = None
    """Hugging Face folder, a model's name on the hub, or an original LLaVA base folder (with --vision-tower and
    --mm-projector)"""
    vision_tower: Path | None = None
    """CLIP folder of an original LLaVA model"""
    mm_projector: Path | None = None
    """mm_projector.bin of an original LLaVA model"""

    @property
    def model_files(self) -> dict[str, Path | None]:
        """Option -> the file or folder of the model that it names."""
        return {"--model": self.model, "--vision-tower": self.vision_tower, "--mm-projector": self.mm_projector}


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions(PartsOptions):
    """model"""

    checkpoint: Path | None = None
    """folder that `icons warmup` wrote; or give the parts one by one, with --model and --adapter"""
    adapter: Path | None = None
    """LoRA adapter folder: PEFT's, LLaVA's, or a checkpoint-N of the Hugging Face Trainer"""

    @property
    def model_files(self) -> dict[str, Path | None]:
        return {"--checkpoint": self.checkpoint, **super().model_files, "--adapter": self.adapter}


@dataclass(frozen=True, kw_only=True)
class LoadingOptions(_CodeOptions):
    """memory and speed"""

    attention: Attention = "sdpa"
    """attention kernel; flash_attention_2 needs the extra `flash`"""
    quantize: Quantize | None = None
    """base weights in 4 or 8 bits; needs the extra `quantize`"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass, for less memory"""
    num_workers: int = 0
    """processes that read and decode ahead"""

    @property
    def loading(self) -> dict[str, Any]:
        """How a model is loaded, as `load_model` takes it."""
        named = ("attention", "quantize", "gradient_checkpointing", "trust_remote_code")
        return {name: getattr(self, name) for name in named}


@dataclass(frozen=True, kw_only=True)
class _ImageOptions:
    """data"""

    allow_paths: list[Path] | None = None
    """a folder that absolute paths of images may lie in, beside --images; repeat it for each"""
    web_images: bool = False
    """fetch images that records name by http(s) addresses, once, into the cache folder"""


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(_ImageOptions):
    """data"""

    dialect: str = field(default="auto", metadata={"choices": "dialects"})
    """how the records are written. {dialects}"""

    @property
    def reading(self) -> dict[str, Any]:
        """How records and their images are read, as `ConversationDataModule` takes it."""
        return {"dialect": self.dialect, "allow_paths": self.allow_paths or [], "web_images": self.web_images}


@dataclass(frozen=True, kw_only=True)
class DataOptions(ReadingOptions):
    """data"""

    data: Path
    """JSON or JSONL, Parquet or Arrow (a pattern for several files), a data-set folder, a name on the Hugging Face hub,
    or WebDataset tars; row i is its record i"""
    images: Path | None = None
    """folder (or tar or zip archive) that the records' image paths start from"""


@dataclass(frozen=True, kw_only=True)
class PreprocessingOptions:
    """data"""

    template: str | None = None
    """conversation template; default: as in the warm-up, or the one that the model folder calls for"""
    max_length: int | None = None
    """tokens at which a conversation is cut; default: as in the warm-up, or 2048"""
    preset: Preset | None = None
    """llava-train prepares data as LLaVA is trained, icons-release as the released ICONS scripts do; default: as in
    the warm-up, or llava-train"""
    processor: dict[str, Any] | None = None
    """a setting of an image-text model's image processor, as --processor.max_pixels 400000; default: as in the warm-up,
    or the model folder's"""


@dataclass(frozen=True, kw_only=True)
class ProjectionOptions:
    """projection"""

    projector: str = field(default="count_sketch", metadata={"choices": "projectors"})
    """kind of random projection of gradients"""
    seed: int = 0
    """seed of the projection; training and task stores need the same"""


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """store"""

    batch_size: int = field(default=8, metadata={**SPEED, "least": 1})
    """most rows per batch"""
    max_tokens: int | None = field(default=None, metadata=SPEED)
    """most tokens per batch, padding included; null: no limit"""
    target: Target = field(default="lora", metadata=MODEL)
    """differentiate the LoRA parameters, as the paper does, or all that the warm-up trained"""
    chunk_rows: int | None = None
    """rows per chunk, the unit of writing and resuming; default: so that a chunk has 2 to 16 MB"""
    shard: str | None = None
    """I/N: only this share of the units, without any communication (array jobs); I counts from 0"""
    retry_failed: bool = False
    """try the rows that failed once more"""
    mixed_batches: bool = False
    """continue a store that was begun with another --batch-size or --max-tokens, say because memory ran out; its
    rows are then equal to rounding, not bit for bit, to those of an undisturbed run"""
    strict: bool = False
    """exit with status 1 if any row failed"""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """tasks"""

    group: list[str] | None = None
    """NAME=TASK1,TASK2,... makes one task of several, as MME of its subtasks; repeat it for each group"""
    reduce: Reduce = "max"
    """a group's influence is its tasks' highest (as the original does for MME), or their mean"""
    drop_axes: int = 0
    """leave out this many leading axes along which the tasks' validation rows differ: they mostly tell which answer
    is wanted, and can fill a selection with one kind of answer"""
    subspace: float | None = None
    """take cosines within the span of each task's validation gradients: as many of its directions as hold this share
    of their energy (0.9: nine tenths). Of stored gradients (`icons influence`) scores then have no error bars; of whole
    ones (`icons score`) each direction takes the memory of a task vector"""

    @property
    def groups(self) -> dict[str, list[str]]:
        """Name -> the tasks of each group."""
        return {name: members.split(",") for name, members in parse(self.group or [], "--group").items()}


@dataclass(frozen=True, kw_only=True)
class LearningOptions:
    """training"""

    epochs: int = field(default=1, metadata={"least": 1})
    """passes over the chosen rows"""
    batch_size: int = field(default=16, metadata={"least": 1})
    """rows per device and step"""
    learning_rate: float = 2e-4
    """learning rate of the adapter"""
    lora_rank: int = field(default=128, metadata={**ADAPTER, "least": 1})
    """rank r of the adapter's matrices"""
    lora_alpha: float = field(default=256.0, metadata=ADAPTER)
    """the adapter's output is scaled by alpha / r"""
    lora_dropout: float = field(default=0.05, metadata=ADAPTER)
    """dropout on the adapter's input"""


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """run"""

    trainer: dict[str, Any] = field(default_factory=dict)
    """show the flags of Lightning's Trainer, all reachable as --trainer.FLAG, for example --trainer.devices 8; with
    --trainer.strategy model_parallel all GPUs share a model, with model_parallel_hybrid those of each node"""
