"""TRAK (https://github.com/MadryLab/trak) with its own BasicProjector, which is what it takes on a CPU.

The model's output is the margin of a row's answer: the mean over its supervised tokens of log p / (1 - p), as its text
example has it for the label alone; gradients are taken of what is trained. One checkpoint, or those of three epochs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from result import EPOCH, Job, main, mean_by_task
from task import Row, collate
from torch import Tensor, nn
from torch.nn import functional as F
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput

BATCH = 16


def token_odds(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log odds and probability of each supervised token, 0 elsewhere; labels already shifted."""
    counted = labels != -100
    known = labels.clamp(min=0)
    log_p = -F.cross_entropy(logits.transpose(1, 2), known, reduction="none")
    right = torch.arange(logits.shape[-1]) == known[..., None]
    others = logits.masked_fill(right, -torch.inf).logsumexp(dim=-1) - logits.logsumexp(dim=-1)
    return (log_p - others) * counted, log_p.exp() * counted


def arguments(inputs: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """Of the model, for ids or embeddings."""
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    return {name: inputs, "attention_mask": attention_mask, "use_cache": False}


class AnswerMargin(AbstractModelOutput):
    """Mean log odds of the answer's tokens."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(
        model: nn.Module, weights: Any, buffers: Any, inputs: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> Tensor:
        called = arguments(inputs[None], attention_mask[None])
        logits = torch.func.functional_call(model, (weights, buffers), args=(), kwargs=called).logits
        shifted = labels[None, 1:]
        odds, _ = token_odds(logits[:, :-1], shifted)
        return odds.sum() / (shifted != -100).sum()

    def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
        inputs, attention_mask, labels = batch
        called = arguments(inputs, attention_mask)
        logits = torch.func.functional_call(model, (weights, buffers), args=(), kwargs=called).logits
        _, p = token_odds(logits[:, :-1], labels[:, 1:])
        counted = (labels[:, 1:] != -100).sum(dim=1)
        return (1 - p.sum(dim=1) / counted).detach()[:, None]


def of(rows: list[Row]) -> Any:
    for begin in range(0, len(rows), BATCH):
        batch = collate(rows[begin : begin + BATCH])
        yield next(iter(batch.values())), batch["attention_mask"], batch["labels"]


def trak(job: Job, dim: int, epochs: tuple[int, ...]) -> np.ndarray:
    models = [job.task.model(job.way, job.task.checkpoint(job.way, epoch)) for epoch in epochs]
    tokens = job.task.stackable(models[0])
    pool, queries = tokens["pool"], [row for name in job.task.names for row in tokens[name]]
    for model in models:
        model.config._attn_implementation = "eager"  # vmap cannot see through the fused kernel's mask
    names = [name for name, value in models[0].named_parameters() if value.requires_grad]
    traker = TRAKer(
        model=models[0], task=AnswerMargin(), train_set_size=len(pool), save_dir=str(job.out / "trak"), device="cpu",
        proj_dim=dim, use_half_precision=False, grad_wrt=names,
    )  # fmt: skip
    for number, model in enumerate(models):
        traker.load_checkpoint(dict(model.state_dict()), model_id=number)
        for batch in of(pool):
            traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for number, model in enumerate(models):
        traker.start_scoring_checkpoint("tasks", dict(model.state_dict()), model_id=number, num_targets=len(queries))
        for batch in of(queries):
            traker.score(batch=batch, num_samples=len(batch[0]))
    return mean_by_task(job.task, np.asarray(traker.finalize_scores("tasks")))


VARIANTS: dict[str, Callable[[Job], np.ndarray]] = {
    "trak": partial(trak, dim=512, epochs=(EPOCH,)),
    "trak-2048": partial(trak, dim=2048, epochs=(EPOCH,)),
    "trak-5120": partial(trak, dim=5120, epochs=(EPOCH,)),
    "trak-three": partial(trak, dim=512, epochs=(1, 2, 3)),
}

if __name__ == "__main__":
    main(VARIANTS)
