"""UnitBatchSampler: the batches of a rank's write units, unit after unit, each batch inside one unit."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from icons.interruption import ignore
from icons.partition import UnitPlan, form_batches


class UnitBatchSampler(Sampler[list[int]]):
    """Batches of rows, formed inside one unit from the lengths of its rows alone.

    Args:
        plan: the units to go through, in its order.
        lengths: tokens of each of the given rows, as the model will see them (images expanded).
        batch_size: most rows per batch.
        max_tokens: most tokens per batch, padding included; None: no limit.

    It has no `len()`: the number of batches follows from the length of every row, and to measure all rows of a large
    data file before the first is computed would take longer than it is worth. Progress is counted in
    rows (`icons.modules.progress`).
    """

    def __init__(
        self,
        plan: UnitPlan,
        lengths: Callable[[Sequence[int]], list[int]],
        batch_size: int,
        max_tokens: int | None = None,
    ) -> None:
        self.plan, self.lengths, self.batch_rows, self.max_tokens = plan, lengths, batch_size, max_tokens

    def __iter__(self) -> Iterator[list[int]]:
        for unit in self.plan.claimed():
            rows = self.plan.partition.unit_rows(unit)
            yield from form_batches(rows, self.lengths(rows), self.batch_rows, self.max_tokens)


class RowsDataset(Dataset[list[Any]]):
    """A data set asked for a whole batch of rows at once: what a DataLoader with `batch_size=None` needs."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, rows: Sequence[int]) -> list[Any]:
        return [self.dataset[row] for row in rows]

    def __len__(self) -> int:
        return len(self.dataset)


def unit_dataloader(
    dataset: Any, sampler: UnitBatchSampler, collate: Callable[[list[Any]], Any], **options: Any
) -> "DataLoader[Any]":
    """A DataLoader over the batches of `sampler`, for `predict_dataloader`.

    The sampler stands where PyTorch has it for ready-made batches (`sampler=`, `batch_size=None`), not as
    `batch_sampler=`: Lightning would wrap that one to remember the rows of every batch it has ever seen.

    Args:
        dataset: `dataset[row]` is one sample.
        sampler: yields the rows of each batch.
        collate: makes a batch out of a list of samples.
        options: further arguments of DataLoader (`num_workers`, `pin_memory`, ...).
    """
    options.setdefault("worker_init_fn", ignore)
    return DataLoader(RowsDataset(dataset), sampler=sampler, batch_size=None, collate_fn=collate, **options)
