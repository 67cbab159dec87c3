"""`icons select`: a score store -> the selected rows, and the selected part of the data file."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Column, Table

from icons.batch import Status
from icons.cli.console import console, tell, warn
from icons.cli.health import measure, show
from icons.cli.loaded_scores import LoadedScores
from icons.cli.options.select import SelectOptions
from icons.cli.pairs import parse, stores_of
from icons.consensus import Selection
from icons.consensus import select as select_rows
from icons.consensus.border import Border, border
from icons.consensus.duplicates import NearDuplicates
from icons.consensus.ranking import ordered
from icons.consensus.selection_file import (
    foreign_files,
    is_manifest,
    is_note,
    is_written_by,
    list_paths,
    manifest_path,
    note_path,
    save_lists,
    write_table,
)
from icons.consensus.selection_output import SelectionOutput
from icons.datamodules.dialects import dialect_named
from icons.datamodules.record_lists import ids_of, rows_of, sources_of
from icons.datamodules.records import RecordSource, open_records
from icons.datamodules.training_formats import MADE_BY, facts_of, write_training_data
from icons.output import check_output, inside, is_marked, mark
from icons.store import GradientStore, ScoreStore
from icons.terminal import counted


def select(options: SelectOptions) -> int:
    """Selects the rows that help most tasks at once, and writes them in the data file's own form and order."""
    if options.num_rows is not None and options.fraction is not None:
        raise ValueError(
            f"--num-rows {options.num_rows} and --fraction {options.fraction:g}: each says how many rows to select; "
            "leave one of them out"
        )
    dialect, of_tasks = dialect_named(options.dialect), stores_of(options.task, "--task")
    inputs: dict[str, Any] = {"--scores": options.scores, "--data": options.data, "--train": options.train}
    inputs |= {"--include": options.include, "--exclude": options.exclude, "--task": [*chain(*of_tasks.values())]}
    index = open_records(options.data)
    _check_outputs(options, inputs, index)
    if options.format is not None and options.images is not None and not options.images.is_dir():
        raise FileNotFoundError(
            f"--images {options.images}: no such folder; expected the one that image names start from"
        )
    store = ScoreStore.open(options.scores)
    check_data(store, index, options.data)
    loaded = LoadedScores(store, options.train, of_tasks)
    by_source = options.source_weight or options.source_quota or options.method == "stratified"
    sources = sources_of(index, options.source_field) if by_source else None
    lists = {"include": options.include, "exclude": options.exclude}
    budget: dict[str, Any] = {
        **{name: rows_of(path, index) if path else [] for name, path in lists.items()},
        "task_quotas": numbers(options.task_quota, "--task-quota"),
        "source_quotas": numbers(options.source_quota, "--source-quota"),
        "sources": sources,
        "max_tokens": options.max_tokens,
        "tokens": loaded.array("tokens"),
    }
    settings: dict[str, Any] = {
        "fraction": 0.2 if options.fraction is None else options.fraction,
        "method": options.method,
        "options": numbers(options.option, "--option"),
        "num_rows": options.num_rows,
        "vote_fraction": options.vote_fraction,
        "weights": numbers(options.weight, "--weight") or None,
        "source_weights": numbers(options.source_weight, "--source-weight") or None,
        "seed": options.seed,
    }
    num_near = 0
    with loaded:
        chosen = select_rows(loaded, budget=budget, **settings)
        if options.near_duplicates is not None:
            gradients, before = _opened_gradients(store, options.train), chosen.rows
            chosen = _without_near_duplicates(chosen, loaded, budget, settings, gradients, options.near_duplicates)
            num_near = len(np.setdiff1d(before, chosen.rows))
        health = measure(chosen, loaded, index, options.source_field, dialect, options.seed) if options.health else None
    if len(chosen.rows) == 0:
        raise ValueError(
            f"selection: has none of {store.num_rows:,} rows; expected one or more: raise --fraction, --num-rows or "
            "--max-tokens"
        )
    edge = border(chosen, loaded.influence, loaded.stderr, store.facts.dim)
    given = {name: getattr(options, name) for name in ("source_field", "max_tokens", "near_duplicates")} | settings
    given |= {name: budget[name] for name in ("task_quotas", "source_quotas")}
    given |= {name: str(path) if path else None for name, path in lists.items()}
    made_from = manifest(chosen, store, index, edge, given)
    if health is not None:
        made_from["health"] = health.plain()
    beside = list_paths(options.out) | ({"table": options.table} if options.table is not None else {})
    with SelectionOutput(options.out, beside) as new:
        if options.table is not None:
            write_table(new.partials["table"], columns(chosen, loaded, index))
        if options.format is None:
            index.write_selection(chosen.rows.tolist(), new.partials["data"])
            if new.partials["data"].is_dir():
                mark(new.partials["data"], MADE_BY)
        else:
            root, card = options.images.absolute() if options.images else None, facts_of(made_from)
            about: dict[str, Any] = {"named": options.out, "image_root": root, "dialect": dialect, "card": card}
            write_training_data(index, chosen.rows.tolist(), new.partials["data"], options.format, **about)
        save_lists(new.partials, chosen.rows, ids_of(index, chosen.rows.tolist()))
        new.publish(chosen.rows, made_from)
    summary(chosen, store, options.out, edge, num_near)
    if health is not None:
        show(health)
    return 0


def _check_outputs(options: SelectOptions, inputs: Mapping[str, Any], index: RecordSource) -> None:
    """Refuses to write over anything but a former selection; one that was edited since is the user's."""
    out, table = options.out, options.table
    common: dict[str, Any] = {"kind": "file", "overwrite": options.overwrite}
    if options.format is None and index.check_out(out) == "file":
        check_output(out, inputs=inputs, ours=lambda path: is_written_by(out, "data", path), **common)
    else:
        folder = {**common, "kind": "folder", "searched": {"--images": options.images}}
        check_output(out, inputs=inputs, ours=lambda path: is_marked(path, MADE_BY), **folder)
        if not options.overwrite and is_marked(out, MADE_BY) and (foreign := foreign_files(out)):
            raise ValueError(
                f"--out {out}: holds {foreign[0].relative_to(out)}, which is not as this command wrote it; expected a "
                "former output as it was: move that file, or --overwrite to write there all the same"
            )
    if manifest_path(out) == out:
        raise ValueError(
            f"--out {out}: is called as the manifest of a selection; expected the name of the data: leave "
            "'.manifest.json' out"
        )
    if table is not None and inside(table, out):
        raise ValueError(f"--table {table}: lies in {out}, which --out makes; expected another place: give one")
    check_output(note_path(out), "the note of --out", inputs=inputs, ours=is_note, **common)
    check_output(manifest_path(out), "the manifest of --out", inputs=inputs, ours=is_manifest, **common)
    for name, path in list_paths(out).items():
        check_output(path, f"{name} of --out", inputs=inputs, ours=partial(is_written_by, out, name), **common)
    if table is not None:
        named = {**inputs, "--out": [out, manifest_path(out)]}
        check_output(table, "--table", inputs=named, ours=lambda path: is_written_by(out, "table", path), **common)


def check_data(store: ScoreStore, index: RecordSource, data: Path) -> None:
    """Refuses a score store that is not whole, or that belongs to other data: the rows would be other records."""
    missing = store.counts()["missing"]
    if missing:
        raise ValueError(
            f"scores {store.path}: {missing:,} of {store.num_rows:,} rows are not scored yet; run the line "
            "that made this store again to finish them"
        )
    if len(index) != store.num_rows:
        raise ValueError(
            f"data {data}: has {len(index):,} records, the scores {store.path} have {store.num_rows:,} rows; expected "
            "the file that the gradients were computed from"
        )
    known = store.facts.data.fingerprint
    if known is not None and known != index.fingerprint:
        raise ValueError(
            f"data {data}: has fingerprint {index.fingerprint}, the scores {store.path} were made from {known}; "
            "expected the file that the gradients were computed from, unchanged"
        )


def numbers(pairs: Sequence[str] | None, option: str) -> dict[str, float]:
    """NAME=NUMBER options.

    >>> numbers(["gqa=2"], "--weight")
    {'gqa': 2.0}
    """
    values = {}
    for name, value in parse(pairs or [], option, "gqa=2").items():
        try:
            values[name] = float(value)
        except ValueError:
            raise ValueError(f"{option} {name}={value}: expected NAME=NUMBER") from None
    return values


def _opened_gradients(store: ScoreStore, given: Sequence[str] | None) -> GradientStore:
    """The (first) gradient store of the training rows: the one that is given, or that the scores were made from.

    Raises:
        ValueError: there is neither.
    """
    paths = given or [entry["path"] for entry in store.facts.train]
    if not paths:
        raise ValueError(
            f"--near-duplicates: the scores {store.path} name no gradients of training rows (they were made without "
            "them); expected --train STORE"
        )
    return GradientStore.open(paths[0])


def _without_near_duplicates(
    chosen: Selection,
    loaded: LoadedScores,
    budget: Mapping[str, Any],
    settings: Mapping[str, Any],
    gradients: GradientStore,
    cosine: float,
) -> Selection:
    """Drops near-duplicates of better rows and fills up with the next best, until none is left."""
    dropped: list[int] = list(budget["exclude"])
    included = np.asarray(budget["include"], dtype=np.int64)
    seen = np.zeros(len(chosen.votes), bool)
    with NearDuplicates(gradients, cosine) as near:
        while True:
            new = chosen.rows[~seen[chosen.rows]]
            if len(new) == 0:
                return chosen
            first = included[~seen[included]]
            rest = ordered(np.setdiff1d(new, first), chosen.score, chosen.percentile_rank)
            order = np.concatenate([first, rest])
            seen[order] = True
            dropped += order[near.add(order, keep=len(first))].tolist()
            chosen = select_rows(loaded, budget={**budget, "exclude": dropped}, **settings)


def columns(chosen: Selection, loaded: LoadedScores, index: RecordSource) -> dict[str, np.ndarray]:
    """The table's columns: the selected rows, the best first; the other scored rows likewise; rows without a score."""
    is_scored, is_selected = np.isfinite(chosen.score), np.zeros(len(chosen.score), bool)
    is_selected[chosen.rows] = True
    parts = [chosen.rows, np.flatnonzero(is_scored & ~is_selected)]
    order = np.concatenate([ordered(part, chosen.score, chosen.percentile_rank) for part in parts])
    order = np.concatenate([order, np.setdiff1d(np.arange(len(is_scored)), order)])
    table: dict[str, np.ndarray] = {"rank": np.arange(1, len(order) + 1), "row": order, "selected": is_selected[order]}
    names = {status.value: status.name.lower() for status in Status}
    table["status"] = np.array([names.get(code, str(code)) for code in loaded.statuses()[order].tolist()], dtype=object)
    table |= {"id": np.array(ids_of(index, order.tolist()), dtype=object), "votes": chosen.votes[order]}
    table |= {"score": chosen.score[order], "percentile_rank": chosen.percentile_rank[order]}
    return table | {f"influence_{task}": loaded.influence[order, column] for column, task in enumerate(loaded.tasks)}


def manifest(
    chosen: Selection, store: ScoreStore, index: RecordSource, edge: Border | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What the selection was made from and with."""
    uncertain: dict[str, Any] = {}
    if edge is not None:
        uncertain = {"certain": edge.certain, "may_leave": edge.may_leave, "may_enter": edge.may_enter}
        uncertain |= {"certain_at_4_dim": edge.certain_at_4_dim, "dim": edge.dim, "verdict": edge.verdict()}
    return {
        "num_rows": len(chosen.votes),
        "num_selected": len(chosen.rows),
        "method": chosen.method,
        "fraction": chosen.settings["vote_fraction"],
        "thresholds": dict(zip(chosen.tasks, chosen.thresholds.tolist(), strict=True)),
        "border": uncertain,
        "settings": dict(settings),
        "data": {"path": str(index.path), "fingerprint": index.fingerprint, "num_rows": len(index)},
        "scores": {"path": store.path, **store.manifest},
        "warnings": store.facts.warnings,
    }


def summary(chosen: Selection, store: ScoreStore, out: Path, edge: Border | None, num_near: int) -> None:
    """Prints the votes, and what is certain."""
    pool = np.bincount(chosen.votes[np.isfinite(chosen.score)], minlength=len(chosen.tasks) + 1)
    taken = np.bincount(chosen.votes[chosen.rows], minlength=len(chosen.tasks) + 1)
    table = Table(*(Column(name, justify="right") for name in ("votes", "pool", "selected")))
    for votes, (rows, chosen_rows) in enumerate(zip(pool.tolist(), taken.tolist(), strict=True)):
        table.add_row(f"{votes}", f"{rows:,}", f"{chosen_rows:,}")
    console.print(table)
    failed = store.counts()["failed"]
    said = f"{out}: {len(chosen.rows):,} of {len(chosen.votes):,} rows selected by {chosen.method}"
    said += f"; {counted(failed, 'failed row')} cannot be" if failed else ""
    tell(said)
    if num_near:
        console.print(f"near-duplicates: {counted(num_near, 'row')} left out, the next best taken")
    if edge is not None:
        console.print(
            f"certain at 95 %: {100 * edge.share:.1f} % of the selection ({counted(edge.certain, 'row')}); "
            f"{counted(edge.may_leave, 'selected row')} could swap places with {counted(edge.may_enter, 'other')}. "
            f"{edge.verdict()}",
            soft_wrap=True,
        )
    for text in store.facts.warnings:
        warn(text)
