"""Makes a common task with images of what `icons demo` has left: its LLaVA of 1.0 M parameters and its questions.

    icons demo --out demo
    python scripts/peers/make_images.py --demo demo --out peers_images

Rows are prepared by ICONS. What is trained is a LoRA of the language model, in the loop that the text task has; wrong
answers, duplicates and text without an image are the demo's own. The same line, run again, goes on.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from make_task import make_checkpoints, retrain
from task import Task
from torch import Tensor
from training import BATCH, EPOCHS

from icons.cli.model_source import ModelSource
from icons.cli.options.groups import CheckpointOptions
from icons.datamodules.datamodule import ConversationDataModule

TASK_OF = {"colour": "colours", "shape": "shapes", "colour presence": "presence", "shape presence": "presence"}
TASKS = ("colours", "shapes", "presence", "general")
NUM_POOL, NUM_VALIDATION, SHARE = 1000, 60, 0.5
RATE = 4e-3
ADAPTER = ("r", "lora_alpha", "target_modules")


def judged(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the task that its answer counts for, and whether that is wrong: a duplicate counts for none."""
    what = record.get("provenance")
    kind = TASK_OF.get(record.get("kind", ""), "") if what in ("good", "wrong") else ""
    return record | {"kind": kind, "wrong": what == "wrong"}


def make_data(demo: Path, out: Path) -> None:
    """Records, tokens, images, and the start."""
    source = ModelSource.resolve(CheckpointOptions(checkpoint=demo / "warmup"))
    tokens: dict[str, list[dict[str, Any]]] = {}
    images: list[Tensor] = []
    for name, count in {"pool": NUM_POOL, **dict.fromkeys(TASKS, NUM_VALIDATION)}.items():
        records = json.loads((demo / f"{name}.json").read_text())[:count]
        (out / f"{name}.json").write_text(json.dumps([judged(record) for record in records], indent=0))
        data = ConversationDataModule(
            out / f"{name}.json", demo / "images", model_folder=source.folder, preprocessing=source.preprocessing
        ).dataset
        tokens[name] = []
        for place in range(count):
            row = data.collate([data[place]])
            found = {key: row[key][0].tolist() for key in ("input_ids", "labels")}
            if "pixel_values" in row:
                found["image"] = len(images)
                images.append(row["pixel_values"])
            tokens[name].append(found)
    adapter = json.loads((demo / "warmup" / "adapter_config.json").read_text())
    settings = {
        "pool": NUM_POOL, "validation": NUM_VALIDATION, "epochs": EPOCHS, "batch": BATCH, "rate": {"lora": RATE},
        "share": SHARE, "adapter": {name: adapter[name] for name in ADAPTER},
    }  # fmt: skip
    (out / "settings.json").write_text(json.dumps(settings))
    (out / "images").symlink_to((demo / "images").resolve())
    shutil.copytree(demo / "start", out / "start")
    torch.save(torch.cat(images), out / "images.pt")
    (out / "tokens.json").write_text(json.dumps(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--out", type=Path, default=Path("peers_images"))
    parser.add_argument("--subsets", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each subset, whose losses are averaged")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    task = Task(given.out)
    if not (given.out / "tokens.json").exists():
        make_data(given.demo, given.out)
    if not (task.checkpoint("lora", EPOCHS) / "rate.json").exists():
        make_checkpoints(task, "lora", None)
    for seed in range(1, given.seeds + 1):
        retrain(task, "lora", given.subsets, seed)


if __name__ == "__main__":
    main()
