"""dattri (https://github.com/TRAIS-Lab/dattri): cosines, DataInf, LoGra and TRAK, called as its examples do.

The loss is a row's mean over its supervised tokens; of what is trained. Its functions take stacked tensors, so rows are
padded to the longest of all. Cosines and TRAK are projected to 512 numbers, its default. Its inner loop differentiates
the tasks' rows again for each batch, so that batches are large; of the whole pool they took 10 GB. DataInf divides by
zero by default; 0.1 is what its code falls back to. LoGra's damping is that of its example.

Its EK-FAC takes no sequences (0.3.0: `UnboundLocalError: a_prev` for inputs of layers that are not `[rows, width]`).
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from dattri.algorithm import IFAttributorDataInf, LoGraAttributor, TracInAttributor, TRAKAttributor
from dattri.task import AttributionTask
from result import Job, main, mean_by_task
from task import Row, collate, losses_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH, LARGE = 32, 250
Columns = tuple[Tensor, ...]


def loader(rows: list[Row], length: int, size: int) -> DataLoader[Any]:
    """Rows of one length, in batches."""
    every = collate([*rows, {"input_ids": [0] * length, "labels": [-100] * length}])
    columns = [every[name][:-1] for name in ("input_ids", "attention_mask", "labels")]
    return DataLoader(TensorDataset(*columns), batch_size=size, shuffle=False)


def loaders(job: Job, size: int, queries_size: int | None = None) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The pool and all tasks' rows."""
    tokens = job.task.tokens
    queries = [row for name in job.task.names for row in tokens[name]]
    length = max(len(row["input_ids"]) for row in tokens["pool"] + queries)
    return loader(tokens["pool"], length, size), loader(queries, length, queries_size or size)


class Called(nn.Module):
    """A model as dattri calls it: functionally, with what is trained by name."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model = job.task.model(job.way, job.checkpoint)
        self.model.config._attn_implementation = "eager"  # type: ignore[union-attr]  # the fused one is closed to vmap

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        """As Hugging Face's models, with the sum of the rows' losses."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return SimpleNamespace(loss=losses_of(self.model, batch).sum())

    @property
    def trained(self) -> list[str]:
        """Modules."""
        return [
            name for name, module in self.named_modules()
            if isinstance(module, nn.Linear) and any(part.requires_grad for part in module.parameters())
        ]  # fmt: skip


def mean_loss(model: Called, params: dict[str, Tensor], data: Columns) -> Tensor:
    """Mean over a batch, or of one row: some of its attributors hand over `[1, length]`, some `[length]`."""
    batch = tuple(column.view(-1, column.shape[-1]) for column in data)
    return torch.func.functional_call(model, params, batch).loss / len(batch[0])


def inner_product(job: Job, method: Callable[..., Any], **options: Any) -> np.ndarray:
    model, (pool, queries) = Called(job), loaders(job, LARGE, 60)  # DataInf takes queries squared of memory
    task = AttributionTask(partial(mean_loss, model), model, model.state_dict())
    attributor = method(task=task, **options)
    attributor.cache(pool)
    with torch.no_grad():
        return mean_by_task(job.task, attributor.attribute(pool, queries).numpy())


def cosine(job: Job) -> np.ndarray:
    model, (pool, queries) = Called(job), loaders(job, LARGE)
    task = AttributionTask(partial(mean_loss, model), model, model.state_dict())
    attributor = TracInAttributor(task=task, weight_list=torch.ones(1), normalized_grad=True, device="cpu")
    with torch.no_grad():
        return mean_by_task(job.task, attributor.attribute(pool, queries).numpy())


def logra(job: Job, dim: int, damping: float) -> np.ndarray:
    model, names = Called(job), ("input_ids", "attention_mask", "labels")
    as_dict = [
        DataLoader([dict(zip(names, row, strict=True)) for row in part.dataset], batch_size=BATCH, shuffle=False)
        for part in loaders(job, BATCH)
    ]
    task = AttributionTask(lambda model, batch, device: model(**batch).loss, model, model.state_dict())
    attributor = LoGraAttributor(task=task, layer_names=model.trained, proj_dim=dim, damping=damping)
    attributor.cache(as_dict[0])
    return mean_by_task(job.task, attributor.attribute(*as_dict).detach().numpy())


def trak(job: Job, dim: int) -> np.ndarray:
    model = Called(job)

    def odds(params: dict[str, Tensor], row: Columns) -> Tensor:
        log_p = -mean_loss(model, params, row)
        return log_p - torch.log(1 - torch.exp(log_p))

    def probability(params: dict[str, Tensor], row: Columns) -> Tensor:
        return torch.exp(-mean_loss(model, params, row))

    attributor = TRAKAttributor(
        task=AttributionTask(odds, model, model.state_dict()), correct_probability_func=probability,
        projector_kwargs={"proj_dim": dim, "device": "cpu"},
    )  # fmt: skip
    pool, queries = loaders(job, BATCH)
    with torch.no_grad():
        attributor.cache(pool)
        return mean_by_task(job.task, attributor.attribute(queries).numpy())


VARIANTS: dict[str, Callable[[Job], np.ndarray]] = {
    "cosine, K 512": cosine,
    "datainf, 0.1": partial(inner_product, method=IFAttributorDataInf, regularization=0.1),
    "datainf, 1e-4": partial(inner_product, method=IFAttributorDataInf, regularization=1e-4),
    "logra": partial(logra, dim=1024, damping=1e-2),
    "trak": partial(trak, dim=512),
}

if __name__ == "__main__":
    main(VARIANTS)
