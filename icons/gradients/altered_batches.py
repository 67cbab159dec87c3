"""Batches that are changed in ways that must not matter to the losses of their samples."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icons.batch import IGNORE_INDEX, OWN_FIELDS, Batch, supervised_tokens
from icons.gradients.paths import Kind, Paths, is_text

_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


def with_another_end(batch: Batch) -> Batch | None:
    """The batch with another token at the end of each row: one that is only predicted, never read."""
    ids, labels = batch.get("input_ids"), batch["labels"]
    if ids is None or ids.shape != labels.shape:
        return None
    positions = torch.arange(labels.shape[1], device=labels.device)
    mask = batch.get("attention_mask", torch.ones_like(labels))
    if mask.shape != labels.shape:
        return None
    last = (positions * (mask != 0)).argmax(dim=1)
    rows = torch.arange(len(labels), device=labels.device)
    predicted = labels[rows, last] != IGNORE_INDEX
    targets = labels[labels != IGNORE_INDEX]
    other = targets[(targets[None] != ids[rows, last][:, None]).int().argmax(dim=1)]
    changed = ids.clone()
    changed[rows, last] = torch.where(predicted, other, ids[rows, last])
    return dict(batch) | {"input_ids": changed}


def with_more_padding(model: nn.Module, batch: Batch, left: bool, columns: int = 1) -> Batch | None:
    """The batch with columns of padding more; None if there is no mask, or the model might have no such positions."""
    length = batch["labels"].shape[1]
    if "attention_mask" not in batch or length + columns > _longest(model):
        return None
    padded, mask = dict(batch), batch["attention_mask"]
    hidden = (mask == 0).nonzero().tolist() if mask.shape == batch["labels"].shape else []
    for name, value in batch.items():
        if (
            isinstance(value, Tensor)
            and value.shape[:2] == batch["labels"].shape
            and is_text(name, value, batch["labels"].shape)
        ):
            edge = value[:, :1] if left else value[:, -1:]
            if hidden:  # padding as the batch has it: some models know it by its id
                edge = value[tuple(hidden[0])].expand_as(edge)
            fill = {"labels": IGNORE_INDEX, "attention_mask": 0}.get(name)
            column = edge if fill is None else torch.full_like(edge, fill)
            more = column.expand(-1, columns, *column.shape[2:])
            padded[name] = torch.cat([more, value] if left else [value, more], dim=1)
    return padded


def cut_short(batch: Batch) -> Batch | None:
    """A padded batch of text with half of each row's tokens padding too, and all that remain to be predicted; None if
    there are no ids, or too few. It is no longer than before: for models that have no more positions, or do not say."""
    ids, mask = batch.get("input_ids"), batch["attention_mask"]
    counts = (mask != 0).sum(dim=1, keepdim=True)
    if not isinstance(ids, Tensor) or not bool((counts >= 4).all()) or not bool((mask == 0).any()):
        return None
    kept = torch.arange(mask.shape[1], device=mask.device) < counts // 2
    place = tuple((mask == 0).nonzero()[0].tolist())
    cut = dict(batch)
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.shape == ids.shape:
            cut[name] = torch.where(kept.to(value.device), value, value[place])
    cut["labels"] = torch.where(kept.to(ids.device), ids, IGNORE_INDEX).to(batch["labels"])
    return cut


def without_mask(batch: Batch) -> Batch:
    """The batch without its attention mask, where all that this hides is padding on the right that nothing is
    predicted from: attention is causal, and without a mask a GPU has quicker kernels for it, that repeat. Else the
    batch as it is: so where nothing is padded, or where positions are given, which are taken for those of documents
    beside each other once there is no mask."""
    mask, labels = batch.get("attention_mask"), batch["labels"]
    if not isinstance(mask, Tensor) or mask.shape != labels.shape or "position_ids" in batch:
        return batch
    hidden, silent = mask == 0, labels.to(mask.device) == IGNORE_INDEX
    plain = ((mask == 1) | (hidden & silent)).all() & (hidden[:, 1:] >= hidden[:, :-1]).all() & hidden.any()
    return {name: value for name, value in batch.items() if name != "attention_mask"} if bool(plain) else batch


def as_run(batch: Batch, known: Paths) -> Batch:
    """What the model is run on for a batch of the kind at hand."""
    return without_mask(batch) if suffices(known, batch) else batch


def suffices(known: Paths, batch: Batch) -> bool | None:
    """Whether batches of this kind were shown to need no mask; None: not yet, or not with so much padding."""
    shown = known.unmasked.get(use_of(batch))
    if shown is None or shown in (0, 1):
        return None if shown is None else shown == 1
    return bool(padding_of(batch).max() <= 2 * shown) or None


def use_of(batch: Batch) -> Kind:
    """Whether it has one row, and what it holds, of the text too: positions or types of tokens may stand in for a
    mask."""
    fields = (name for name, value in batch.items() if isinstance(value, Tensor) and name not in OWN_FIELDS)
    return len(batch["labels"]) == 1, frozenset(fields)


def padding_of(batch: Batch) -> Float[Tensor, " batch"]:
    """Each row's share of padding; 0 of a row that has no loss."""
    mask = batch["attention_mask"]
    return (mask == 0).float().mean(dim=1) * (supervised_tokens(batch["labels"]).to(mask.device) > 0)


def room(model: nn.Module, length: int) -> int:
    """Columns of padding, half as many as there are or what the model has positions for; 0 if it does not say."""
    return max(0, min(length // 2, _longest(model) - length))


def _longest(model: nn.Module) -> int:
    """Positions that the model has, by its configuration; 0 if it does not say."""
    config: Any = getattr(model, "config", None)
    texts = [config, getattr(config, "text_config", None), getattr(config, "llm_config", None)]
    lengths = [getattr(text, name, None) for text in texts if text is not None for name in _LENGTHS]
    return max((value for value in lengths if isinstance(value, int)), default=0)


def rows_of(batch: Batch, rows: Sequence[int], by_row: bool = False) -> Batch | None:
    """Some of the batch's rows; None where the batch does not tell whose its images are.

    With `by_row`, a field whose first dimension is the batch's is taken to hold something for each row.
    """
    shape, counts = batch["labels"].shape, batch.get("entries_per_row", {})
    fields = {name: value for name, value in batch.items() if name == "labels" or name not in OWN_FIELDS}
    for name, value in fields.items():
        if not isinstance(value, Tensor):
            continue
        if name in counts:
            entries = value.split(counts[name].tolist())
            fields[name] = torch.cat([entries[row] for row in rows])
        elif value.shape == shape or (by_row and value.shape[:1] == shape[:1]):
            fields[name] = value[list(rows)]
        else:
            return None
    return {name: value for name, value in fields.items() if name not in counts or len(value)}


def most_padded(batch: Batch) -> int:
    """The row with the fewest tokens, of those that have a loss if there are any."""
    counts = batch.get("attention_mask", batch["labels"] == IGNORE_INDEX).sum(dim=1)
    silent = supervised_tokens(batch["labels"]).to(counts.device) == 0
    return int((counts + counts.max() * silent).argmin())


def telling_rows(batch: Batch) -> list[int]:
    """Three rows that show most of what a batch needs: the most padded, the one with most tokens to predict, and the
    one with most beside the text."""
    counts = [value for value in batch.get("entries_per_row", {}).values() if len(value) == len(batch["labels"])]
    images = [int(torch.stack(counts).sum(dim=0).argmax())] if counts else []
    return sorted({most_padded(batch), int(supervised_tokens(batch["labels"]).argmax()), *images})


def without_padding(batch: Batch) -> Batch:
    """A batch of one row, without what its mask hides at either end; what it hides in between keeps its positions."""
    seen, shape = batch["attention_mask"][0].nonzero().flatten().tolist(), batch["labels"].shape
    kept = slice(seen[0], seen[-1] + 1) if seen else slice(None)
    cut = {n: value[:, kept] for n, value in batch.items() if isinstance(value, Tensor) and value.shape == shape}
    return dict(batch) | cut
