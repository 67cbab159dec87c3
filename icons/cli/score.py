"""`icons score`: exact influence of every training row on every task; no projection, no gradient stores."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer

from icons.agreement import SUMMED_SCORES, check_compatible
from icons.batch import Status
from icons.cli.console import tell, warn
from icons.cli.gradients import TRAINER as TRAINER
from icons.cli.gradients import WRITING, check_curvature, chosen, predict, predict_flags, replaces, shared, summary
from icons.cli.model_source import ModelSource
from icons.cli.options.groups import CheckpointOptions
from icons.cli.options.score import ScoreOptions
from icons.cli.pairs import files_of
from icons.datamodules.records import open_records
from icons.modules.exact_scorer import InfluenceScorer, ScoredTasks, columns_of
from icons.modules.fit import quiet
from icons.modules.former_scores import FormerScores
from icons.modules.gradient_writer import GradientWriter
from icons.modules.kept_task_vectors import describe_vectors, find_directed
from icons.modules.score_writer import ScoreWriter
from icons.modules.store_writer import StoreWriter
from icons.output import check_output, is_marked, mark
from icons.projection import PROJECTORS
from icons.store import GradientStore, ScoreStore, fitting_chunk_rows
from icons.store.former import holds_store
from icons.terminal import counted


def score(options: ScoreOptions) -> int:
    """Scores every training row on every task exactly; the same line, run again, resumes."""
    flags = predict_flags(options.trainer)
    _check_directions(options)
    weights: list[float] = _one_each("--weights", options.weights, options.checkpoint, 1 / len(options.checkpoint))
    states: list[Path | None] = _one_each("--optimizer-state", options.optimizer_state, options.checkpoint)
    factors: list[Path | None] = _one_each("--factors", options.factors, options.checkpoint)
    preconditioner = chosen(options.preconditioner, False, bool(options.factors))
    check_curvature(preconditioner, options.factors, options.damping)
    if options.keep_gradients is not None and preconditioner == "kfac":
        raise ValueError(
            f"--keep-gradients {options.keep_gradients}: got --preconditioner kfac, whose whole updates a projection "
            "drowns in noise; expected another: `icons gradients --factors` stores rows that can be multiplied"
        )
    if options.keep_gradients is not None and len(options.checkpoint) > 1:
        raise ValueError(
            f"--keep-gradients {options.keep_gradients}: got {len(options.checkpoint)} checkpoints; expected one: run "
            "it for each alone"
        )
    files, groups = files_of(options.task), options.groups
    for file in (options.data, *(file for file, _ in files.values())):
        open_records(file)  # what is no data is said before a model is loaded
    single = len(options.checkpoint) == 1
    inputs: dict[str, Any] = {
        "--data": options.data, "--checkpoint": options.checkpoint, "--optimizer-state": options.optimizer_state,
        "--reuse": options.reuse, "--factors": options.factors,
        "--task": [file for file, _ in files.values()],
    }  # fmt: skip
    common: dict[str, Any] = {"kind": "folder", "overwrite": replaces(options.overwrite, options.shard)}
    common |= {"searched": {"--images": options.images, "--task": [folder for _, folder in files.values() if folder]}}
    check_output(options.out, inputs=inputs, ours=partial(holds_store, kind=ScoreStore.KIND), **common)
    if options.keep_gradients is not None:
        own = partial(holds_store, kind=GradientStore.KIND)
        check_output(
            options.keep_gradients, "--keep-gradients", inputs={**inputs, "--out": options.out}, ours=own, **common
        )
    kept = options.task_vectors or options.out.with_name(options.out.name + ".tasks")
    own = partial(is_marked, command="score")
    check_output(kept, "--task-vectors", inputs={**inputs, "--out": options.out}, ours=own, **common)
    mark(kept, "score")
    outs = [
        options.out if single else options.out.with_name(f"{options.out.name}.checkpoint-{index}")
        for index in range(len(options.checkpoint))
    ]
    for index, folder in enumerate(options.checkpoint):
        source = ModelSource.resolve(CheckpointOptions(checkpoint=folder), states[index])
        if source.warning:
            warn(source.warning)
        model = source.load(options.target, dtype=options.model_dtype, **options.loading)
        modules = {name: source.datamodule(options, *paths, dialect="auto") for name, paths in files.items()}
        manifests = describe_vectors(model, modules, options.normalize == "exact")
        columns, former = columns_of(files, groups), None
        if options.reuse is not None:
            path = options.reuse if single else options.reuse.with_name(f"{options.reuse.name}.checkpoint-{index}")
            former = FormerScores.of(ScoreStore.open(path), columns, manifests, options.reduce)
            columns = {name: members for name, members in columns.items() if name not in former.taken}
            tell(f"taken over from {path}: {', '.join(former.taken) or 'no task'}")
        scored = {name: modules[name] for name in files if any(name in members for members in columns.values())}
        new_groups = {name: members for name, members in groups.items() if name in columns}
        with quiet():
            vectors, spans = find_directed(
                Trainer(**{"enable_progress_bar": False} | flags),
                model,
                scored,
                manifests,
                kept if single else kept / str(index),
                options.normalize == "exact",
                options.drop_axes,
                options.subspace,
            )
        kinds = new_groups, options.reduce, getattr(torch, options.vector_dtype), options.offload
        tasks = ScoredTasks(vectors, *kinds, spans=spans)
        scorer = InfluenceScorer(
            model,
            tasks,
            source.preconditioner(preconditioner, model, factors[index], options.damping),
            unit=options.normalize == "exact",
            projector=None
            if options.keep_gradients is None
            else PROJECTORS[options.projector](options.dim, seed=options.seed),
        )
        datamodule = source.datamodule(options, options.data, options.images)
        tell(datamodule.dataset.summary())
        writing: dict[str, Any] = {name: getattr(options, name) for name in WRITING}
        writing["manifest"] = {"target": options.target, **directions(options)}
        writers: list[StoreWriter] = []
        if options.keep_gradients is not None:
            writing["chunk_rows"] = options.chunk_rows or fitting_chunk_rows(
                len(datamodule.dataset), options.dim, options.dtype
            )
            writers.append(GradientWriter(options.keep_gradients, dtype=options.dtype, **writing))
        writers.append(ScoreWriter(outs[index], former=former, groups=groups, **writing))
        runner = predict(flags, scorer, datamodule, *writers)
    if not runner.is_global_zero:
        return shared(runner, 0)
    stores = [ScoreStore.open(path) for path in outs]
    total = stores[0] if single else _weighted_sum(stores, weights, options.out, options.overwrite)
    return shared(runner, summary(total, options.strict, options.shard))


def _one_each(option: str, given: Sequence[Any] | None, checkpoints: Sequence[Path], default: Any = None) -> list[Any]:
    """What an option gives for each checkpoint.

    Raises:
        ValueError: it is given more or fewer times.
    """
    if given and len(given) != len(checkpoints):
        raise ValueError(
            f"{option}: got {len(given)} for {counted(len(checkpoints), 'checkpoint')}; expected one for each"
        )
    return list(given or [default] * len(checkpoints))


def _check_directions(options: ScoreOptions) -> None:
    """
    Raises:
        ValueError: `--drop-axes` or `--subspace` has no meaning with what else was given.
    """
    if options.drop_axes < 0:
        raise ValueError(f"--drop-axes {options.drop_axes}: expected 0 or more")
    if options.subspace is None:
        if options.drop_axes and options.reuse is not None:
            raise ValueError(
                "--reuse: with --drop-axes every task changes all scores, since the axes are those of all tasks; score "
                "all tasks anew, without --reuse"
            )
        return
    if not 0 < options.subspace <= 1:
        raise ValueError(f"--subspace {options.subspace}: expected a share above 0 and at most 1")
    if options.drop_axes:
        raise ValueError(
            f"--subspace {options.subspace}: got --drop-axes {options.drop_axes} too; expected one of them (`icons "
            "influence` takes both)"
        )
    if options.normalize != "exact":
        raise ValueError(
            f"--subspace: got --normalize {options.normalize}; expected exact: within a subspace scores are cosines"
        )


def directions(options: ScoreOptions) -> dict[str, Any]:
    """What a store says of the directions of its scores; stores of plain cosines do not name them."""
    axes = {"drop_axes": options.drop_axes} if options.drop_axes else {}
    return axes | ({"subspace": options.subspace} if options.subspace is not None else {})


def _weighted_sum(stores: Sequence[ScoreStore], weights: Sequence[float], out: Path, overwrite: bool) -> ScoreStore:
    """The checkpoints' scores, added up with their weights (LESS, section 4.1: learning rates); made anew if there.

    A row that failed at one checkpoint is failed; a unit that one of them has still to do is missing.
    """
    first = stores[0]
    manifest = {key: value for key, value in first.manifest.items() if key not in ("format", "kind", "arrays")}
    manifest |= {"weights": list(weights), "checkpoints": [store.manifest["adapter"] for store in stores]}
    extra: dict[str, tuple[str, list[tuple[str, int]]]] = {"norm": ("float32", []), "loss": ("float32", [])}
    made: dict[str, Any] = {"num_rows": first.num_rows, "tasks": first.tasks, "manifest": manifest}
    made |= {"chunk_rows": first.partition.chunk_rows, "extra": extra | {"tokens": ("int32", [])}}

    def check(store: ScoreStore) -> None:
        check_compatible(store.manifest, manifest, SUMMED_SCORES, f"{out}", "this run")

    total = ScoreStore.taken_up(out, check, lambda: ScoreStore.create(out, overwrite=overwrite, **made), overwrite)
    for unit in range(first.partition.num_units):
        rows = first.partition.unit_rows(unit)
        span = slice(rows.start, rows.stop)
        parts = [store.stored("influence", span) for store in stores]
        influence = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        statuses = np.stack([store.stored("status", span) for store in stores])
        status = np.where((statuses == Status.NOT_WRITTEN).any(axis=0), Status.NOT_WRITTEN, statuses.max(axis=0))
        if not status.all():
            continue  # a checkpoint has still to do it
        copied = {name: first.stored(name, span) for name in ("norm", "loss", "tokens")}
        total.write_unit(
            unit, np.asarray(influence, np.float32), first.stored("stderr", span), status.astype(np.uint8), **copied
        )
    return total
