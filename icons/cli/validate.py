"""`icons validate`: models trained on subsets tell whether scores predict, or which rule selects best (`--rule`)."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from rich.console import Console

from icons.cli.bakeoff import bakeoff, pools_of
from icons.cli.pairs import parse, places
from icons.cli.shown_tables import show
from icons.cli.warmup import parse_tasks, warmup
from icons.datamodules.records import RecordSource, open_records
from icons.models.folder import ModelFolder
from icons.models.pinned_settings import claim
from icons.modules.interruption import RESUME
from icons.output import check_output, is_marked, mark, put
from icons.partition import assign, parse_shard
from icons.store import ScoreStore
from icons.validation.bakeoff import Measure
from icons.validation.datamodel import (
    datamodelling_score,
    draw_subsets,
    mean_interval,
    predicted_gain,
    separation,
    separation_interval,
    share_in_lowest,
)
from icons.validation.retraining import Retrainer, Retraining, side_by_side

console = Console()
Scores = dict[str, Float[np.ndarray, "rows tasks"]]
Losses = dict[str, Float[np.ndarray, "seeds tasks"]]
PARTS = ("without-top", "without-bottom", "without-random")
SETTINGS = "settings.json"


def validate(
    model: Path,
    data: Path,
    scores: list[str],
    task: list[str],
    out: Path,
    images: Path | None = None,
    vision_tower: Path | None = None,
    mm_projector: Path | None = None,
    rule: list[str] | None = None,
    fraction: list[float] | None = None,
    pool: list[str] | None = None,
    measure: Measure = "accuracy",
    subsets: int = 60,
    share: float = 0.5,
    seeds: int = 1,
    counterfactual: float = 0.1,
    counterfactual_seeds: int = 3,
    source_field: str = "provenance",
    bad: str = "wrong",
    seed: int = 0,
    epochs: int = 1,
    batch_size: int = 16,
    learning_rate: float = 2e-4,
    lora_rank: int = 128,
    lora_alpha: float = 256.0,
    lora_dropout: float = 0.05,
    workers: int = 1,
    shard: str | None = None,
    overwrite: bool = False,
    trainer: dict[str, Any] | None = None,
) -> int:
    """Trains the start on random subsets and on data without its best, worst and random rows; writes a table.

    Every training is a folder in --out and is kept: the same line, run again, goes on. The table is printed, and
    written to OUT/validation.json for `icons report --validation`.

    With --rule it trains on what the rules select instead, and on random rows and the vote's, and prints the paired
    differences with 95 % intervals; the table is OUT/bakeoff.json. Files to measure on should be others than those the
    scores were made with.

    Args:
        model: the start that every training begins from.
        data: the pool that was scored.
        scores: NAME=STORE, a score store of the pool; again for each variant to compare (with --rule a single one).
        task: NAME=FILE or NAME=FILE:IMAGES, the tasks' files to measure losses on; named as in the score stores (with
            --rule as you like).
        out: folder for the trainings and the table.
        images: image folder of the pool.
        vision_tower: CLIP folder of an original LLaVA model.
        mm_projector: mm_projector.bin of an original LLaVA model.
        rule: a method of `icons select` to train on the selection of; again for each. Only these are then trained.
        fraction: with --rule, share of the pool to select; again for each; default 0.2.
        pool: with --rule, NAME=DATA,SCORES or NAME=DATA,SCORES,IMAGES: a further pool with its own scores; again for
            each. Intervals are then over pools.
        measure: with --rule, what is compared: exact matches, or the loss.
        subsets: number of random subsets to train on.
        share: of the pool, in each subset.
        seeds: trainings of each subset, whose losses are averaged; of each rule, which are paired.
        counterfactual: share left out at the top, at the bottom, and at random; 0 leaves this part out.
        counterfactual_seeds: trainings of each of these, for the intervals; the random rows differ from seed to seed.
        source_field: field of the records that tells which are bad.
        bad: its value for bad records; records are only read for this, after scoring.
        seed: of the subsets, and the first one of the trainings.
        epochs: of every training.
        batch_size: of every training.
        learning_rate: of every training.
        lora_rank: of every training.
        lora_alpha: of every training.
        lora_dropout: of every training.
        workers: trainings side by side, each in a process of its own (on a GPU of its own, as far as there are).
            Processes started by hand on one --out share the work just so: no two ever do the same training.
        shard: I/N: only train this share of the models (array jobs); without it all, and then the table.
        overwrite: write --out even if something lies there that is no former validation.
        trainer: flags of Lightning's Trainer.
    """
    settings = {
        "epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "lora_rank": lora_rank,
        "lora_alpha": lora_alpha, "lora_dropout": lora_dropout,
    }  # fmt: skip
    start: dict[str, Any] = {"model": model, "vision_tower": vision_tower, "mm_projector": mm_projector}
    if seeds < 1 or counterfactual_seeds < 1:
        raise ValueError(
            f"--seeds {seeds}, --counterfactual-seeds {counterfactual_seeds}: expected at least 1 training of each"
        )
    check_output(
        out,
        kind="folder",
        inputs={
            "--model": model, "--data": data, "--vision-tower": vision_tower, "--mm-projector": mm_projector,
            "--scores": places(scores), "--task": [place.partition(":")[0] for place in places(task)],
            "--pool": places(pool or []),
        },
        searched={"--images": images},
        ours=partial(is_marked, command="validate"),
        overwrite=overwrite,
    )  # fmt: skip
    mark(out, "validate")
    if rule:
        return bakeoff(
            pools_of(data, scores, images, pool or []), rule, out, start=start, settings=settings, task=task,
            fractions=fraction or [0.2], seeds=range(seed, seed + seeds), measure=measure, workers=workers,
            shard=shard, trainer=trainer,
        )  # fmt: skip
    if fraction or pool:
        raise ValueError("--fraction and --pool: belong to --rule, which is not given")
    index = open_records(data)
    stores = {name: ScoreStore.open(path) for name, path in parse(scores, "--scores").items()}
    tasks = parse_tasks(task)
    methods = {name: checked(name, store, list(tasks), len(index)) for name, store in stores.items()}
    first = next(iter(methods))
    methods |= baselines(stores[first], len(tasks), seed)
    drawn = draw_subsets(len(index), subsets, share, seed)
    trainings = [
        Retraining(numbered(f"subset-{place:03d}", again), rows, seed + again)
        for again in range(seeds)
        for place, rows in enumerate(drawn)
    ]
    if counterfactual:
        for again in range(counterfactual_seeds):
            parts = without(methods[first], counterfactual, seed + again)
            trainings += [Retraining(numbered(name, again), rows, seed + again) for name, rows in parts.items()]
    claim(
        out / SETTINGS,
        settings
        | {
            "data": index.fingerprint,
            "model": ModelFolder.open(**start).fingerprint(),
            "tasks": {name: open_records(file).fingerprint for name, (file, _) in tasks.items()},
        },
        "trainings",
    )
    options = start | settings | {"images": images, "min_rows": 1, "task": task, "trainer": trainer}
    retrainer = Retrainer(data, out, options, warmup)
    part = (0, 1) if shard is None else parse_shard(shard)
    mine = [trainings[place] for place in assign(range(len(trainings)), part[1], part[0])]
    status = side_by_side(retrainer, mine, workers)
    if status or shard is not None:
        return status
    found = {one.name: retrainer.losses(one) for one in trainings}
    left = [name for name, loss in found.items() if loss is None]
    if left:
        console.print(f"{len(left):,} models are being trained by other processes; the same line then makes the table")
        return RESUME
    losses = {name: np.array([loss[task] for task in tasks]) for name, loss in found.items() if loss is not None}
    measured = np.stack([together(losses, f"subset-{place:03d}", seeds).mean(axis=0) for place in range(len(drawn))])
    is_bad = provenance(index, source_field) == bad
    content = table(methods, measured, drawn, is_bad, f"{source_field}={bad}")
    if counterfactual:
        several = {name: together(losses, name, counterfactual_seeds) for name in ("all", *PARTS)}
        content["counterfactual"] = changes(several, list(tasks), first, counterfactual)
    put(out / "validation.json", json.dumps(content, indent=1) + "\n")
    show(content)
    return 0


def numbered(name: str, again: int) -> str:
    """The folder of a training: its name, and from the second seed on the seed's number."""
    return f"{name}-{again}" if again else name


def together(
    losses: Mapping[str, Float[np.ndarray, " tasks"]], name: str, seeds: int
) -> Float[np.ndarray, "seeds tasks"]:
    return np.stack([losses[numbered(name, again)] for again in range(seeds)])


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
    return store.stored("influence", slice(None))[:, [store.tasks.index(task) for task in tasks]]


def baselines(store: ScoreStore, num_tasks: int, seed: int) -> Scores:
    """What needs no influence: random numbers, the loss, the gradient norm; the same for every task."""
    columns = {"random": np.random.default_rng([seed, 1]).standard_normal(store.num_rows)}
    for name, said in (("loss", "loss"), ("norm", "gradient norm")):
        if name in store.arrays:
            columns[said] = store.stored(name, slice(None)).astype(np.float64)
    return {name: np.repeat(column[:, None], num_tasks, axis=1) for name, column in columns.items()}


def without(scores: Float[np.ndarray, "rows tasks"], share: float, seed: int) -> dict[str, Int[np.ndarray, " chosen"]]:
    """All rows; and all but the top, the bottom, and a random `share` by mean score over tasks (ties by row)."""
    mean = np.nan_to_num(scores.mean(axis=1), nan=-np.inf)
    order = np.argsort(mean, kind="stable")
    count = round(share * len(order))
    shuffled = np.random.default_rng([seed, 2]).permutation(len(order))
    kept = {"all": order, "without-top": order[:-count], "without-bottom": order[count:]}
    return {name: np.sort(rows) for name, rows in (kept | {"without-random": shuffled[count:]}).items()}


def provenance(index: RecordSource, field: str) -> np.ndarray:
    """Each record's field, as text; empty where it has none."""
    found = []
    for row in range(len(index)):
        try:
            record = index.light(row)
        except ValueError:
            record = None
        found.append(str(record.get(field, "")) if isinstance(record, dict) else "")
    return np.array(found)


def table(
    methods: Scores,
    measured: Float[np.ndarray, "subsets tasks"],
    drawn: Sequence[Int[np.ndarray, " chosen"]],
    bad: Bool[np.ndarray, " rows"],
    what: str,
) -> dict[str, Any]:
    """Per method: the datamodelling score with its interval, and how it sorts out bad records."""
    rows: list[list[Any]] = []
    for name, scores in methods.items():
        estimate = datamodelling_score(predicted_gain(scores, drawn), measured)
        row: list[Any] = [name, [round(value, 3) for value in estimate]]
        if bad.any():
            mean = scores.mean(axis=1)
            area = separation(mean, bad)
            known = np.isfinite(mean)
            ends = separation_interval(area, int((bad & known).sum()), int((~bad & known).sum()))
            row += [[round(value, 3) for value in (area, *ends)], round(share_in_lowest(mean, bad), 3)]
        rows.append(row)
    columns = ["method", "LDS"] + (["bad below good (AUC)", "of the bad, in the lowest 20 %"] if bad.any() else [])
    text = (
        f"{len(drawn)} models were trained on random subsets of the pool. LDS is the rank correlation between the "
        "sum of a subset's scores and how low the model's loss came out: the mean over tasks, with a 95 % bootstrap "
        "interval over subsets; where it is negative, low values are the good ones."
    )
    if bad.any():
        text += (
            f" Bad records are those with {what}, {100 * bad.mean():.0f} % of the pool. AUC is the probability that "
            "one of them has a lower mean score over tasks than another record (chance: 0.5), with its 95 % "
            "interval; by chance, 20 % of them are in the lowest 20 %."
        )
    return {"title": "Does influence predict?", "text": text, "columns": columns, "rows": rows}


def changes(losses: Losses, tasks: Sequence[str], method: str, share: float) -> dict[str, Any]:
    """A table: per task and counterfactual, the loss minus that of the training on all rows with the same seed, and its
    95 % interval over seeds."""
    change = {name: losses[name] - losses["all"] for name in PARTS}
    seeds = len(losses["all"])
    rows: list[list[Any]] = []
    for place, task in enumerate([*tasks, "mean"]):
        several = [part.mean(axis=1) if place == len(tasks) else part[:, place] for part in change.values()]
        found = [[round(value, 4) for value in mean_interval(part)] for part in several]
        rows.append([task, *(found if seeds > 1 else [mean for mean, _, _ in found])])
    note = (
        f"Change of each task's loss (above zero: worse) when {100 * share:.3g} % of the rows are left out, by the "
        f"mean score of {method}; the mean over {seeds} seed{'s' * (seeds > 1)}"
        + (", with its 95 % interval (Student's t)." if seeds > 1 else ".")
    )
    columns = ["change of the loss", "without the top", "without the bottom", "without random rows"]
    return {"columns": columns, "rows": rows, "note": note}
