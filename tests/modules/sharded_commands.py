"""`icons warmup`, `icons score` and `icons factors` on a tiny LLaVA, by one process or by ranks that share it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from icons.cli import command_line as cli

DATA = Path(__file__).parents[1] / "data" / "original_llava"
ROWS = 9


def write_data(folder: Path) -> Path:
    """Rows with an image, without, and one that cannot be read; answers of one length, so that the mean over a batch's
    tokens is the mean of its rows' means."""
    records: list[Any] = []
    for row in range(ROWS):
        question = f"What is number {'7' * (row + 1)}?"
        image = {"image": f"img{row % 2}.png"} if row % 3 else {}
        turns = [{"from": "human", "value": f"<image>\n{question}" if image else question}]
        records.append({"id": row, **image, "conversations": [*turns, {"from": "gpt", "value": "hi"}]})
    file = folder / "data.json"
    file.write_text(json.dumps(records))
    (folder / "broken.json").write_text(json.dumps([*records[:4], {"id": "broken"}, *records[4:]]))
    return file


def warm_up(folder: Path, out: Path, ranks: int, strategy: str = "auto") -> int:
    """Trains for two epochs, four rows a step whatever the number of ranks."""
    given: dict[str, Any] = {
        "model": DATA / "vicuna-tiny", "vision-tower": DATA / "clip", "mm-projector": DATA / "mm_projector.bin",
        "data": folder / "data.json", "images": DATA, "fraction": 1.0, "held-out": 0.0, "lora-rank": 2,
        "lora-dropout": 0.0, "learning-rate": 1e-2, "batch-size": 4 // ranks, "epochs": 2, "out": out,
        "task": f"held={DATA / 'data.json'}:{DATA}",
    }  # fmt: skip
    return run("warmup", given, {"devices": ranks, "strategy": strategy})


def score(folder: Path, out: Path, **trainer: object) -> int:
    given: dict[str, Any] = {
        "checkpoint": folder / "alone", "data": folder / "broken.json", "images": DATA, "chunk-rows": 2,
        "batch-size": 2, "task": f"held={DATA / 'data.json'}:{DATA}", "out": out, "dim": 64,
        "keep-gradients": out.with_suffix(".kept"),
    }  # fmt: skip
    return run("score", given, trainer)


def factors(folder: Path, out: Path, **trainer: object) -> int:
    given = {
        "checkpoint": folder / "alone",
        "data": folder / "broken.json",
        "images": DATA,
        "batch-size": 2,
        "out": out,
    }
    return run("factors", given, trainer)


def run(command: str, given: dict[str, Any], trainer: Mapping[str, object]) -> int:
    flags = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False} | trainer
    given |= {f"trainer.{flag}": value for flag, value in flags.items()}
    return cli.main([command, *(f"--{name}={value}" for name, value in given.items())])


def warm_up_rank(folder: Path, ranks: int, strategy: str) -> None:
    """One rank's part: what it prints goes where errors go."""
    os.dup2(2, 1)
    torch.set_num_threads(1)
    assert warm_up(folder, folder / strategy, ranks, strategy) == 0


def on_two_nodes(folder: Path) -> None:
    """One rank's part on two nodes of two."""
    os.dup2(2, 1)
    torch.set_num_threads(1)
    nodes = {"devices": 2, "num_nodes": 2, "strategy": "model_parallel_hybrid"}
    assert score(folder, folder / "ranks.zarr", **nodes) == 0
    assert factors(folder, folder / "ranks.safetensors", **nodes) == 0
