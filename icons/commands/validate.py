"""`icons validate`: models trained on random subsets tell whether scores predict what data teaches."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.table import Table

from icons.commands.influence import parse
from icons.commands.warmup import warmup
from icons.datamodel import (
    datamodelling_score,
    draw_subsets,
    predicted_gain,
    separation,
    share_in_lowest,
)
from icons.datamodules.records import RecordIndex
from icons.modules.checkpoint import open_warmup
from icons.partition import assign, parse_shard
from icons.store import ScoreStore

console = Console()
Scores = dict[str, Float[np.ndarray, "rows tasks"]]


def validate(
    model: Path,
    data: Path,
    scores: list[str],
    task: list[str],
    out: Path,
    images: Path | None = None,
    vision_tower: Path | None = None,
    mm_projector: Path | None = None,
    subsets: int = 60,
    share: float = 0.5,
    counterfactual: float = 0.1,
    source_field: str = "provenance",
    bad: str = "wrong",
    seed: int = 0,
    epochs: int = 1,
    batch_size: int = 16,
    learning_rate: float = 2e-4,
    lora_rank: int = 128,
    lora_alpha: float = 256.0,
    lora_dropout: float = 0.05,
    shard: str | None = None,
    trainer: dict[str, Any] | None = None,
) -> int:
    """Trains the start on random subsets and on data without its best, worst and random rows; writes a table.

    Every training is a folder in --out and is kept: the same line, run again, goes on. The table is printed, and
    written to OUT/validation.json for `icons report --validation`.

    Args:
        model: the start that every training begins from.
        data: the pool that was scored.
        scores: NAME=STORE, a score store of the pool; again for each variant to compare.
        task: NAME=FILE or NAME=FILE:IMAGES, the tasks' files to measure losses on; named as in the score stores.
        out: folder for the trainings and the table.
        images: image folder of the pool.
        vision_tower: CLIP folder of an original LLaVA model.
        mm_projector: mm_projector.bin of an original LLaVA model.
        subsets: number of random subsets to train on.
        share: of the pool, in each subset.
        counterfactual: share left out at the top, at the bottom, and at random; 0 leaves this part out.
        source_field: field of the records that tells which are bad.
        bad: its value for bad records; records are only read for this, after scoring.
        seed: of the subsets and the trainings.
        epochs: of every training.
        batch_size: of every training.
        learning_rate: of every training.
        lora_rank: of every training.
        lora_alpha: of every training.
        lora_dropout: of every training.
        shard: I/N: only train this share of the models (array jobs); without it all, and then the table.
        trainer: flags of Lightning's Trainer.
    """
    index = RecordIndex.open(data)
    stores = {name: ScoreStore.open(path) for name, path in parse(scores, "--scores").items()}
    tasks = list(parse(task, "--task"))
    methods = {name: checked(name, store, tasks, len(index)) for name, store in stores.items()}
    methods |= baselines(next(iter(stores.values())), len(tasks), seed)
    drawn = draw_subsets(len(index), subsets, share, seed)
    trainings = {f"subset-{number:03d}": rows for number, rows in enumerate(drawn)}
    first = next(iter(methods))
    if counterfactual:
        trainings |= without(methods[first], counterfactual, seed)

    def train(folder: Path, rows: Int[np.ndarray, " chosen"]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"data{data.suffix}"
        if not file.is_file():
            index.write_selection(rows.tolist(), file)
        warmup(
            model, file, folder / "fit", images, vision_tower, mm_projector, min_rows=1, task=task, epochs=epochs,
            batch_size=batch_size, learning_rate=learning_rate, lora_rank=lora_rank, lora_alpha=lora_alpha,
            lora_dropout=lora_dropout, seed=seed, trainer=trainer,
        )  # fmt: skip

    part = (0, 1) if shard is None else parse_shard(shard)
    losses = run_all(trainings, out, train, assign(range(len(trainings)), part[1], part[0]))
    if shard is not None:
        return 0
    measured = {name: np.array([loss[task] for task in tasks]) for name, loss in losses.items()}
    is_bad = provenance(index, source_field) == bad
    content = table(methods, measured, drawn, is_bad, f"{source_field}={bad}")
    if counterfactual:
        content["counterfactual"] = changes(measured, tasks)
        content["note"] = said(content["counterfactual"], first, counterfactual)
    (out / "validation.json").write_text(json.dumps(content, indent=1) + "\n")
    show(content)
    return 0


def checked(name: str, store: ScoreStore, tasks: Sequence[str], num_rows: int) -> Float[np.ndarray, "rows tasks"]:
    """The scores of the named tasks.

    Raises:
        ValueError: the store lacks a task, is not finished, or is of another data file.
    """
    missing = [task for task in tasks if task not in store.tasks]
    if missing:
        raise ValueError(
            f"--scores {name}: has no task {missing[0]}; it has {', '.join(store.tasks)}: name tasks alike"
        )
    if store.num_rows != num_rows:
        raise ValueError(
            f"--scores {name}: {store.num_rows} rows, the data file has {num_rows}; expected the same file"
        )
    if store.missing():
        raise ValueError(f"--scores {name}: {len(store.missing())} units are missing; finish the store first")
    return np.asarray(store.influence[:])[:, [store.tasks.index(task) for task in tasks]]


def baselines(store: ScoreStore, num_tasks: int, seed: int) -> Scores:
    """What needs no influence: random numbers, the loss, the gradient norm; the same for every task."""
    columns = {"random": np.random.default_rng([seed, 1]).standard_normal(store.num_rows)}
    for name, said in (("loss", "loss"), ("norm", "gradient norm")):
        if name in store.arrays:
            columns[said] = np.asarray(store.arrays[name][:], dtype=np.float64)
    return {name: np.repeat(column[:, None], num_tasks, axis=1) for name, column in columns.items()}


def without(scores: Float[np.ndarray, "rows tasks"], share: float, seed: int) -> dict[str, Int[np.ndarray, " chosen"]]:
    """All rows; and all but the top, the bottom, and a random `share` by mean score over tasks (ties by row)."""
    mean = np.nan_to_num(scores.mean(axis=1), nan=-np.inf)
    order = np.argsort(mean, kind="stable")
    count = round(share * len(order))
    shuffled = np.random.default_rng([seed, 2]).permutation(len(order))
    kept = {"all": order, "without-top": order[:-count], "without-bottom": order[count:]}
    return {name: np.sort(rows) for name, rows in (kept | {"without-random": shuffled[count:]}).items()}


def run_all(
    trainings: Mapping[str, Int[np.ndarray, " chosen"]],
    out: Path,
    train: Callable[[Path, Any], None],
    mine: Sequence[int],
) -> dict[str, dict[str, float]]:
    """Trains what is not there yet; the loss per task of each training."""
    losses: dict[str, dict[str, float]] = {}
    for number, (name, rows) in enumerate(trainings.items()):
        kept = out / name / "losses.json"
        if not kept.is_file() and number in mine:
            console.print(f"[bold]{name}[/] ({number + 1} of {len(trainings)}): {len(rows):,} rows")
            train(out / name, rows)
            found = open_warmup(out / name / "fit").manifest["losses"]["after"]
            kept.write_text(json.dumps(found))
        if kept.is_file():
            losses[name] = json.loads(kept.read_text())
    return losses


def provenance(index: RecordIndex, field: str) -> np.ndarray:
    """Each record's field, as text; empty where it has none."""
    found = []
    for row in range(len(index)):
        try:
            record = index[row]
        except ValueError:
            record = None
        found.append(str(record.get(field, "")) if isinstance(record, dict) else "")
    return np.array(found)


def table(
    methods: Scores,
    losses: Mapping[str, Float[np.ndarray, " tasks"]],
    drawn: Sequence[Int[np.ndarray, " chosen"]],
    bad: Bool[np.ndarray, " rows"],
    what: str,
) -> dict[str, Any]:
    """Per method: the datamodelling score with its interval, and how it sorts out bad records."""
    measured = np.stack([losses[f"subset-{number:03d}"] for number in range(len(drawn))])
    rows: list[list[Any]] = []
    for name, scores in methods.items():
        estimate = datamodelling_score(predicted_gain(scores, drawn), measured)
        row: list[Any] = [name, [round(value, 3) for value in estimate]]
        if bad.any():
            mean = scores.mean(axis=1)
            row += [round(separation(mean, bad), 3), round(share_in_lowest(mean, bad), 3)]
        rows.append(row)
    columns = ["method", "LDS"] + (["AUC, bad below good", "bad in the lowest 20 %"] if bad.any() else [])
    text = (
        f"{len(drawn)} models were trained on random subsets of the pool. LDS is the rank correlation between the "
        "sum of a subset's scores and how low the model's loss came out, the mean over tasks, with a 95 % bootstrap "
        f"interval over subsets. Bad records are those with {what} ({bad.mean():.0%} of the pool)."
    )
    return {"title": "Does influence predict?", "text": text, "columns": columns, "rows": rows}


def changes(losses: Mapping[str, Float[np.ndarray, " tasks"]], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Per counterfactual and task: the loss minus that of the training on all rows."""
    return {
        name: dict(zip(tasks, (losses[name] - losses["all"]).round(5).tolist(), strict=True))
        for name in ("without-top", "without-bottom", "without-random")
    }


def said(found: Mapping[str, Mapping[str, float]], method: str, share: float) -> str:
    parts = [f"{name.replace('-', ' the ')} {np.mean(list(change.values())):+.4f}" for name, change in found.items()]
    return f"Loss, mean over tasks, after training without {share:.0%} of the rows by {method}: {'; '.join(parts)}."


def show(content: Mapping[str, Any]) -> None:
    shown = Table(*content["columns"])
    for row in content["rows"]:
        cells = [f"{v[0]:.2f} ({v[1]:.2f} to {v[2]:.2f})" if isinstance(v, list) else str(v) for v in row]
        shown.add_row(*cells)
    console.print(shown)
    if "note" in content:
        console.print(content["note"])
