"""`icons validate --rule`: trains on what each rule selects, and tells which are better than chance and the vote."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icons.cli.console import console
from icons.cli.pairs import files_of, parse, several
from icons.cli.shown_tables import show
from icons.cli.warmup import retrain
from icons.consensus import select
from icons.datamodules.records import open_records
from icons.interruption import RESUME
from icons.models.folder import ModelFolder
from icons.models.pinned_settings import claim
from icons.output import mark, put
from icons.partition import assign, parse_shard
from icons.store import ScoreStore
from icons.terminal import counted
from icons.validation.bakeoff import REFERENCES, Measure, tables
from icons.validation.retraining import Retrainer, Retraining, side_by_side

SETTINGS, TABLE = "settings.json", "bakeoff.json"


@dataclass(frozen=True)
class Pool:
    """A pool of data with its scores; `name` is empty for the only one."""

    name: str
    data: Path
    scores: str
    images: Path | None

    def folder(self, out: Path) -> Path:
        return out / self.name if self.name else out

    def trainings(
        self, rules: Sequence[str], fractions: Sequence[float], seeds: Sequence[int]
    ) -> dict[tuple[str, float, int], Retraining]:
        """One training per rule, share and seed; rules that draw, draw anew for every seed.

        Raises:
            ValueError: the scores are not finished or of other data, the rule is unknown, or it selects no row.
        """
        store, index = ScoreStore.open(self.scores), open_records(self.data)
        if store.num_rows != len(index):
            raise ValueError(
                f"scores {self.scores}: {store.num_rows} rows, {self.data} has {len(index)}; expected the same file"
            )
        if store.missing():
            raise ValueError(
                f"scores {self.scores}: lacks {counted(len(store.missing()), 'unit')}; finish the store first"
            )
        planned = {}
        for seed in seeds:
            for fraction in fractions:
                for rule in rules:
                    rows = select(store, fraction, rule, seed=seed).rows
                    if not len(rows):
                        raise ValueError(
                            f"--rule {rule} --fraction {fraction}: selects none of {len(index)} rows; expected one at "
                            "least to train on"
                        )
                    name = re.sub(r"[^\w.-]", "_", f"{rule}-{fraction:g}-{seed}")
                    planned[rule, fraction, seed] = Retraining(name, rows, seed)
        return planned


def bakeoff(
    pools: Sequence[Pool],
    rules: Sequence[str],
    out: Path,
    *,
    start: Mapping[str, Any],
    settings: Mapping[str, Any],
    reading: Mapping[str, Any],
    task: list[str],
    fractions: Sequence[float],
    seeds: Sequence[int],
    measure: Measure,
    workers: int,
    shard: str | None,
    trainer: dict[str, Any] | None,
) -> int:
    """Trains on every rule's selections and on the references'; prints the tables and writes them to OUT/bakeoff.json.

    Args:
        pools: each trained and measured for itself.
        rules: methods of `icons select`; random and the vote are added.
        out: folder of the trainings; of several pools, of their folders.
        start: model, vision_tower and mm_projector.
        settings: of every training.
        reading: how the records and their images are read.
        task: files to measure on, as for `icons warmup`.
        fractions: shares of the pool to select.
        seeds: of the trainings and of the rules that draw.
        measure: what is compared.
        workers: trainings side by side.
        shard: I/N: this share of each pool's trainings, and no table.
        trainer: flags of Lightning's Trainer.

    Returns:
        0; or 75 when trainings are left to other processes or were interrupted.
    """
    names = list(dict.fromkeys([*REFERENCES, *rules]))
    files = files_of(task)
    planned = {pool: pool.trainings(names, fractions, seeds) for pool in pools}  # all refusals before any training
    mark(out, "validate")
    retrainers = {}
    for pool in pools:
        folder = pool.folder(out)
        content = {
            "data": open_records(pool.data).fingerprint,
            "model": ModelFolder.open(**start).fingerprint(),
            "tasks": {name: open_records(file).fingerprint for name, (file, _) in files.items()},
        }
        claim(folder / SETTINGS, {**settings, **content}, "trainings")
        options = {
            **start,
            **settings,
            **reading,
            "images": pool.images,
            "min_rows": 1,
            "max_failed": 1.0,
            "task": task,
            "trainer": trainer,
        }
        retrainers[pool] = Retrainer(pool.data, folder, options, retrain)
    part = (0, 1) if shard is None else parse_shard(shard)
    for pool, trainings in planned.items():
        ordered = list(trainings.values())
        mine = [ordered[number] for number in assign(range(len(ordered)), part[1], part[0])]
        if status := side_by_side(retrainers[pool], mine, workers):
            return status
    if shard is not None:
        return 0
    each = {
        (pool, *key): retrainers[pool].measured(one, measure) for pool in pools for key, one in planned[pool].items()
    }
    if left := sum(values is None for values in each.values()):
        console.print(
            f"{counted(left, 'model')} {'is' if left == 1 else 'are'} being trained by other processes; the same line "
            "then makes the table"
        )
        return RESUME
    measured = {
        (rule, fraction): np.array(
            [[[(each[pool, rule, fraction, seed] or {})[name] for name in files] for seed in seeds] for pool in pools]
        )
        for fraction in fractions
        for rule in names
    }
    content = tables(measured, list(files), measure)
    put(out / TABLE, json.dumps(content, indent=1) + "\n")
    show(content)
    return 0


def pools_of(data: Path, scores: Sequence[str], images: Path | None, more: Sequence[str]) -> list[Pool]:
    """The pool of --data and --scores, and those of --pool.

    Raises:
        ValueError: several --scores; a --pool of another form, or a name given twice.

    >>> pools_of(Path("a.json"), ["a=a.zarr"], None, ["b=b.json,b.zarr,b"])[1]
    Pool(name='b', data=PosixPath('b.json'), scores='b.zarr', images=PosixPath('b'))
    """
    (name, store), *others = parse(scores, "--scores").items()
    if others:
        raise ValueError(f"--rule: got {1 + len(others)} --scores; expected one, which every rule selects by")
    pools = [Pool(name if more else "", data, store, images)]
    for other, value in parse(more, "--pool").items():
        parts = several(value, f"--pool {other}")
        if len(parts) not in (2, 3):
            raise ValueError(f"--pool {other}={value}: expected NAME=DATA,SCORES or NAME=DATA,SCORES,IMAGES")
        if other == name or not re.fullmatch(r"[\w.-]+", other):
            raise ValueError(f"--pool {other}: expected a name of its own, of letters, digits, . _ and -")
        pools.append(Pool(other, Path(parts[0]), parts[1], Path(parts[2]) if len(parts) == 3 else images))
    return pools
