"""How often do 95 % intervals hold the exact score? Many projections of real gradients; makes docs/measured.md's table.

    python scripts/peers/make_task.py --out peers_task --subsets 0
    python scripts/peers/coverage.py --task peers_task --seeds 300 --out scripts/peers/coverage.csv

Gradients of the common task's model with respect to its adapter: 40 training rows through Adam's preconditioner, four
tasks of 8 validation rows as they are. Exact scores come from the whole gradients in float64. Outlier features: two
channels of every layer's normalisation weigh 30 times as much, as in large models, and gradients are that model's.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from table import write
from task import Task, batches
from torch import Tensor, nn

from icons.gradients import per_sample_gradients
from icons.models.adam_state import load_adam_state
from icons.projection import PROJECTORS, Projector
from icons.scores import Scorer
from icons.scores.rows import ArrayRows

SETTINGS = ("outliers", "projector", "K", "checkpoints")
NUM_TRAIN, NUM_VALIDATION, OUTLIER = 40, 8, 30.0
PLANS: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = [  # projector, dims, checkpoints
    ("count_sketch", (64, 256, 1024, 5120), (3,)),
    ("count_sketch", (256, 5120), (1, 2, 3)),
    ("rademacher", (256,), (3,)),
]


class Rows:
    """Whole gradients `[rows, P]` of one checkpoint, and their projections."""

    def __init__(self, whole: Tensor, shapes: dict[str, torch.Size]) -> None:
        self.whole, self.shapes = whole, shapes
        self.norm = whole.double().norm(dim=1)

    def project(self, projector: Projector) -> ArrayRows:
        total, begin = projector.start(len(self.whole), self.shapes, torch.device("cpu")), 0
        for name, shape in self.shapes.items():
            block = self.whole[:, begin : begin + shape.numel()].unflatten(1, shape)
            sign = projector.sign(name, shape, block.device)
            projector.add(total, name, block if sign is None else block * sign)
            begin += shape.numel()
        rows = ArrayRows(total)
        rows.norm = self.norm.float().numpy()
        rows.manifest = {"projector": projector.describe()}
        return rows


def gradients(task: Task, epoch: int, outliers: bool) -> dict[str, Rows]:
    """`pool` and tasks at one checkpoint."""
    folder = task.checkpoint("lora", epoch)
    model: nn.Module = task.model("lora", folder)
    if outliers:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "layernorm" in name:
                    weight[[7, 50]] *= OUTLIER
    shapes = {name: value.shape for name, value in model.named_parameters() if value.requires_grad}
    adam, found = load_adam_state(folder, model), {}
    for name, rows in task.tokens.items():
        chosen = rows[: NUM_TRAIN if name == "pool" else NUM_VALIDATION]
        whole = torch.cat([per_sample_gradients(model, batch) for batch in batches(chosen, 16)])
        if name == "pool":
            begin, parts = 0, []
            for parameter, shape in shapes.items():
                block = whole[:, begin : begin + shape.numel()].unflatten(1, shape)
                parts.append(adam.apply(parameter, block.clone()).flatten(1))
                begin += shape.numel()
            whole = torch.cat(parts, dim=1)
        found[name] = Rows(whole, shapes)
    return found


def exact(checkpoints: Sequence[dict[str, Rows]], tasks: Sequence[str], normalize: str) -> np.ndarray:
    """Mean over checkpoints of the mean cosine, or product, with each task's rows, `[rows, tasks]` float64."""
    scores = []
    for rows in checkpoints:
        sides = {name: part.whole.double() for name, part in rows.items()}
        if normalize != "none":
            sides = {name: side / side.norm(dim=1, keepdim=True) for name, side in sides.items()}
        scores.append(torch.stack([(sides["pool"] @ sides[name].T).mean(dim=1) for name in tasks], dim=1))
    return torch.stack(scores).mean(dim=0).numpy()


def covered(
    checkpoints: Sequence[dict[str, Rows]], tasks: Sequence[str], kind: str, dim: int, seeds: int
) -> dict[str, str]:
    """Share of the exact scores inside, per normalisation, with its standard error over projections."""
    truth = {name: exact(checkpoints, tasks, name) for name in ("projected", "exact", "none")}
    hits: dict[str, list[float]] = {name: [] for name in truth}
    for seed in range(seeds):
        projector = PROJECTORS[kind](dim, seed)
        sides = [{name: part.project(projector) for name, part in rows.items()} for rows in checkpoints]
        for normalize, found in hits.items():
            scorer = Scorer.of(
                [side["pool"] for side in sides],
                {name: [side[name] for side in sides] for name in tasks},
                normalize=normalize,  # type: ignore[arg-type]
            )
            (part,) = scorer.score(range(scorer.num_rows))
            inside = np.abs(part.influence.numpy() - truth[normalize]) <= 1.96 * part.stderr.numpy()
            found.append(float(inside.mean()))
    return {
        name: f"{100 * np.mean(found):.1f} ± {196 * np.std(found) / len(found) ** 0.5:.1f}"
        for name, found in hits.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", type=Path, default=Path("peers_task"))
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("scripts/peers/coverage.csv"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    task, table = Task(given.task), read(given.out)
    done = {tuple(row[name] for name in SETTINGS) for row in table}
    for outliers in ("no", "yes"):
        known = {epoch: gradients(task, epoch, outliers == "yes") for epoch in (1, 2, 3)}
        for kind, dims, epochs in PLANS:
            for dim in dims:
                settings = dict(zip(SETTINGS, (outliers, kind, str(dim), str(len(epochs))), strict=True))
                if tuple(settings.values()) in done:
                    continue
                found = covered([known[epoch] for epoch in epochs], task.names, kind, dim, given.seeds)
                row = settings | found
                print(row, flush=True)
                table.append(row)
                write(given.out, table)


def read(file: Path) -> list[dict[str, str]]:
    """The table as far as it is made; none yet: empty."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


if __name__ == "__main__":
    main()
