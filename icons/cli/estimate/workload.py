"""What an estimate starts from: a model's numbers, and how rows are run through it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from icons.modules.sharding import frozen_in, units

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "8bit": 1.0, "4bit": 0.5}
_TOWERS = ("vision_tower", "vision_model", "visual")


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model, counted by what becomes of them."""

    language: int
    """Of everything but the vision tower and what is trainable."""
    tower: int
    """Of the vision tower."""
    trainable: int
    """Of what is trained or differentiated, in float32."""
    dense: int
    """Of the embeddings and the output layer, which are never quantised."""
    layers: int
    largest_unit: int
    """Frozen ones of the largest layer, or embedding: what is whole at a time where the base is sharded."""
    outside: int
    """Frozen ones in no layer, which are whole all the time there."""

    @classmethod
    def of(cls, model: nn.Module) -> "ModelSize":
        """Counts a model, which may be on the meta device."""
        frozen = {name: value.numel() for name, value in model.named_parameters() if not value.requires_grad}
        tower = sum(count for name, count in frozen.items() if set(_TOWERS) & set(name.split(".")))
        ends = [end.weight for end in _ends_of(model) if not end.weight.requires_grad]
        text: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
        apart = [sum(value.numel() for value in frozen_in(unit)) for unit in units(model)]
        return cls(
            language=sum(frozen.values()) - tower,
            tower=tower,
            trainable=sum(value.numel() for value in model.parameters() if value.requires_grad),
            dense=sum({id(weight): weight.numel() for weight in ends}.values()),
            layers=text.num_hidden_layers,
            largest_unit=max(apart, default=0),
            outside=sum(frozen.values()) - sum(apart),
        )


def _ends_of(model: Any) -> list[Any]:
    """Input embeddings and output layer, where the model has them."""
    return [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]


@dataclass(frozen=True)
class Workload:
    """How the rows are run through the model, on each rank."""

    lengths: Sequence[int]
    """Tokens of a sample of the rows, images expanded."""
    batch_size: int
    max_tokens: int | None = None
    dtype: str = "bfloat16"
    quantize: str | None = None
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    base_shards: int = 1
    """Ranks over which the frozen weights are sharded: each has its share, two layers, and what is in no layer."""

    @property
    def mean_length(self) -> int:
        return round(sum(self.lengths) / max(1, len(self.lengths)))

    @property
    def largest_batch(self) -> tuple[int, int]:
        """Rows and their length, padding included, of the batch with the most tokens.

        >>> Workload([600, 2048], 8, 8192).largest_batch, Workload([600], 8, 8192).largest_batch
        ((4, 2048), (8, 600))
        """
        longest = max(self.lengths, default=0)
        shapes = [
            (rows, min(longest, self.max_tokens // rows) if self.max_tokens else longest)
            for rows in range(1, self.batch_size + 1)
        ]
        # one row is never cut, however long; of equal batches the longer rows, whose attention takes the most
        return max([(1, longest), *shapes], key=lambda shape: (shape[0] * shape[1], shape[1]))


def weights(model: ModelSize, load: Workload) -> dict[str, int]:
    """Bytes of the weights: embeddings, output layer and tower are never quantised; what is trainable is float32."""
    each = BYTES[load.quantize or load.dtype]
    whole = (model.language - model.dense) * each + (model.dense + model.tower) * BYTES[load.dtype]
    if load.base_shards > 1:
        outside = model.outside * each
        whole = (whole - outside) / load.base_shards + outside + 2 * model.largest_unit * each
    return {"weights": int(whole + 4 * model.trainable)}
