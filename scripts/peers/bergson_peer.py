"""bergson (https://github.com/EleutherAI/bergson), by its command line.

Losses are means over a row's tokens (`--loss_reduction mean`), as the common task trains; the rest is bergson's default
unless a variant says so. Scores on each validation row are averaged per task.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bergson.data import load_gradients, load_scores
from datasets import Dataset
from result import Job, main, mean_by_task

Options = dict[str, Any]


def data_set(job: Job, names: list[str]) -> str:
    """Rows with their tokens, as bergson takes them."""
    tokens, place = job.task.tokens, job.out.parent / f"data-{'-'.join(names)}"
    if not place.exists():
        Dataset.from_list([row for name in names for row in tokens[name]]).save_to_disk(place)
    return str(place)


def bergson(job: Job, command: str, run: str, data: list[str], index: Options, **parts: Options) -> Path:
    """One command, from a configuration file; `index` and `parts` are what differs from bergson's defaults."""
    place = job.out / run
    common: Options = {
        "run_path": str(place),
        "model": str(job.checkpoint),
        "loss_reduction": "mean",
        "overwrite": True,
    }
    common["tokenizer"] = str(job.task.folder / "start")  # which a trained checkpoint does not repeat
    settings = {"index_cfg": common | {"data": {"dataset": data_set(job, data)}} | index} | parts
    file = job.out / f"{run}.yaml"
    file.write_text(json.dumps({"steps": [{command: settings}]}))  # JSON is YAML
    done = subprocess.run([sys.executable, "-m", "bergson", str(file)], capture_output=True, text=True)
    (job.out / f"{run}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"bergson {command} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return place


def scores(job: Job, place: Path) -> np.ndarray:
    return mean_by_task(job.task, np.asarray(load_scores(place)[:]))


def state(job: Job, optimizer: bool) -> Options:
    """Adam's second moment for the pool's side; the queries are plain gradients, as in LESS.

    bergson finds moments by the order of all parameters, or by name; of full fine-tuning only the layers in the blocks
    have any, so they are named for it.
    """
    if not optimizer:
        return {}
    if job.way == "lora":
        return {"optimizer_state": str(job.checkpoint)}
    moments = torch.load(job.checkpoint / "optimizer.pt", weights_only=True)
    for number, name in enumerate(moments["param_groups"][0]["param_names"]):
        moments["state"][number]["param_name"] = name
    torch.save(moments, job.out / "optimizer.pt")
    return {"optimizer_state": str(job.out / "optimizer.pt")}


def cosines(job: Job, dim: int, optimizer: bool) -> np.ndarray:
    """`build` of the queries, then `score`, which keeps no gradient of the pool: mean cosine with a task's rows."""
    unit = {"unit_normalize": True}
    query = bergson(job, "build", "query", job.task.names, {"projection_dim": dim}, preprocess_cfg=unit)
    return scores(job, bergson(
        job, "score", "scores", ["pool"], {"projection_dim": dim} | state(job, optimizer), preprocess_cfg=unit,
        score_cfg={"query_path": str(query)},
    ))  # fmt: skip


def index(job: Job, dim: int, optimizer: bool, target: str = "per_module") -> np.ndarray:
    """`build` of the queries and of the pool, unit vectors; then their products."""
    options: dict[str, Any] = {"preprocess_cfg": {"unit_normalize": True}}
    shape = {"projection_dim": dim, "projection_target": target}
    query = bergson(job, "build", "query", job.task.names, shape, **options)
    pool = bergson(job, "build", "pool", ["pool"], shape | state(job, optimizer), **options)
    sides = [np.asarray(load_gradients(place)).astype(np.float32) for place in (pool, query)]
    return mean_by_task(job.task, sides[0] @ sides[1].T)


def unfinished(job: Job) -> np.ndarray:
    """`build` of the pool alone, which may find what a killed run has left; no scores (zeros)."""
    shape = {"projection_dim": 16, "overwrite": False}
    bergson(job, "build", "pool", ["pool"], shape | state(job, True), preprocess_cfg={"unit_normalize": True})
    return np.zeros((len(job.task.tokens["pool"]), len(job.task.names)))


def pipeline(job: Job, command: str, index: Options, resume: bool = False, **parts: Options) -> np.ndarray:
    """One of bergson's recipes from beginning to end."""
    query: Options = {"query": {"dataset": data_set(job, job.task.names), "aggregation": "none"}}
    configs = {"trackstar": "trackstar_cfg", "trak": "trak_cfg", "ekfac": "hessian_pipeline_cfg"}
    empty: Options = {"score_cfg": {}, "preprocess_cfg": {}} if command == "ekfac" else {}
    query |= {"resume": True} if resume else {}
    place = bergson(job, command, "run", ["pool"], index, **{configs[command]: query}, **empty, **parts)
    return scores(job, place / "scores")


VARIANTS: dict[str, Callable[[Job], np.ndarray]] = {
    "cosine": partial(cosines, dim=0, optimizer=False),
    "cosine-adam": partial(cosines, dim=0, optimizer=True),
    "build": partial(index, dim=16, optimizer=False),
    "build-adam": partial(index, dim=16, optimizer=True),
    "build-adam-10": partial(index, dim=10, optimizer=True),
    "build-adam-5120": partial(index, dim=5120, optimizer=True, target="global"),
    "trackstar": lambda job: pipeline(job, "trackstar", {}),
    "trackstar-adam": lambda job: pipeline(job, "trackstar", state(job, True)),
    "trak": lambda job: pipeline(
        job, "trak", {"projection_dim": 512, "projection_target": "global", "loss_fn": "log_odds"}
    ),
    "ekfac": lambda job: pipeline(job, "ekfac", {}, hessian_cfg={"method": "kfac", "ev_correction": True}),
    "build-adam, as a killed run left it": unfinished,
    "ekfac, as a killed run left it": lambda job: pipeline(
        job, "ekfac", {"overwrite": False}, True, hessian_cfg={"method": "kfac", "ev_correction": True}
    ),
}

if __name__ == "__main__":
    main(VARIANTS)
