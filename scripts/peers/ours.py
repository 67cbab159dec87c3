"""ICONS, by its library, on the common task.

Names: what is compared (cosine, or product), the preconditioner of the training rows, `exact` or the projection's K,
checkpoints (the last, or those of all epochs, weighed alike or by their learning rates as LESS does). `kfac` is made of
all of the pool's rows, with labels drawn from the model, whole covariances and damping 0.1 where it says nothing else.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from result import EPOCH, Job, main
from task import Row, batches
from torch import Tensor, nn

from icons.cli import call
from icons.gradients import TaskMatrix, projected_gradients, scored_gradients, weighted_gradient
from icons.gradients.covariances import CovarianceSums, covariance_sums, with_drawn_labels
from icons.kronecker import KroneckerFactors, KroneckerPreconditioner
from icons.models.adam_state import load_adam_state
from icons.preconditioner import Preconditioner, Sign
from icons.projection import CountSketch
from icons.scores import Scorer
from icons.store import ScoreStore

BATCH = 32


@dataclass(frozen=True)
class Curvature:
    """A form of `--preconditioner kfac`: its options; `root`, as stores of projected rows have it."""

    labels: str = "drawn"
    width: int = 1024
    damping: float = 0.1
    root: bool = False


def kfac(form: Curvature, model: nn.Module, rows: Sequence[Row]) -> KroneckerPreconditioner:
    """The preconditioner, made of these rows as `icons factors` makes it."""
    sums, begin = CovarianceSums(), 0
    for batch in batches(rows, BATCH):
        batch["row"] = batch["row"] + begin
        begin += len(batch["row"])
        sums.add(
            covariance_sums(model, with_drawn_labels(model, batch) if form.labels == "drawn" else batch, form.width)
        )
    shapes = {name: value.shape for name, value in model.named_parameters() if value.requires_grad}
    return KroneckerPreconditioner(KroneckerFactors.of(sums, shapes), form.damping, form.root)


def preconditioner(form: str | Curvature, job: Job, folder: Path, model: nn.Module) -> Preconditioner | None:
    if isinstance(form, Curvature):
        return kfac(form, model, job.task.tokens["pool"])
    if form in ("none", "sign"):
        return Sign() if form == "sign" else None
    return load_adam_state(folder, model, form=form)  # type: ignore[arg-type]


def task_vector(model: nn.Module, rows: Sequence[Row], cosine: bool) -> dict[str, Tensor]:
    """Mean of a task's gradients, of unit length each if cosines are wanted."""
    nothing = TaskMatrix(model, [])
    total: dict[str, Tensor] = {}
    for batch in batches(rows, BATCH):
        weights = torch.ones(len(batch["row"]))
        if cosine:
            _, norm, _ = scored_gradients(model, batch, nothing)
            weights = 1 / norm
        for name, value in weighted_gradient(model, batch, weights / len(rows)).items():
            total[name] = total[name] + value if name in total else value
    return total


def exact(job: Job, form: str | Curvature, epoch: int, cosine: bool) -> np.ndarray:
    """Scores without any projection at one checkpoint."""
    folder, tokens = job.task.checkpoint(job.way, epoch), job.task.tokens
    model = job.task.model(job.way, folder)
    vectors: list[Mapping[str, Tensor]] = [task_vector(model, tokens[name], cosine) for name in job.task.names]
    tasks, ours, found = TaskMatrix(model, vectors), preconditioner(form, job, folder, model), []
    for batch in batches(tokens["pool"], BATCH):
        product, norm, _ = scored_gradients(model, batch, tasks, ours)
        found.append(product / norm[:, None] if cosine else product)
    return torch.cat(found).numpy()


def several(job: Job, form: str | Curvature, weights: str = "mean", cosine: bool = True) -> np.ndarray:
    """Exact scores at the checkpoints of all epochs."""
    rates = [1.0, 1.0, 1.0]
    if weights == "rate":  # the mean rate of each epoch, which falls in a line to the rate at its end
        ends = [json.loads((job.task.checkpoint(job.way, epoch) / "rate.json").read_text()) for epoch in (1, 2, 3)]
        starts = [job.task.settings["rate"][job.way], *ends]
        rates = [(start + end) / 2 for start, end in zip(starts, ends, strict=False)]
    parts = [rate * exact(job, form, epoch, cosine) for epoch, rate in zip((1, 2, 3), rates, strict=True)]
    return np.sum(parts, axis=0) / sum(rates)


def projected(job: Job, form: str | Curvature, dim: int, **options: Any) -> np.ndarray:
    """Scores from projected rows, as `icons gradients` and `icons influence` make them."""
    folder, tokens = job.checkpoint, job.task.tokens
    model = job.task.model(job.way, folder)
    root = isinstance(form, Curvature) and form.root
    projector, ours = CountSketch(dim), preconditioner(form, job, folder, model)
    rows = {
        name: torch.cat([
            projected_gradients(model, batch, projector, ours if name == "pool" or root else None).gradient
            for batch in batches(part, BATCH)
        ])
        for name, part in tokens.items()
    }  # fmt: skip
    scorer = Scorer.of(rows.pop("pool"), rows, **options)
    return torch.cat([part.influence for part in scorer.score(range(scorer.num_rows))]).numpy()


def command_line(job: Job, dim: int, curved: bool = False, **batches: int) -> np.ndarray:
    """`icons gradients` into stores, `icons influence` from them; for LoRA, as the command line has it.

    `batches`: its options, if it is not to form its own; `curved`: `icons factors` of all rows first, and inner
    products in place of cosines.
    """
    model: dict[str, Any] = {
        "model": job.task.folder / "start", "adapter": job.checkpoint, "template": "chat", **batches,
        "trainer": {"accelerator": "cpu"},
    } | ({"images": images} if (images := job.task.folder / "images").exists() else {})  # fmt: skip
    factors = {"factors": job.out / "factors.safetensors"} if curved else {}
    if curved:
        done("factors", data=job.task.folder / "pool.json", out=factors["factors"], rows=None, **model)
    moments = {"optimizer_state": job.checkpoint / "optimizer.pt"}
    for name in ("pool", *job.task.names):
        training = factors if curved else moments if name == "pool" else {}
        done(
            "gradients", data=job.task.folder / f"{name}.json", out=str(job.out / f"{name}.zarr"), dim=dim,
            task=name != "pool", **model, **training,
        )  # fmt: skip
    tasks = [f"{name}={job.out / name}.zarr" for name in job.task.names]
    plain = {"normalize": "none", "task_normalize": "none"} if curved else {}
    done("influence", train=[str(job.out / "pool.zarr")], task=tasks, out=str(job.out / "scores.zarr"), **plain)
    return ScoreStore.open(job.out / "scores.zarr").stored("influence", slice(None))


def done(command: str, **options: Any) -> None:
    if status := call(command, **options):
        raise RuntimeError(f"icons {command}: exit status {status}")


VARIANTS: dict[str, Callable[[Job], np.ndarray]] = {
    "cosine, Adam, exact": partial(exact, form="adam", epoch=EPOCH, cosine=True),
    "cosine, diagonal, exact": partial(exact, form="diagonal", epoch=EPOCH, cosine=True),
    "cosine, sign, exact": partial(exact, form="sign", epoch=EPOCH, cosine=True),
    "cosine, none, exact": partial(exact, form="none", epoch=EPOCH, cosine=True),
    "product, Adam, exact": partial(exact, form="adam", epoch=EPOCH, cosine=False),
    "product, none, exact": partial(exact, form="none", epoch=EPOCH, cosine=False),
    "product, diagonal, exact": partial(exact, form="diagonal", epoch=EPOCH, cosine=False),
    "cosine, Adam, exact, 3 checkpoints": partial(several, form="adam"),
    "cosine, diagonal, exact, 3 checkpoints": partial(several, form="diagonal"),
    "LESS's formula": partial(several, form="adam", weights="rate"),
    "product, kfac, exact": partial(exact, form=Curvature(), epoch=EPOCH, cosine=False),
    "product, kfac, damping 0.01, exact": partial(exact, form=Curvature(damping=0.01), epoch=EPOCH, cosine=False),
    "product, kfac, damping 0.001, exact": partial(exact, form=Curvature(damping=0.001), epoch=EPOCH, cosine=False),
    "product, kfac, own labels, exact": partial(exact, form=Curvature(labels="own"), epoch=EPOCH, cosine=False),
    "product, kfac, width 8, exact": partial(exact, form=Curvature(width=8), epoch=EPOCH, cosine=False),
    "product, kfac, width 0, exact": partial(exact, form=Curvature(width=0), epoch=EPOCH, cosine=False),
    "product, kfac, exact, 3 checkpoints": partial(several, form=Curvature(), cosine=False),
    "product, kfac, K 5120": partial(
        projected, form=Curvature(root=True), dim=5120, normalize="none", task_normalize="none"
    ),
    "product, kfac, K 1024": partial(
        projected, form=Curvature(root=True), dim=1024, normalize="none", task_normalize="none"
    ),
    "product, kfac, not its root, K 5120": partial(
        projected, form=Curvature(), dim=5120, normalize="none", task_normalize="none"
    ),
    "cosine, kfac, exact, 3 checkpoints": partial(several, form=Curvature()),
    "cosine, kfac, K 5120": partial(projected, form=Curvature(root=True), dim=5120),
    "cosine, kfac, exact": partial(exact, form=Curvature(), epoch=EPOCH, cosine=True),
    "command line": partial(command_line, dim=5120, batch_size=BATCH),
    "command line, its own batches": partial(command_line, dim=5120),
    "command line, 2,048 tokens": partial(command_line, dim=5120, batch_size=1000, max_tokens=2048),
    "command line, kfac": partial(command_line, dim=5120, batch_size=BATCH, curved=True),
    "cosine, Adam, K 5120": partial(projected, form="adam", dim=5120),
    "cosine, Adam, K 1024": partial(projected, form="adam", dim=1024),
    "cosine, Adam, K 5120, subspace 0.9": partial(projected, form="adam", dim=5120, subspace=0.9),
    "cosine, diagonal, K 5120, subspace 0.9": partial(projected, form="diagonal", dim=5120, subspace=0.9),
}

if __name__ == "__main__":
    main(VARIANTS)
