"""The batch contract between datamodules and modules: fields, shapes, the loss of a sample, and failure reasons.

A *batch* is a mapping. Fields with a meaning here:

| field | shape, dtype | meaning |
|---|---|---|
| `input_ids` | `[B, L]` int64 | token ids, right-padded; image positions already expanded to one id per image feature |
| `attention_mask` | `[B, L]` int64 | 1 = token, 0 = padding |
| `labels` | `[B, L]` int64 | the id to predict *at* this position (shifted inside the loss); -100 = not supervised |
| `row` | `[B]` int64 | the record's position in the data file |
| `entries_per_row` | mapping of `[B]` int64 | optional: field -> entries (images, tiles, patches) of each row |
| `failed_row` | `[F]` int64 | rows of this batch that could not be read; absent means none |
| `failed_status` | `[F]` uint8 | their `Status` |
| `failed_reason` | list of F texts | the sentence that says why; `failed_id` likewise: the records' ids |

Every other entry (`pixel_values`, `image_sizes`, ...) goes to the model's forward as it is; entries of a field whose
first dimension is not the rows' stand row by row, as `entries_per_row` counts them. A batch whose rows all
failed has `B = 0`.
"""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
OWN_FIELDS = ("labels", "row", "entries_per_row", "failed_row", "failed_status", "failed_reason", "failed_id")

Batch = Mapping[str, Any]


class Status(IntEnum):
    """What became of a row. 0: not yet written; 1: done; 2 and up: failed, one code per reason."""

    NOT_WRITTEN = 0
    DONE = 1
    BAD_RECORD = 2  # not valid JSON, not an object, or without usable conversations
    IMAGE_MISSING = 3  # the named file is not in the image folder (or points outside it)
    IMAGE_BROKEN = 4  # the file is there and cannot be decoded
    NO_SUPERVISED_TOKEN = 5  # every label is -100: the loss is undefined
    NON_FINITE = 6  # the loss or the gradient is NaN or infinite
    TOO_LARGE = 7  # more pixels, images or tokens than the settings allow


def model_inputs(batch: Batch) -> dict[str, Any]:
    """The part of `batch` that the model's forward takes: everything but labels, rows and failures."""
    return {name: value for name, value in batch.items() if name not in OWN_FIELDS}


def supervised_tokens(labels: Int[Tensor, "batch length"]) -> Int[Tensor, " batch"]:
    """Number of supervised tokens per sample, int64. The first position is never predicted, so it never counts."""
    return (labels[:, 1:] != IGNORE_INDEX).sum(dim=1)


def sample_losses(
    logits: Float[Tensor, "batch length vocab"], labels: Int[Tensor, "batch length"]
) -> Float[Tensor, " batch"]:
    """Mean cross-entropy of each sample over its own supervised tokens, as if it were alone in its batch.

    Computed in float32 (float64 logits stay float64). A sample without supervised tokens has loss 0 and no gradient,
    not NaN: callers tell it by `supervised_tokens(labels) == 0`.

    Hugging Face's `loss` is a mean over all tokens of the batch, which weighs a sample by its share of the tokens;
    that is not the loss whose gradient ICONS compares (arXiv 2501.00654, section 3).

    Raises:
        ValueError: a label is neither -100 nor a token.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE_INDEX
    sample, position = supervised.nonzero(as_tuple=True)
    rows = logits[sample, position]  # softmax over the vocabulary only where a token is supervised
    rows = rows if rows.dtype == torch.float64 else rows.float()
    wanted = targets[sample, position].long()
    refuse_strange_labels(id_bounds(wanted), rows.shape[1])
    token_loss = F.cross_entropy(rows, wanted, reduction="none")
    # every position is written once, so that the sum is deterministic on CUDA too (index_add is not)
    per_position = token_loss.new_zeros(targets.shape).index_put((sample, position), token_loss)
    return per_position.sum(dim=1) / supervised.sum(dim=1).clamp(min=1)


def id_bounds(ids: Int[Tensor, "..."]) -> tuple[int, int]:
    """The smallest and the largest; of none (0, 0).

    >>> id_bounds(torch.tensor([[3, -1], [7, 0]])), id_bounds(torch.tensor([], dtype=torch.long))
    ((-1, 7), (0, 0))
    """
    if not ids.numel():
        return 0, 0
    low, high = torch.stack(torch.aminmax(ids)).tolist()  # one copy from the device
    return low, high


def refuse_strange_labels(bounds: tuple[int, int], vocabulary: int) -> None:
    """Refuses what cross-entropy would look up beyond its logits: on a GPU that ends the process, from a kernel.

    Args:
        bounds: of the supervised labels, see `id_bounds`.
        vocabulary: number of logits.

    Raises:
        ValueError: a label is below 0 or has no logit.
    """
    strange = next((label for label in bounds if not 0 <= label < vocabulary), None)
    if strange is not None:
        raise ValueError(
            f"labels: got {strange}, which is neither a token nor {IGNORE_INDEX} (not supervised); expected ids from 0 "
            f"to {vocabulary - 1}, as the model has logits: give it the tokenizer it was made with"
        )
