"""Options of `icons validate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from icons.cli.options.groups import LearningOptions, PartsOptions, ReadingOptions, TrainerOptions

BAD = {"group": "bad records"}
_BAKE_OFF = {"group": "rules"}


@dataclass(frozen=True, kw_only=True)
class ValidateOptions(PartsOptions, ReadingOptions, LearningOptions, TrainerOptions):
    """Trains the start on random subsets and on data without its best, worst and random rows; writes a table.

    $ icons validate --model M --data pool.json --images images/ --scores ours=scores.zarr --task gqa=gqa.json --out v
    $ icons validate --model M --data pool.json --scores ours=scores.zarr --task gqa=gqa.json --rule mean --out b

    With --rule it trains on what the rules select instead, and on random rows and the vote's, and prints the paired
    differences with 95 % intervals; the table is OUT/bakeoff.json. Files to measure on should be others than those the
    scores were made with.

    Every training is a folder in --out and is kept: the same line, run again, goes on. The table is printed, and
    written to OUT/validation.json for `icons report --validation`. Exit status: 0 all is trained; 1 something you can
    mend, said in one line; 2 wrong usage; 75 interrupted (SIGTERM), or other processes are still training: run the
    same line again.
    """

    model: Path = field()
    data: Path
    """the pool that was scored"""
    scores: list[str]
    """NAME=STORE, a score store of the pool; repeat it for each variant to compare (with --rule a single one)"""
    task: list[str]
    """NAME=FILE or NAME=FILE:IMAGES, a task's file to measure losses on, named as in the score stores (with --rule
    as you like); repeat it for each"""
    out: Path
    """folder for the trainings and the table"""
    images: Path | None = None
    """image folder of the pool"""
    rule: list[str] | None = field(default=None, metadata=_BAKE_OFF)
    """method of `icons select` to train on the selection of; repeat it for each. Only these are then trained"""
    fraction: list[float] | None = field(default=None, metadata=_BAKE_OFF)
    """share of the pool to select; repeat it for further shares; default: 0.2"""
    pool: list[str] | None = field(default=None, metadata=_BAKE_OFF)
    """NAME=DATA,SCORES or NAME=DATA,SCORES,IMAGES: a further pool with its own scores; repeat it for each.
    Intervals are then over pools"""
    measure: Literal["accuracy", "loss"] = field(default="accuracy", metadata=_BAKE_OFF)
    """what is compared: exact matches, or the loss"""
    subsets: int = 60
    """number of random subsets to train on"""
    share: float = 0.5
    """share of the pool in each subset"""
    seeds: int = 1
    """trainings of each subset, whose losses are averaged; of each rule, which are paired"""
    counterfactual: float = 0.1
    """share left out at the top, at the bottom, and at random; 0 leaves this part out"""
    counterfactual_seeds: int = 3
    """trainings of each of these, for the intervals; the random rows differ from seed to seed"""
    seed: int = 0
    """of the subsets, and the first one of the trainings"""
    source_field: str = field(default="provenance", metadata=BAD)
    """field of the records that tells which are bad; a dotted name looks inside"""
    bad: str = field(default="wrong", metadata=BAD)
    """its value for bad records; records are only read for this, after scoring"""
    workers: int = field(default=1, metadata={"group": "run"})
    """trainings side by side, each in a process of its own (on a GPU of its own, as far as there are). Processes
    started by hand on one --out share the work in the same way: no two ever do the same training"""
    shard: str | None = field(default=None, metadata={"group": "run"})
    """I/N: only train this share of the models (array jobs); without it all, and then the table"""
    overwrite: bool = field(default=False, metadata={"group": "run"})
    """write --out even if it holds something other than an earlier validation"""
