"""`icons gradients`: per-sample gradients of a data file into a gradient store, through `Trainer.predict`."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer

from icons.batch import Status
from icons.choices import Preconditioning
from icons.cli.console import bars, console, tell, warn
from icons.cli.estimate import estimate_gradients_run
from icons.cli.model_source import ModelSource
from icons.cli.options.gradients import GradientsOptions
from icons.datamodules.datamodule import ConversationDataModule
from icons.modules.collector import DIFFERENTIATED, collector
from icons.modules.fit import quiet, ranks_of
from icons.modules.gradient_writer import GradientWriter
from icons.modules.named_strategy import predicting_strategy
from icons.modules.part_writer import PartWriter, part_path
from icons.output import check_output
from icons.partition import assign, parse_shard
from icons.preconditioner import AdamPreconditioner
from icons.projection import PROJECTORS, ConcatProjector
from icons.store import GradientStore, ScoreStore, fitting_chunk_rows
from icons.store.failures import check_some_done, failures_of, told
from icons.store.former import holds_store
from icons.terminal import counted

TRAINER = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
WRITING = ("chunk_rows", "shard", "retry_failed", "mixed_batches", "overwrite")
"""Options that are a writer's."""
_FIXED = {"inference_mode": False, "use_distributed_sampler": False}


def gradients(options: GradientsOptions) -> int:
    """Computes a store of projected per-sample gradients; the same line, run again, resumes."""
    preconditioner = chosen(options.preconditioner, options.task, options.factors is not None)
    check_curvature(preconditioner, options.factors, options.damping)
    source = ModelSource.resolve(options, options.optimizer_state, options)
    if source.warning:
        warn(source.warning)
    differentiates = options.collect in DIFFERENTIATED
    if not differentiates:
        console.print(f"{options.collect}: stored as it is; --projector, --dim and --preconditioner are for gradients")
    if differentiates:
        source.check_differentiable(options.target, preconditioner, options.trust_remote_code)
    dims = dimensions(options.dim) if differentiates else [1]
    outs = [options.out] if len(dims) == 1 else [part_path(options.out, size) for size in dims]
    inputs = {"--data": options.data, **options.model_files}
    inputs |= {"--optimizer-state": options.optimizer_state, "--factors": options.factors}
    for out in outs:
        check_output(
            out,
            kind="folder",
            inputs=inputs,
            searched={"--images": options.images},
            ours=partial(holds_store, kind=GradientStore.KIND),
            overwrite=replaces(options.overwrite, options.shard),
        )
    flags = predict_flags(options.trainer)
    datamodule = source.datamodule(options, options.data, options.images)
    tell(datamodule.dataset.summary())
    if options.dry_run:
        plan = estimate_gradients_run(
            options,
            source.folder,
            source.adapter,
            datamodule.dataset,
            dims,
            preconditioner=preconditioner,
            settings={"data": options.data, "out": ", ".join(outs)}
            | {name: getattr(options, name) for name in ("collect", "batch_size", "max_tokens")},
        )
        plan.show(console)
        return 0
    network = source.load(options.target, differentiates, dtype=options.model_dtype, **options.loading)
    several = [PROJECTORS[options.projector](size, seed=options.seed) for size in dims]
    curvature = options.factors, options.damping, True  # projected rows: a root on both sides
    state = source.preconditioner(preconditioner, network, *curvature) if differentiates else None
    if isinstance(state, AdamPreconditioner):
        state.compiled = options.compile
    extractor = collector(
        options.collect, network, several[0] if len(several) == 1 else ConcatProjector(several), state
    )
    writing: dict[str, Any] = {name: getattr(options, name) for name in (*WRITING, "dtype", "codec")}
    writing["manifest"] = {"target": options.target, "warnings": [source.warning] if source.warning else []}
    if len(dims) == 1:
        writers = [GradientWriter(options.out, **writing)]
    else:  # units of the same rows, as they suit the longest rows
        writing["chunk_rows"] = options.chunk_rows or fitting_chunk_rows(
            len(datamodule.dataset), max(dims), options.dtype
        )
        writers = [PartWriter(path, part, **writing) for part, path in enumerate(outs)]
    runner = predict(flags, extractor, datamodule, *writers)
    if not runner.is_global_zero:
        return shared(runner, 0)
    return shared(runner, max(summary(GradientStore.open(path), options.strict, options.shard) for path in outs))


def predict(
    flags: Mapping[str, Any], module: LightningModule, datamodule: ConversationDataModule, *writers: Callback
) -> Trainer:
    """A Trainer that has gone through the data with the module; the writers have what it gave."""
    with quiet():
        runner = Trainer(**flags)
        runner.callbacks.extend(writers)  # type: ignore[attr-defined]
        runner.predict(module, datamodule=datamodule, return_predictions=False)
    return runner


def shared(runner: Trainer, status: int) -> int:
    """The exit status of the first rank, on every rank."""
    return int(runner.strategy.broadcast(status))


def replaces(overwrite: bool, shard: str | None) -> bool:
    """--overwrite, which one of many jobs on one store cannot mean.

    Raises:
        ValueError: with --shard.
    """
    if overwrite and shard is not None:
        raise ValueError(
            "--overwrite: together with --shard each job would take away what the others have written; delete the "
            "store before the jobs start"
        )
    return overwrite


def chosen(preconditioner: Preconditioning | None, task: bool, factors: bool = False) -> Preconditioning:
    """The preconditioner: the factors' if there are some, also for a task's rows; else Adam's for training rows, and
    none for a task's.

    Raises:
        ValueError: a task's rows, and a preconditioner of training rows asked for.

    >>> chosen(None, task=True), chosen(None, task=False), chosen(None, task=True, factors=True)
    ('none', 'adam', 'kfac')
    """
    if task and preconditioner not in (None, "none", "kfac"):
        raise ValueError(
            f"--task: a task's rows are plain gradients; got --preconditioner {preconditioner}: leave one of them out"
        )
    return preconditioner or ("kfac" if factors else "none" if task else "adam")


def check_curvature(preconditioner: Preconditioning, factors: object, damping: float | None) -> None:
    """
    Raises:
        ValueError: `--preconditioner kfac` without factors; what belongs to it given to another one; or the damping is
            not above 0.
    """
    if preconditioner == "kfac" and not factors:
        raise ValueError(
            "--preconditioner kfac needs Kronecker factors: got no --factors; make them with `icons factors` and the "
            "same checkpoint"
        )
    given = {"--factors": factors, "--damping": damping}
    for option in [name for name, value in given.items() if value is not None and preconditioner != "kfac"]:
        raise ValueError(f"{option}: belongs to --preconditioner kfac; got {preconditioner}: leave one of them out")
    if damping is not None and not 0 < damping < math.inf:
        raise ValueError(f"--damping {damping:g}: expected a number above 0")


def dimensions(dim: int | Sequence[int]) -> list[int]:
    """The dimensions asked for.

    Raises:
        ValueError: one is given twice.

    >>> dimensions(64), dimensions([64, 32])
    ([64], [64, 32])
    """
    dims = [dim] if isinstance(dim, int) else list(dim)
    if not dims or len(set(dims)) != len(dims):
        raise ValueError(f"--dim: got {dims}; expected each dimension once, since each becomes a store of its own")
    return dims


def predict_flags(trainer: dict[str, Any] | None) -> dict[str, Any]:
    """The Trainer's flags: ours, then the user's, who may not change those that gradients depend on.

    Raises:
        ValueError: such a flag is given with another value, or a strategy that cannot divide the ranks.
    """
    for flag, value in _FIXED.items():
        if (trainer or {}).get(flag, value) != value:
            raise ValueError(
                f"--trainer.{flag}: expected {value}; gradients cannot be computed otherwise, leave it out"
            )
    flags = TRAINER | bars() | (trainer or {}) | _FIXED
    return predicting_strategy(flags, ranks_of(flags))


def summary(store: GradientStore | ScoreStore, strict: bool, shard: str | None = None) -> int:
    """Prints how many rows are done, failed (with their reasons), missing, or zero for no reason; the exit status that
    follows from it: 1 if units of this run are missing at its end.

    With a shard, what other shards have still to do is not missing.

    Raises:
        ValueError: every row (of the shard) failed, with the first one's reason; or, with `strict`, any.
    """
    tell(repr(store))
    for line in told(failures_of(store)):
        tell(line, "yellow")
    zero = _silent_rows(store)
    if len(zero):
        first = ", ".join(map(str, zero[:5].tolist())) + (", ..." if len(zero) > 5 else "")
        warn(
            f"done with a gradient of zero and a loss that is not: {counted(len(zero), 'row')} ({first}), on which no "
            "trained parameter has an influence"
        )
    index, count = (0, 1) if shard is None else parse_shard(shard)
    units = assign(range(store.partition.num_units), count, index)
    check_some_done(store, np.concatenate([store.partition.unit_rows(unit) for unit in units or [0]]))
    if missing := set(units) & set(store.missing()):
        console.print(
            f"[red]{len(missing):,} of {store.partition.num_units:,} units are missing[/]: a process has died, another "
            "run is computing them, or somebody has taken them away; run the same line again"
        )
        return 1
    if strict and (failed := store.counts()["failed"]):
        raise ValueError(
            f"store {store.path}: {failed:,} of {store.num_rows:,} rows failed; expected none (--strict): mend the "
            "records and give another --out, or the same line with --retry-failed"
        )
    return 0


def _silent_rows(store: GradientStore | ScoreStore) -> np.ndarray:
    """Rows that are done, whose gradient is exactly zero while their loss is not, ascending."""
    whole = slice(0, store.num_rows)
    done = store.stored("status", whole) == Status.DONE
    return np.flatnonzero(done & (store.stored("norm", whole) == 0) & (store.stored("loss", whole) != 0))
