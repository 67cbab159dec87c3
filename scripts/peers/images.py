"""Beside kronfluence on a model with images: the tiny LLaVA and the questions of `icons demo`.

    icons demo --out demo
    python scripts/peers/images.py --demo demo --out peers_images --python kronfluence_images=PYTHON

Both get the same rows, 1,000 of the pool and 20 of each task, and the same LoRA. ICONS runs by its commands. What is
compared: CPU seconds, process by process, and how well a row's score for its own task tells wrong answers from good
ones (the mean over kinds of questions).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table import write

from icons.cli.model_source import ModelSource
from icons.cli.options.groups import CheckpointOptions
from icons.datamodules.datamodule import ConversationDataModule
from icons.store import ScoreStore
from icons.validation.datamodel import separation, separation_interval

TASK_OF = {"colour": "colours", "shape": "shapes", "colour presence": "presence", "shape presence": "presence"}
TASKS = ("colours", "shapes", "presence", "general")
LINES = {"product, kfac, exact": ["--preconditioner", "kfac", "--normalize", "none"], "cosine, Adam, exact": []}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(line: list[object]) -> float:
    """CPU seconds of one process."""
    before = cpu_seconds()
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run(list(map(str, line)), check=True, env=os.environ | quiet)
    return cpu_seconds() - before


def make_task(demo: Path, out: Path, num_rows: int, num_queries: int) -> None:
    """Rows as JSON for `icons`, and as tensors with the whole model's weights for kronfluence."""
    source = ModelSource.resolve(CheckpointOptions(checkpoint=demo / "warmup"))
    model = source.load("lora")
    torch.save(model.state_dict(), out / "model.pt")
    for name, count in {"pool": num_rows, **dict.fromkeys(TASKS, num_queries)}.items():
        records = json.loads((demo / f"{name}.json").read_text())[:count]
        (out / f"{name}.json").write_text(json.dumps(records))
        module = ConversationDataModule(
            out / f"{name}.json", demo / "images", model_folder=source.folder, preprocessing=source.preprocessing
        )
        rows = [module.dataset.collate([module.dataset[row]]) for row in range(count)]
        kept = ("input_ids", "labels", "pixel_values")
        torch.save([{key: row[key] for key in kept if key in row} for row in rows], out / f"{name}.pt")


def area(scores: np.ndarray, records: list[dict[str, Any]]) -> str:
    """Of wrong answers below good ones, with its 95 % interval."""
    own, areas, counts = np.array([record["kind"] for record in records]), [], [0, 0]
    what = np.array([record["provenance"] for record in records])
    for kind, task in TASK_OF.items():
        wrong, good = ((own == kind) & (what == one) for one in ("wrong", "good"))
        column = scores[:, TASKS.index(task)]
        areas.append(separation(column[wrong | good], wrong[wrong | good]))
        counts = [counts[0] + int(wrong.sum()), counts[1] + int(good.sum())]
    mean = float(np.mean(areas))
    return "{:.2f} ({:.2f} to {:.2f})".format(mean, *separation_interval(mean, *counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--out", type=Path, default=Path("peers_images"))
    parser.add_argument("--table", type=Path, default=Path("peers_images") / "images.csv")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--python", required=True, help="kronfluence_images=PYTHON, the interpreter of its environment")
    given = parser.parse_args()
    out: Path = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / f"{TASKS[-1]}.pt").exists():
        make_task(given.demo, out, given.rows, given.queries)
    icons: list[object] = [sys.executable, "-m", "icons"]
    common: list[object] = [
        "--checkpoint", given.demo / "warmup", "--data", out / "pool.json", "--images", given.demo / "images",
        "--batch-size", 32, "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    factors = out / "factors.safetensors"
    seconds = {"product, kfac, exact": timed([*icons, "factors", *common, "--rows", given.rows, "--out", factors])}
    scores = {}
    tasks = [word for name in TASKS for word in ("--task", f"{name}={out / name}.json:{given.demo / 'images'}")]
    for variant, words in LINES.items():
        store = out / f"{variant}.zarr"
        more = ["--factors", factors] if variant in seconds else []
        spent = timed([*icons, "score", *common, *words, *more, *tasks, "--out", store])
        seconds[variant] = seconds.get(variant, 0) + spent
        scores["ours", variant] = ScoreStore.open(store).stored("influence", slice(None))
    tool, _, python = given.python.partition("=")
    script = Path(__file__).parent / f"{tool}.py"
    seconds["ekfac"] = timed([python, script, "--task", out, "--demo", given.demo.resolve()])
    scores["kronfluence", "ekfac"] = np.load(out / "kronfluence.npy")
    records = json.loads((out / "pool.json").read_text())
    table = [
        {"tool": tool, "variant": variant, "AUC": area(found, records), "CPU seconds": f"{seconds[variant]:.0f}"}
        for (tool, variant), found in scores.items()
    ]
    for row in table:
        print(row, flush=True)
    kfac, ekfac = scores["ours", "product, kfac, exact"], scores["kronfluence", "ekfac"]
    print("correlation of kfac and EK-FAC:", [round(float(np.corrcoef(kfac[:, at], ekfac[:, at])[0, 1]), 3)
                                              for at in range(len(TASKS))])  # fmt: skip
    write(given.table, table)


if __name__ == "__main__":
    main()
