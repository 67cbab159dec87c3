"""Samples -> a batch, as `icons.batch` describes it: tokens padded on the right, images one after the other."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from icons.batch import IGNORE_INDEX, OWN_FIELDS
from icons.datamodules.chat.processor import join


def collated(samples: Sequence[Mapping[str, Any]], pad: int) -> dict[str, Any]:
    """The batch of some samples of a `ConversationDataset`, failed ones named beside it.

    Whatever else a sample has is joined where it has more than one dimension (`pixel_values [images, 3, H, W]`, with
    each row's number of entries in `entries_per_row`), and otherwise is one value per token, 0 where a row has none.

    Args:
        samples: in the order of the batch's rows.
        pad: the id behind a row's last token.
    """
    good = [sample for sample in samples if "failed" not in sample]
    failed = [sample for sample in samples if "failed" in sample]
    ids = [sample["input_ids"] for sample in good]
    length = max(map(len, ids), default=0)
    batch: dict[str, Any] = {
        "input_ids": _padded(ids, length, pad),
        "attention_mask": _padded([torch.ones_like(row) for row in ids], length, 0),
        "labels": _padded([sample["labels"] for sample in good], length, IGNORE_INDEX),
        "row": torch.tensor([sample["row"] for sample in good], dtype=torch.int64),
        "failed_row": torch.tensor([sample["row"] for sample in failed], dtype=torch.int64),
        "failed_status": torch.tensor([int(sample["failed"]) for sample in failed], dtype=torch.uint8),
        "failed_reason": [sample["reason"] for sample in failed],
        "failed_id": [sample["id"] for sample in failed],
    }
    for name in {name: None for sample in good for name in sample if name not in (*OWN_FIELDS, "input_ids")}:
        parts = [sample[name] for sample in good if name in sample]
        if parts[0].dim() > 1:
            batch[name] = join(parts)
            counts = [len(sample[name]) if name in sample else 0 for sample in good]
            batch.setdefault("entries_per_row", {})[name] = torch.tensor(counts, dtype=torch.int64)
        else:
            batch[name] = _padded([sample.get(name, parts[0][:0]) for sample in good], length, 0)
    return batch


def _padded(rows: Sequence[Tensor], length: int, fill: int) -> Tensor:
    """Rows of numbers, one for each token, as `[rows, length]` of their own dtype."""
    padded = torch.full((len(rows), length), fill, dtype=rows[0].dtype if rows else torch.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
