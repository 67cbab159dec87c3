"""kronfluence (https://github.com/pomonam/kronfluence): EK-FAC influence, as its language-model examples set it up.

The loss that factors are fitted to is the sum over a batch of each row's mean loss; labels are sampled from the model
where a row is supervised. Every linear layer that is trained is tracked: for LoRA, A and B. Heuristic damping
(`damping_factor=None`) is 0.1 of a block's mean eigenvalue, the fixed default 1e-8.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task as Method
from kronfluence.utils.dataset import DataLoaderKwargs
from result import Job, main, mean_by_task
from task import INPUTS, collate
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 32


class RowLoss(Method):
    """Each row's mean loss over its supervised tokens."""

    def __init__(self, modules: list[str]) -> None:
        super().__init__()
        self.modules = modules

    def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(**{name: batch[name] for name in INPUTS if name in batch}).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        counted = labels != -100
        if sample:
            with torch.no_grad():
                drawn = torch.multinomial(logits.softmax(dim=-1).flatten(0, 1), 1).view_as(labels)
            labels = torch.where(counted, drawn, labels)
        each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        return (each.sum(dim=1) / counted.sum(dim=1)).sum()

    def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.modules

    def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["attention_mask"]


def factors(job: Job, strategy: str, damping: float | None, kept: bool = False, partitions: int = 1) -> np.ndarray:
    """`kept`: what a killed run has left is gone on with; its unit are the partitions of the data."""
    model = job.task.model(job.way, job.checkpoint)
    modules = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.requires_grad for part in module.parameters())
    ]  # fmt: skip
    method = RowLoss(modules)
    model = prepare_model(model=model, task=method)
    tokens = job.task.tokens
    pool: Any = tokens["pool"]
    queries: Any = [row for name in job.task.names for row in tokens[name]]
    analyzer = Analyzer("common", model, method, cpu=True, output_dir=str(job.out), disable_tqdm=True)
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=collate))
    analyzer.fit_all_factors(
        "factors", pool, per_device_batch_size=BATCH, factor_args=FactorArguments(
            strategy=strategy, covariance_data_partitions=partitions, lambda_data_partitions=partitions
        ),
        overwrite_output_dir=not kept,
    )  # fmt: skip
    analyzer.compute_pairwise_scores(
        scores_name="scores", factors_name="factors", query_dataset=queries, train_dataset=pool,
        per_device_query_batch_size=len(queries), per_device_train_batch_size=BATCH,
        score_args=ScoreArguments(damping_factor=damping, data_partitions=partitions), overwrite_output_dir=not kept,
    )  # fmt: skip
    scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    return mean_by_task(job.task, scores.numpy().T)


VARIANTS: dict[str, Callable[[Job], np.ndarray]] = {
    "ekfac": partial(factors, strategy="ekfac", damping=1e-8),
    "ekfac-heuristic": partial(factors, strategy="ekfac", damping=None),
    "kfac-heuristic": partial(factors, strategy="kfac", damping=None),
    "ekfac, as a killed run left it": partial(factors, strategy="ekfac", damping=None, kept=True),
    "ekfac, 8 partitions, as a killed run left it": partial(
        factors, strategy="ekfac", damping=None, kept=True, partitions=8
    ),
    "identity": partial(factors, strategy="identity", damping=None),
}

if __name__ == "__main__":
    main(VARIANTS)
