"""dattri (https://github.com/TRAIS-Lab/dattri): cosines, DataInf, LoGra and TRAK, called as its examples do.

The loss is a row's mean over its supervised tokens; of what is trained. Its functions take stacked tensors, so rows are
padded to the longest of all. Cosines and TRAK are projected to 512 numbers, its default. Its inner loop differentiates
the tasks' rows again for each batch, so that batches are large; of the whole pool they took 10 GB. DataInf divides by
zero by default; 0.1 is what its code falls back to. LoGra's damping is that of its example.

Its EK-FAC takes no sequences (0.3.0: `UnboundLocalError: a_prev` for inputs of layers that are not `[rows, width]`).
"""

from collections.abc import Callable
from contextlib import chdir
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
    every = collate(rows, length=length)
    columns = [next(iter(every.values())), every["attention_mask"], every["labels"]]
    return DataLoader(TensorDataset(*columns), batch_size=size, shuffle=False)


def loaders(
    job: Job, model: "Called", size: int, queries_size: int | None = None
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The pool and all tasks' rows."""
    tokens = job.task.stackable(model.model)
    queries = [row for name in job.task.names for row in tokens[name]]
    length = max(len(row["labels"]) for row in tokens["pool"] + queries)
    return loader(tokens["pool"], length, size), loader(queries, length, queries_size or size)


class Called(nn.Module):
    """A model as dattri calls it: functionally, with what is trained by name."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model = job.task.model(job.way, job.checkpoint)
        self.model.config._attn_implementation = "eager"  # type: ignore[union-attr]  # the fused one is closed to vmap

    def forward(self, inputs: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        """As Hugging Face's models, with the sum of the rows' losses; of ids or of embeddings."""
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        batch = {name: inputs, "attention_mask": attention_mask, "labels": labels}
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
    batch = tuple(column[None] if data[-1].dim() == 1 else column for column in data)
    return torch.func.functional_call(model, params, batch).loss / len(batch[0])


def inner_product(job: Job, method: Callable[..., Any], **options: Any) -> np.ndarray:
    model = Called(job)
    pool, queries = loaders(job, model, LARGE, 60)  # DataInf takes queries squared of memory
    task = AttributionTask(partial(mean_loss, model), model, model.state_dict())
    attributor = method(task=task, **options)
    attributor.cache(pool)
    with torch.no_grad():
        return mean_by_task(job.task, attributor.attribute(pool, queries).numpy())


def cosine(job: Job, dim: int) -> np.ndarray:
    model = Called(job)
    pool, queries = loaders(job, model, LARGE)
    task = AttributionTask(partial(mean_loss, model), model, model.state_dict())
    attributor = TracInAttributor(
        task=task, weight_list=torch.ones(1), normalized_grad=True, projector_kwargs={"proj_dim": dim}, device="cpu"
    )
    with torch.no_grad():
        return mean_by_task(job.task, attributor.attribute(pool, queries).numpy())


def logra(job: Job, dim: int, damping: float) -> np.ndarray:
    model, names = Called(job), ("inputs", "attention_mask", "labels")
    as_dict = [
        DataLoader([dict(zip(names, row, strict=True)) for row in part.dataset], batch_size=BATCH, shuffle=False)
        for part in loaders(job, model, BATCH)
    ]
    task = AttributionTask(lambda model, batch, device: model(**batch).loss, model, model.state_dict())
    with chdir(job.out):  # where it leaves its `batch_metadata.json`, and believes the one that it finds
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
    pool, queries = loaders(job, model, BATCH)
    with torch.no_grad():
        attributor.cache(pool)
        return mean_by_task(job.task, attributor.attribute(queries).numpy())


VARIANTS: dict[str, Callable[[Job], np.ndarray]] = {
    "cosine, K 512": partial(cosine, dim=512),
    "cosine, K 5120": partial(cosine, dim=5120),
    "datainf, 0.1": partial(inner_product, method=IFAttributorDataInf, regularization=0.1),
    "datainf, 1e-4": partial(inner_product, method=IFAttributorDataInf, regularization=1e-4),
    "logra": partial(logra, dim=1024, damping=1e-2),
    "logra-100": partial(logra, dim=100, damping=1e-2),
    "trak": partial(trak, dim=512),
}

if __name__ == "__main__":
    main(VARIANTS)
