"""`icons validate`: models trained on subsets tell whether scores predict, or which rule selects best (`--rule`)."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from icons.cli.bakeoff import bakeoff, pools_of
from icons.cli.options.validate import ValidateOptions
from icons.cli.pairs import files_of, parse
from icons.cli.shown_tables import show
from icons.cli.trainings import left_to_others, retrainer, share_of
from icons.datamodules.record_lists import readable, value_at
from icons.datamodules.records import RecordSource, open_records
from icons.modules.fit import TRAINER as TRAINER
from icons.output import check_output, is_marked, mark, put
from icons.store import ScoreStore
from icons.terminal import counted
from icons.validation.datamodel import (
    datamodelling_score,
    draw_subsets,
    mean_interval,
    predicted_gain,
    separation,
    separation_interval,
    share_in_lowest,
)
from icons.validation.retraining import Retraining, side_by_side

Scores = dict[str, Float[np.ndarray, "rows tasks"]]
Losses = dict[str, Float[np.ndarray, "seeds tasks"]]
PARTS = ("without-top", "without-bottom", "without-random")


def validate(options: ValidateOptions) -> int:
    """Trains the start on random subsets and on data without its best, worst and random rows; writes a table."""
    if options.seeds < 1 or options.counterfactual_seeds < 1:
        raise ValueError(
            f"--seeds {options.seeds}, --counterfactual-seeds {options.counterfactual_seeds}: expected at least 1 "
            "training of each"
        )
    named_stores, tasks = parse(options.scores, "--scores"), files_of(options.task)
    pools = pools_of(options.data, options.scores, options.images, options.pool or []) if options.rule else []
    check_output(
        options.out,
        kind="folder",
        inputs={
            **options.model_files,
            "--data": options.data,
            "--scores": list(named_stores.values()),
            "--task": [file for file, _ in tasks.values()],
            "--pool": [path for pool in pools[1:] for path in (pool.data, pool.scores)],
        },
        searched={"--images": options.images},
        ours=partial(is_marked, command="validate"),
        overwrite=options.overwrite,
    )
    if options.rule:
        return bakeoff(options, pools)
    if options.fraction or options.pool:
        raise ValueError("--fraction and --pool: belong to --rule, which is not given")
    index = open_records(options.data)
    stores = {name: ScoreStore.open(path) for name, path in named_stores.items()}
    methods = {name: checked(name, store, list(tasks), len(index)) for name, store in stores.items()}
    first = next(iter(methods))
    methods |= baselines(stores[first], len(tasks), options.seed)
    drawn = draw_subsets(len(index), options.subsets, options.share, options.seed)
    trainings = [
        Retraining(numbered(f"subset-{number:03d}", again), rows, options.seed + again)
        for again in range(options.seeds)
        for number, rows in enumerate(drawn)
    ]
    if options.counterfactual:
        for again in range(options.counterfactual_seeds):
            parts = without(methods[first], options.counterfactual, options.seed + again)
            trainings += [Retraining(numbered(name, again), rows, options.seed + again) for name, rows in parts.items()]
    mark(options.out, "validate")
    trained = retrainer(options, options.data, options.images, options.out)
    status = side_by_side(trained, share_of(trainings, options.shard), options.workers)
    if status or options.shard is not None:
        return status
    kept = {one.name: trained.losses(one) for one in trainings}
    if left := sum(loss is None for loss in kept.values()):
        return left_to_others(left)
    losses = {name: np.array([loss[task] for task in tasks]) for name, loss in kept.items() if loss is not None}
    measured = np.stack(
        [together(losses, f"subset-{number:03d}", options.seeds).mean(axis=0) for number in range(len(drawn))]
    )
    is_bad = provenance(index, options.source_field) == options.bad
    content = table(methods, measured, drawn, is_bad, f"{options.source_field}={options.bad}")
    if options.counterfactual:
        several = {name: together(losses, name, options.counterfactual_seeds) for name in ("all", *PARTS)}
        content["counterfactual"] = changes(several, list(tasks), first, options.counterfactual)
    put(options.out / "validation.json", json.dumps(content, indent=1) + "\n")
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
        raise ValueError(f"--scores {name}: lacks {counted(len(store.missing()), 'unit')}; finish the store first")
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
    return np.array([str(value_at(record, field, "")) for record in readable(index)])


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
        f"Trained on random subsets of the pool: {counted(len(drawn), 'model')}. LDS is the rank correlation between "
        "the sum of a subset's scores and how low the model's loss came out: the mean over tasks, with a 95 % "
        "bootstrap interval over subsets; where it is negative, low values are the good ones."
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
    for column, task in enumerate([*tasks, "mean"]):
        several = [part.mean(axis=1) if column == len(tasks) else part[:, column] for part in change.values()]
        means = [[round(value, 4) for value in mean_interval(part)] for part in several]
        rows.append([task, *(means if seeds > 1 else [mean for mean, _, _ in means])])
    note = (
        f"Change of each task's loss (above zero: worse) when {100 * share:.3g} % of the rows are left out, by the "
        f"mean score of {method}; the mean over {counted(seeds, 'seed')}"
        + (", with its 95 % interval (Student's t)." if seeds > 1 else ".")
    )
    columns = ["change of the loss", "without the top", "without the bottom", "without random rows"]
    return {"columns": columns, "rows": rows, "note": note}
