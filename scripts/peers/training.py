"""The trainings of the common task: plain loops in PyTorch that belong to no tool."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from task import Row, Task, batches, losses_of
from torch import nn

LEARNING_RATE = {"lora": 4e-3, "full": 1e-3}
EPOCHS, BATCH = 3, 16


def train(
    model: nn.Module, rows: Sequence[Row], seed: int, learning_rate: float, epochs: int, folder: Path | None = None
) -> nn.Module:
    """Adam with a linearly falling rate, all rows weighing the same; `folder`: where each epoch is saved."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, weight_decay=0.0)
    order, steps = np.random.default_rng(seed), epochs * -(-len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for epoch in range(1, epochs + 1):
        for batch in batches(rows, BATCH, order.permutation(len(rows)).tolist()):
            optimizer.zero_grad()
            losses_of(model, batch).mean().backward()
            optimizer.step()
            schedule.step()
        if folder is not None:
            place = folder / f"epoch-{epoch}"
            model.save_pretrained(place)  # type: ignore[operator]
            state = optimizer.state_dict()
            state["param_groups"][0]["param_names"] = list(trained)
            torch.save(state, place / "optimizer.pt")
            (place / "rate.json").write_text(json.dumps(optimizer.param_groups[0]["lr"]))
    return model.eval()


@torch.no_grad()
def measure(model: nn.Module, rows: Sequence[Row]) -> float:
    """Mean of the rows' losses."""
    return float(torch.cat([losses_of(model, batch) for batch in batches(rows, 256)]).mean())


def retrained(task: Task, way: str, chosen: Sequence[int], seed: int) -> list[float]:
    """Each task's loss after training the start on some of the pool's rows."""
    tokens = task.tokens
    torch.manual_seed(seed)  # of a fresh adapter
    settings = task.settings
    rows = [tokens["pool"][row] for row in chosen]
    model = train(task.model(way), rows, seed, settings["rate"][way], settings["epochs"])
    return [measure(model, tokens[name]) for name in task.names]
