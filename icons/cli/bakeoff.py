"""`icons validate --rule`: trains on what each rule selects, and tells which are better than chance and the vote."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from icons.cli.options.validate import ValidateOptions
from icons.cli.pairs import files_of, parse, several
from icons.cli.shown_tables import show
from icons.cli.trainings import left_to_others, retrainer, share_of
from icons.consensus import select
from icons.datamodules.records import open_records
from icons.output import mark, put
from icons.store import ScoreStore
from icons.terminal import counted
from icons.validation.bakeoff import REFERENCES, tables
from icons.validation.retraining import Retraining, side_by_side

_TABLE = "bakeoff.json"


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


def bakeoff(options: ValidateOptions, pools: Sequence[Pool]) -> int:
    """Trains on every rule's selections and on the references'; prints the tables and writes them to OUT/bakeoff.json.

    Args:
        options: of the command; `random` and the vote are added to its rules.
        pools: each trained and measured for itself.

    Returns:
        0; or 75 when trainings are left to other processes or were interrupted.
    """
    names = list(dict.fromkeys([*REFERENCES, *(options.rule or [])]))
    fractions, files = options.fraction or [0.2], files_of(options.task)
    seeds = range(options.seed, options.seed + options.seeds)
    planned = {pool: pool.trainings(names, fractions, seeds) for pool in pools}  # all refusals before any training
    mark(options.out, "validate")
    retrainers = {pool: retrainer(options, pool.data, pool.images, pool.folder(options.out)) for pool in pools}
    for pool, trainings in planned.items():
        if status := side_by_side(retrainers[pool], share_of([*trainings.values()], options.shard), options.workers):
            return status
    if options.shard is not None:
        return 0
    each = {
        (pool, *key): retrainers[pool].measured(one, options.measure)
        for pool in pools
        for key, one in planned[pool].items()
    }
    if left := sum(values is None for values in each.values()):
        return left_to_others(left)
    measured = {
        (rule, fraction): np.array(
            [[[(each[pool, rule, fraction, seed] or {})[name] for name in files] for seed in seeds] for pool in pools]
        )
        for fraction in fractions
        for rule in names
    }
    content = tables(measured, list(files), options.measure)
    put(options.out / _TABLE, json.dumps(content, indent=1) + "\n")
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
