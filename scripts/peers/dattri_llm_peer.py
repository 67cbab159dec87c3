"""dattri-LLM (https://github.com/TRAIS-Lab/dattri-llm): its attributors' live `attribute`, as its examples call it.

The loss is the sum over a batch of each row's mean loss, so that a row's gradient is its own. Every linear layer
that is trained is captured: for LoRA, A and B. Its data sets are stacked without a collate function, so rows are padded
to the longest of all. LESS has the saved optimizers of three checkpoints, weighed by their learning rates; `less-one`
has the last.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from dattri_llm import (
    AttributionArguments,
    AttributionTask,
    EKFACAttributor,
    HookManagerConfig,
    KFACAttributor,
    LESSAttributor,
    TracInAttributor,
    hash_sample,
)
from dattri_llm.gradient.optimizer_state import optimizer_from_state_dict
from result import EPOCH, Job, main, mean_by_task
from task import INPUTS, Row, collate, losses_of
from torch import Tensor, nn
from torch.utils.data import Dataset

BATCH = 32


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of one length."""

    def __init__(self, rows: Sequence[Row], length: int) -> None:
        self.columns = collate(rows, length=length)

    def __len__(self) -> int:
        return len(self.columns["row"])

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {name: value[place] for name, value in self.columns.items()}

    def hashes(self) -> list[str]:
        """By which a row's scores are found: of what the model is called with. Rows of the same text share one."""
        rows = [self[place] for place in range(len(self))]
        return [hash_sample({name: row[name] for name in INPUTS if name in row}) for row in rows]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return losses_of(model, batch).sum()


def load(job: Job, model: nn.Module, epoch: int) -> nn.Module:
    """A checkpoint's trained parameters into the model that its hooks and optimizers hold."""
    model.load_state_dict(job.task.model(job.way, job.task.checkpoint(job.way, epoch)).state_dict())
    return model


def attribute(
    job: Job, method: Callable[..., Any], epochs: Sequence[int], kept: bool = False, dim: int | None = None,
    **options: Any,
) -> np.ndarray:  # fmt: skip
    """`kept`: gradients go to files first, where a killed run may have left some; `dim`: of both sides of a layer."""
    model = job.task.model(job.way, job.checkpoint)
    tokens = job.task.stackable(model)
    queries = [row for name in job.task.names for row in tokens[name]]
    length = max(len(row["labels"]) for row in tokens["pool"] + queries)
    train, test = Rows(tokens["pool"], length), Rows(queries, length)
    modules = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.requires_grad for part in module.parameters())
    ]  # fmt: skip
    task = AttributionTask(
        loss_func=loss, model=model, checkpoints=list(epochs), checkpoints_load_func=partial(load, job)
    )
    arguments = AttributionArguments(
        output_dir=str(job.out / "scores"), per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
        use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    projection = {"__default__": {"style": "logra", "proj_dim": dim, "proj_max_batch_size": BATCH}} if dim else None
    hooks = HookManagerConfig(
        hook_types=dict.fromkeys(modules, "linear_io"), projection_kwargs=projection,
        capture_style="materialized" if dim else "factorized",
    )  # fmt: skip
    attributor = method(arguments, task=task)
    if kept:
        [places] = attributor.cache(train, test, hook_config=hooks, cache_dir=str(job.out / "gradients"))
        scores = attributor.attribute_from_cache(*places, **options)
    else:
        scores = attributor.attribute(train, test, hook_config=hooks, **options)
    columns = scores.scores[:, [scores.test_index[name] for name in test.hashes()]]
    steps = torch.tensor(scores.row_steps)
    each = sum(columns[steps == step] for step in steps.unique().tolist())  # in each, the rows' own order
    return mean_by_task(job.task, each.numpy())


def less(job: Job, epochs: Sequence[int]) -> np.ndarray:
    """LESS's frozen form: saved optimizers at saved checkpoints, weighed by learning rates as `ours.py` weighs them."""

    def method(arguments: AttributionArguments, task: AttributionTask) -> LESSAttributor:
        saved = [
            torch.load(job.task.checkpoint(job.way, epoch) / "optimizer.pt", weights_only=True) for epoch in epochs
        ]
        optimizers = [
            optimizer_from_state_dict(task.model, one, one["param_groups"][0]["param_names"]) for one in saved
        ]
        ends = [json.loads((job.task.checkpoint(job.way, epoch) / "rate.json").read_text()) for epoch in (1, 2, 3)]
        starts = [job.task.settings["rate"][job.way], *ends]
        rates = [(starts[epoch - 1] + ends[epoch - 1]) / 2 for epoch in epochs]
        return LESSAttributor(arguments, task=task, optimizers=optimizers, checkpoint_weights=rates)

    return attribute(job, method, epochs)


VARIANTS: dict[str, Callable[[Job], np.ndarray]] = {
    "ekfac": partial(attribute, method=EKFACAttributor, epochs=(EPOCH,)),
    "ekfac-relative": partial(attribute, method=EKFACAttributor, epochs=(EPOCH,), damping=0.1, relative_damping=True),
    "kfac-relative": partial(attribute, method=KFACAttributor, epochs=(EPOCH,), damping=0.1, relative_damping=True),
    "less": partial(less, epochs=(1, 2, 3)),
    "less-one": partial(less, epochs=(EPOCH,)),
    "gradcos": partial(attribute, method=TracInAttributor, epochs=(EPOCH,), normalized_grad=True),
    "gradcos-10": partial(attribute, method=TracInAttributor, epochs=(EPOCH,), normalized_grad=True, kept=True, dim=10),
    "gradcos, as a killed run left it": partial(
        attribute, method=TracInAttributor, epochs=(EPOCH,), normalized_grad=True, kept=True
    ),
}

if __name__ == "__main__":
    main(VARIANTS)
