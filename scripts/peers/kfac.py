"""What do eigenvalues of their own add to `--preconditioner kfac`? On the common task's adapter, in memory.

    python scripts/peers/kfac.py --task peers_task --out peers_run/ours

Tasks' mean gradients are multiplied by the inverse of a Fisher matrix, training rows stay as they are (an influence
function). The matrix is that of the pool's labels (`labels`: one pass tells it beside the gradients) or of labels drawn
from the model (`drawn`: a pass of its own). Its eigenvectors: none (a diagonal); those of the factor of size r x r
alone; or of both Kronecker factors (EK-FAC, George et al. 2018). Its eigenvalues are the mean squared gradients in that
basis, damped by a share of their mean.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from task import RANK, Row, Task, batches, losses_of
from torch import Tensor, nn

from icons.gradients import per_sample_gradients

DAMPING = (0.1, 0.001)
FORMS = ("diagonal", "small factor", "both factors")
Blocks = dict[str, Tensor]


@torch.no_grad()
def drawn_rows(model: nn.Module, rows: Sequence[Row]) -> list[Row]:
    """The rows with answers drawn from the model, token by token, in place of their labels (inputs stay)."""
    found, generator = [], torch.Generator().manual_seed(0)
    for row in rows:
        chances = model(torch.tensor([row["input_ids"]])).logits[0, :-1].softmax(dim=-1)
        drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].tolist()
        labels = [new if old != -100 else -100 for new, old in zip(drawn, row["labels"][1:], strict=True)]
        found.append({"input_ids": row["input_ids"], "labels": [-100, *labels]})
    return found


def factors(model: nn.Module, rows: Sequence[Row]) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each trained linear layer: inputs' and output gradients' second moments over tokens that have a gradient."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []

    def listen(module: nn.Linear, key: str) -> None:
        moments = (
            torch.zeros(module.in_features, module.in_features),
            torch.zeros(module.out_features, module.out_features),
        )
        found[key] = moments

        def forward(_: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
            inputs = given[0].detach().flatten(0, 1)

            def backward(gradient: Tensor) -> None:
                flat = gradient.flatten(0, 1)
                counted = flat.square().sum(dim=1) > 0
                moments[0].add_(inputs[counted].T @ inputs[counted])
                moments[1].add_(flat.T @ flat)

            output.register_hook(backward)

        hooks.append(module.register_forward_hook(forward))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            listen(module, f"{name}.weight")
    for batch in batches(rows, 32):
        losses_of(model, batch).sum().backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return found


def whole(model: nn.Module, rows: Sequence[Row]) -> Blocks:
    """Per-sample gradients of each parameter, `[rows, *shape]`."""
    stacked = torch.cat([per_sample_gradients(model, batch) for batch in batches(rows, 32)])
    shapes = {name: value.shape for name, value in model.named_parameters() if value.requires_grad}
    pieces = stacked.split([shape.numel() for shape in shapes.values()], dim=1)
    return {name: piece.unflatten(1, shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}


def basis(moment: Tensor, rotated: bool) -> Tensor | None:
    return torch.linalg.eigh(moment.double())[1].float() if rotated else None


def turned(blocks: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """`left.T @ block @ right` of each block; None: the identity."""
    blocks = blocks if left is None else left.T @ blocks
    return blocks if right is None else blocks @ right


def influences(task: Task, epoch: int) -> dict[str, Tensor]:
    """Name of a variant -> scores `[rows, tasks]` at one checkpoint."""
    model = task.model("lora", task.checkpoint("lora", epoch))
    rows = task.tokens["pool"]
    pool = whole(model, rows)
    means = {
        name: {key: block.mean(dim=0) for key, block in whole(model, task.tokens[name]).items()} for name in task.names
    }
    found: dict[str, Tensor] = {}
    for which in ("labels", "drawn"):
        fitted = rows if which == "labels" else drawn_rows(model, rows)
        moments, curved = factors(model, fitted), pool if which == "labels" else whole(model, fitted)
        for form in FORMS:
            for key, block in pool.items():
                a, g = (
                    basis(moment, form == "both factors" or (form == "small factor" and len(moment) == RANK))
                    for moment in moments[key]
                )
                value = turned(curved[key], g, a).square().mean(dim=0)
                sides = turned(torch.stack([means[name][key] for name in task.names]), g, a)
                for damping in DAMPING:
                    solved = turned(
                        sides / (value + damping * value.mean()), None if g is None else g.T, None if a is None else a.T
                    )
                    name = f"inverse Fisher, {form}, {which}, damping {damping}"
                    part = block.flatten(1) @ solved.flatten(1).T
                    found[name] = found[name] + part if name in found else part
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--task", type=Path, default=Path("peers_task"))
    parser.add_argument("--out", type=Path, default=Path("peers_run/ours"))
    parser.add_argument("--epochs", type=int, nargs="+", default=[3], help="checkpoints, whose scores are averaged")
    given = parser.parse_args()
    torch.set_num_threads(1)
    task = Task(given.task)
    each = [influences(task, epoch) for epoch in given.epochs]
    suffix = "" if len(each) == 1 else f", {len(each)} checkpoints"
    for name in each[0]:
        scores = torch.stack([one[name] for one in each]).mean(dim=0)
        folder = given.out / "lora" / f"{name}{suffix}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "scores.npy", scores.numpy())


if __name__ == "__main__":
    main()
