"""Scores of all training rows into a score store, unit by unit, on one device or many (Lightning Fabric)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from icons.agreement import PLACES, SCORES, STATUSES, check_compatible
from icons.choices import Normalize, Reduce
from icons.manifest import versions
from icons.modules.ranks import Run
from icons.modules.renewal import described, renew
from icons.partition import UnitPlan, assign
from icons.scores import Scorer
from icons.store import GradientStore, ScoreStore
from icons.store.failures import check_some_done
from icons.store.unit_writer import UnitWriter, statuses_of

_UNIT_ROWS = 1 << 14
_UNIT_BYTES = 32 << 20
_COPIED = {"norm": "float32", "loss": "float32", "tokens": "int32"}


@dataclass(frozen=True)
class Scoring:
    """One run of `icons influence`: where the gradients are, how they are multiplied, where the scores go.

    Attributes:
        train: gradient stores of the training rows, one per checkpoint.
        tasks: name -> gradient stores of its validation rows, one per checkpoint.
        out: the score store; one that exists is gone on with.
        normalize, task_normalize, weights, groups, reduce, drop_axes, subspace: as for `icons.influence`.
        pairwise: also store every training row's product with every validation row, `pairwise_TASK [N, M]`.
        top_pairs: validation rows to keep for each training row and task: `top_rows_TASK` and `top_influence_TASK`
            `[N, k]`, the strongest first.
        preconditioned_tasks: take validation rows that went through a preconditioner, which are refused otherwise.
        chunk_rows: rows per unit of the score store; default: about 16,000, fewer with `pairwise`.
        overwrite: replace a score store of other settings, and write beside files of another kind.
    """

    train: Sequence[str]
    tasks: Mapping[str, Sequence[str]]
    out: str
    normalize: Normalize = "projected"
    task_normalize: Normalize | None = None
    weights: Sequence[float] | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    reduce: Reduce = "max"
    pairwise: bool = False
    top_pairs: int = 0
    chunk_rows: int | None = None
    overwrite: bool = False
    drop_axes: int = 0
    subspace: float | None = None
    preconditioned_tasks: bool = False

    def run(
        self,
        fabric: Fabric,
        advance: Callable[[int], None] = lambda rows: None,
        say: Callable[[str], None] = lambda said: None,
    ) -> ScoreStore:
        """Computes this rank's share of the units that are still to do; SIGTERM and SIGUSR1 end it after the current
        unit.

        Args:
            fabric: launched.
            advance: called with the number of rows after every block of this rank.
            say: called on the first rank with what the user should know.

        Raises:
            ValueError: see `Scorer.of`; a store has failed rows alone; that at `out` was made from something else;
                another run computes some of its units; a source has changed meanwhile; or a unit is missing in the end.
            SystemExit: a rank was interrupted.
        """
        part = Run()
        stores = [GradientStore.open(path) for path in self.train]
        tasks = {name: [GradientStore.open(path) for path in paths] for name, paths in self.tasks.items()}
        sources = [*stores, *(store for several in tasks.values() for store in several)]
        begun = [store.status_digest() for store in sources]
        for made_from in sources:
            check_some_done(made_from)
        scorer = Scorer.of(
            stores,
            tasks,
            normalize=self.normalize,
            task_normalize=self.task_normalize,
            weights=self.weights,
            groups=self.groups,
            reduce=self.reduce,
            pairwise=self.pairwise or self.top_pairs > 0,
            drop_axes=self.drop_axes,
            subspace=self.subspace,
            device=fabric.device,
            preconditioned_tasks=self.preconditioned_tasks,
        )
        planned: Any = fabric.broadcast(self.prepare(scorer, stores, tasks, say) if fabric.is_global_zero else None)
        if isinstance(planned, Exception):  # on every rank, since the others would wait for rank 0 for ever
            raise planned
        store = ScoreStore.open(self.out, mode="r+")
        done = store.num_rows - sum(len(store.partition.unit_rows(unit)) for unit in planned)
        advance(done)
        error: Exception | None = None
        part.watch(lambda: None)
        try:
            mine = assign(sorted(planned), fabric.world_size, fabric.global_rank)
            again = {unit: planned[unit] for unit in mine}
            scored = self.fill(store, scorer, stores, sources, again, advance, part)
            if (now := [source.status_digest() for source in sources]) != begun:
                store.unwrite(scored)  # another run may have noted the new statuses as theirs meanwhile
                changed = next(source for source, old, new in zip(sources, begun, now, strict=True) if old != new)
                raise ValueError(
                    f"{changed.path}: its rows have changed while they were scored; run the same line again, which "
                    "computes what depends on them"
                )
        except Exception as failure:
            error = failure
        part.end(error)
        store = ScoreStore.open(self.out)
        if missing := store.missing():
            raise ValueError(
                f"store {store.path}: {len(missing):,} of {store.partition.num_units:,} units are missing, for example "
                f"unit {missing[0]}: somebody has taken them away while they were written; run the same line again"
            )
        return store

    def fill(
        self,
        store: ScoreStore,
        scorer: Scorer,
        stores: Sequence[GradientStore],
        sources: Sequence[GradientStore],
        planned: Mapping[int, np.ndarray],
        advance: Callable[[int], None],
        part: Run,
    ) -> list[int]:
        """Computes units that no other run is computing; each is written while the next one is computed. Those units,
        as far as a signal has let it come."""
        writer, scored = UnitWriter(store, again=planned), list[int]()

        def claim(unit: int, patient: bool = False) -> bool:
            return part.stop_status is None and writer.claim(unit, patient)

        try:
            writer.sweep()
            for unit in UnitPlan(store.partition, list(planned), claim).claimed():
                values = self.unit(scorer, stores, store.partition.unit_rows(unit), advance)
                for source in sources:
                    source.check_same()
                writer.store_unit(unit, values)
                scored.append(unit)
        finally:
            writer.close()
        if part.stop_status is None:
            writer.finish()
        return scored

    def prepare(
        self,
        scorer: Scorer,
        stores: Sequence[GradientStore],
        tasks: Mapping[str, Sequence[GradientStore]],
        say: Callable[[str], None],
    ) -> dict[int, np.ndarray] | Exception:
        """Opens or creates the score store (rank 0); the units to do, with the statuses that they have now, or what
        went wrong."""
        try:
            manifest = self.manifest(scorer, stores, tasks)

            def check(store: ScoreStore) -> None:
                what = f"the score store {self.out}"
                check_compatible(_lasting(store.manifest), _lasting(manifest), SCORES, what, "this run")

            store = ScoreStore.taken_up(self.out, check, lambda: self.create(scorer, manifest), self.overwrite)
            renew(store, manifest, say)
            return _units_to_do(store, stores)
        except (ValueError, OSError) as error:
            return error

    def create(self, scorer: Scorer, manifest: Mapping[str, Any]) -> ScoreStore:
        extra: dict[str, tuple[str, list[tuple[str, int]]]] = {name: (dtype, []) for name, dtype in _COPIED.items()}
        for name, rows in scorer.checkpoints[0].tasks.rows.items():
            if self.pairwise:
                extra[f"pairwise_{name}"] = ("float32", [(f"validation_{name}", len(rows))])
            if self.top_pairs:
                size = [(f"top_{name}", min(self.top_pairs, len(rows)))]
                extra[f"top_rows_{name}"], extra[f"top_influence_{name}"] = ("int32", size), ("float32", size)
        widest = max((length for _, sizes in extra.values() for _, length in sizes), default=1)
        return ScoreStore.create(
            self.out,
            num_rows=scorer.num_rows,
            tasks=scorer.tasks,
            manifest=manifest,
            chunk_rows=self.chunk_rows or unit_rows(scorer, widest),
            extra=extra,
            overwrite=self.overwrite,
        )

    def manifest(
        self, scorer: Scorer, stores: Sequence[GradientStore], tasks: Mapping[str, Sequence[GradientStore]]
    ) -> dict[str, Any]:
        """What the scores are made from and with."""
        first = scorer.checkpoints[0].tasks
        of_column = {
            column: sum(first.num_rows[index] for index in indices) for column, indices in scorer.groups.items()
        }
        return {
            "data": stores[0].manifest.get("data"),
            "model": stores[0].manifest.get("model"),
            "projector": stores[0].manifest.get("projector"),
            "dim": stores[0].dim,
            "num_validation": list(of_column.values()),
            "normalize": scorer.normalize,
            "task_normalize": scorer.task_normalize,
            "weights": [checkpoint.weight for checkpoint in scorer.checkpoints],
            "groups": {name: list(members) for name, members in self.groups.items()},
            "reduce": self.reduce,
            "pairwise": self.pairwise,
            "top_pairs": self.top_pairs,
            **({"drop_axes": self.drop_axes} if self.drop_axes else {}),  # stores of before it do not name it
            **({"subspace": self.subspace} if self.subspace is not None else {}),
            "train": [described(store) for store in stores],
            "tasks": {name: [described(store) for store in several] for name, several in tasks.items()},
            "warnings": sorted({text for store in stores for text in store.manifest.get("warnings", [])}),
            "versions": versions("icons-lightning", "torch", "zarr"),
        }

    def unit(
        self, scorer: Scorer, stores: Sequence[GradientStore], rows: range, advance: Callable[[int], None]
    ) -> dict[str, np.ndarray]:
        """Everything that is stored of one unit."""
        parts = []
        for part in scorer.score(rows):
            stored = {"influence": part.influence.numpy(), "stderr": part.stderr.numpy()}
            for name, pairs in part.pairs.items():
                stored |= {f"pairwise_{name}": pairs.numpy()} if self.pairwise else {}
                stored |= strongest(name, pairs, self.top_pairs) if self.top_pairs else {}
            parts.append(stored)
            advance(len(part.rows))
        values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        span = slice(rows.start, rows.stop)
        values |= {name: stores[0].stored(name, span) for name in _COPIED}
        return {**values, "status": status_of(stores, span)}


def strongest(name: str, pairs: torch.Tensor, num: int) -> dict[str, np.ndarray]:
    """The validation rows with the highest products, and the products; -1 and NaN where there are not so many."""
    values, rows = pairs.nan_to_num(nan=-torch.inf).topk(min(num, pairs.shape[1]), dim=1)
    missing = values == -torch.inf
    return {
        f"top_rows_{name}": rows.masked_fill(missing, -1).int().numpy(),
        f"top_influence_{name}": values.masked_fill(missing, torch.nan).numpy(),
    }


def status_of(stores: Sequence[GradientStore], span: slice) -> np.ndarray:
    """Status of each row: done if it is at every checkpoint, otherwise the first failure."""
    return np.maximum.reduce([store.stored("status", span) for store in stores])


def _units_to_do(store: ScoreStore, stores: Sequence[GradientStore]) -> dict[int, np.ndarray]:
    """Units not written yet, or written before failed rows were tried again (`icons gradients --retry-failed`), with
    their statuses."""
    now = store.statuses()
    changed = np.flatnonzero(now != status_of(stores, slice(None)))
    return statuses_of(store, np.unique(changed // store.partition.chunk_rows).tolist(), now)


def unit_rows(scorer: Scorer, widest: int) -> int:
    """Rows per unit of the score store: whole units of the gradient store, few enough that no chunk exceeds 32 MB."""
    chunk = scorer.checkpoints[0].train.partition.chunk_rows
    most = min(_UNIT_ROWS, _UNIT_BYTES // (4 * widest))
    return min(chunk * max(1, most // chunk), scorer.num_rows)


def _lasting(value: Any) -> Any:
    """A manifest without what may differ between a run and its resume, all the way down."""
    if isinstance(value, Mapping):
        return {key: _lasting(entry) for key, entry in value.items() if key not in {*PLACES, STATUSES}}
    return [_lasting(entry) for entry in value] if isinstance(value, list) else value


def blocks_of(store: ScoreStore, name: str) -> Iterator[np.ndarray]:
    """One array of a score store, unit by unit."""
    for unit in range(store.partition.num_units):
        rows = store.partition.unit_rows(unit)
        yield store.stored(name, slice(rows.start, rows.stop))
