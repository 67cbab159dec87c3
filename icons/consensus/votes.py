"""Scores per task -> votes -> the selected rows: the generalist stage (arXiv 2501.00654, section 3)."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from icons.consensus.budget import Budget, Sources
from icons.consensus.explanation import Explanation, explain
from icons.consensus.origin import scorer_behind
from icons.consensus.pairs import Pairs, pairs_behind
from icons.consensus.rules.aggregates import merge_weights
from icons.consensus.rules.columns import Columns, survey
from icons.consensus.rules.evidence import Evidence
from icons.consensus.rules.own import OwnRule, imported, name_of, ordered_by
from icons.consensus.rules.table import RULES, Rule
from icons.scores import Scorer
from icons.scores.rows import Source as Gradients
from icons.terminal import counted


@runtime_checkable
class Scores(Protocol):
    """What a score store offers here."""

    @property
    def influence(self) -> Any: ...
    @property
    def tasks(self) -> list[str]: ...


@dataclass(frozen=True)
class Selection:
    """Selected rows, and what they were selected by.

    Attributes:
        rows: the selected rows, int64, ascending.
        votes: tasks that vote for a row, int32; 0 for a row without a score.
        score: what the method ranks by, float64, higher is better; NaN for a row without a score. For `vote`: the
            votes (times the tasks' weights).
        percentile_rank: mean over tasks of the row's percentile rank, float64 in (0, 1): breaks ties of `score`. NaN
            for a row without a score.
        thresholds: each task's, in the dtype of the scores.
        tasks: their names.
        method: by which `score` was made.
        settings: the arguments, as they were understood.
    """

    rows: Int[np.ndarray, " selected"]
    votes: Int[np.ndarray, " rows"]
    score: Float[np.ndarray, " rows"]
    percentile_rank: Float[np.ndarray, " rows"]
    thresholds: Float[np.ndarray, " tasks"]
    tasks: list[str]
    method: str
    settings: dict[str, Any] = field(default_factory=dict)

    def explain(self, row: int, scores: Any) -> Explanation:
        """Why a row is selected, or is not: see `icons.consensus.explanation.explain`."""
        return explain(row, self, scores)

    def __repr__(self) -> str:
        tasks = counted(len(self.tasks), "task")
        return f"Selection({self.method}: {len(self.rows):,} of {len(self.votes):,} rows, {tasks})"


METHODS = tuple(RULES)


def select(
    scores: Scores | Float[np.ndarray, "rows tasks"] | Float[Tensor, "rows tasks"],
    fraction: float = 0.2,
    method: str | OwnRule = "vote",
    *,
    num_rows: int | None = None,
    vote_fraction: float | None = None,
    weights: Mapping[str, float] | Sequence[float] | None = None,
    source_weights: Mapping[str, float] | None = None,
    budget: Mapping[str, Any] | None = None,
    values: Shaped[np.ndarray, " rows"] | None = None,
    num_validation: Sequence[int] | None = None,
    pairs: Pairs | Mapping[str, Float[np.ndarray, "_ _"]] | None = None,
    train: Gradients | Sequence[Gradients] | None = None,
    tasks: Mapping[str, Gradients | Sequence[Gradients]] | None = None,
    options: Mapping[str, int | float] | None = None,
    seed: int = 0,
) -> Selection:
    """The rows that help most tasks at once.

    By default each task votes for the rows at or above its own (100 - p)-th percentile, p = 100 `fraction`, and the
    `int(fraction * N)` rows with the most votes are selected. The threshold is `numpy.percentile` (linear
    interpolation) over the rows that have a score, compared with `>=`: votes equal the original's. Rows with equal
    votes, which the original leaves to an unstable sort, are ordered by their mean percentile rank over the tasks, then
    by row.

    A row with NaN for any task has no score: it is in no percentile, has no vote and is never selected. `fraction` is
    a share of all N rows, so that a failed row makes room for the next best.

    Args:
        scores: influence `[N, S]`: an array, a tensor, or a score store.
        fraction: share of the rows to select, 0 to 1.
        method: a rule by name (`icons.consensus.rules.RULES` says what each does), by import path
            (`module:function`), or a function that takes `scores` and gives rows, the best first.
        num_rows: rows to select, in place of `fraction`.
        vote_fraction: the share that each task votes for, if not the selected share.
        weights: of the tasks, by name or in order; default 1 each.
        source_weights: source -> factor on the score of its rows (methods whose scores are never negative); needs
            `sources` in `budget`.
        budget: further fields of `icons.consensus.budget.Budget`: lists, quotas, a token budget.
        values: `[N]` losses or norms for the baselines; default: the score store's.
        num_validation: validation rows per task, for `direct_merge`; default: the score store's.
        pairs: products with single validation rows, for rules that read them: `[N, M]` for each task, or open `Pairs`;
            default: from `train` and `tasks`.
        train, tasks: gradients as `icons.influence` takes them, for rules that read them; default: those that a score
            store was made from.
        options: of the rule, such as `{"rounds": 20}` of `balanced`.
        seed: for rules that draw.

    Raises:
        ValueError: an unknown method, task, source or option; a share outside 0 to 1; no row has a score; or what a
            method needs is missing.

    Source: arXiv 2501.00654, section 3 (stage 2).

    >>> influence = np.array([[0.9, 0.1], [0.8, 0.9], [0.1, 0.8], [0.2, 0.2]], dtype=np.float32)
    >>> chosen = select(influence, fraction=0.5)
    >>> chosen.rows.tolist(), chosen.votes.tolist()
    ([0, 1], [1, 2, 1, 0])
    """
    rule = _rule_of(method)
    matrix, names = matrix_of(scores)
    columns = Columns(matrix, names)
    if num_rows is not None and vote_fraction is None and not 0 <= num_rows <= columns.num_rows:
        raise ValueError(f"number of rows: got {num_rows:,}; expected 0 to {columns.num_rows:,}, which the scores have")
    size = int(fraction * columns.num_rows) if num_rows is None else num_rows
    share = fraction if num_rows is None else num_rows / columns.num_rows
    share = share if vote_fraction is None else vote_fraction
    for name, value in (("fraction", fraction), ("vote fraction", share)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: got {value}; expected a share of the rows, 0 to 1")
    weight = _weights_of(weights, columns.tasks)
    limits = Budget(num_rows=size, **(budget or {}))
    limits.check(columns.scored)
    thresholds, counted, tie = survey(columns, share, weight)

    def gradients(pairwise: bool) -> Scorer:
        return scorer_behind(scores, train, tasks, columns.num_rows, columns.tasks, pairwise)

    with ExitStack() as stack:
        evidence = Evidence(
            scores=scores,
            columns=columns,
            thresholds=thresholds,
            weights=weight,
            votes=counted,
            tie=tie,
            wanted=max(0, size - len(limits.include)),
            included=np.asarray(limits.include, np.int64),
            excluded=np.asarray(limits.exclude, np.int64),
            seed=seed,
            values=values,
            num_validation=num_validation,
            sources=limits.sources,
            open_pairs=cache(lambda: pairs_behind(pairs, scores, gradients, columns.num_rows, columns.tasks, stack)),
            open_scorer=lambda: gradients(False),
        )
        settings: dict[str, Any] = {
            "num_rows": size,
            "vote_fraction": share,
            "is_bounded": limits.is_bounded or bool(source_weights),
            "weights": dict(zip(names, weight.tolist(), strict=True)),
            "seed": seed,
            "options": dict(options or {}),
        }
        if method == "direct_merge":
            settings["merge_weights"] = dict(zip(names, merge_weights(evidence).tolist(), strict=True))
        try:
            score = rule.apply(evidence, options or {})
        except ValueError as error:
            raise ValueError(f"{method}: {error}" if isinstance(method, str) else str(error)) from error
    if source_weights:
        score = score * _source_factors(source_weights, limits.sources, columns.scored, score)
    everywhere = {name: _spread(part, columns.scored, np.nan) for name, part in (("score", score), ("tie", tie))}
    chosen = limits.take(
        columns.scored, everywhere["score"], everywhere["tie"], _voters_of(columns, limits.task_quotas, thresholds)
    )
    return Selection(
        rows=chosen,
        votes=_spread(counted, columns.scored, 0.0),
        score=everywhere["score"],
        percentile_rank=everywhere["tie"],
        thresholds=thresholds,
        tasks=columns.tasks,
        method=method if isinstance(method, str) else name_of(method),
        settings=settings,
    )


def _rule_of(method: str | OwnRule) -> Rule:
    """A rule by name, by import path, or of one's own.

    Raises:
        ValueError: there is no such rule.
    """
    if isinstance(method, str) and method in RULES:
        return RULES[method]
    if isinstance(method, str) and ":" not in method:
        raise ValueError(f"method {method!r}: expected one of {', '.join(RULES)}, or MODULE:FUNCTION")
    own = imported(method) if isinstance(method, str) else method
    return Rule(lambda evidence: ordered_by(own, evidence), f"the rule {name_of(own)}")


def matrix_of(scores: Any) -> tuple[Float[np.ndarray, "rows tasks"], list[str]]:
    """The scores as an array in their own precision (half precision as float32), and the tasks' names."""
    if isinstance(scores, Scores):
        return np.asarray(scores.influence[:]), list(scores.tasks)
    if isinstance(scores, Tensor):
        scores = scores.detach().cpu()
        scores = scores.numpy() if scores.dtype.itemsize >= 4 else scores.float().numpy()
    matrix = np.asarray(scores)
    matrix = matrix if matrix.dtype in (np.float32, np.float64) else matrix.astype(np.float32)
    if matrix.ndim != 2:
        raise ValueError(f"scores: got shape {matrix.shape}; expected [rows, tasks]")
    return matrix, [str(task) for task in range(matrix.shape[1])]


def _weights_of(
    weights: Mapping[str, float] | Sequence[float] | None, tasks: Sequence[str]
) -> Float[np.ndarray, " tasks"]:
    if isinstance(weights, Mapping):
        unknown = [task for task in weights if task not in tasks]
        if unknown:
            raise ValueError(f"weights: no task {unknown[0]!r}; expected some of {', '.join(tasks)}")
        weights = [weights.get(task, 1.0) for task in tasks]
    numbers = np.ones(len(tasks)) if weights is None else np.asarray(weights, np.float64)
    if numbers.shape != (len(tasks),) or not (numbers >= 0).all() or not numbers.any():
        raise ValueError(
            f"weights: got {numbers.tolist()}; expected {counted(len(tasks), 'number')} >= 0, one for each task"
        )
    return numbers


def _source_factors(
    factors: Mapping[str, float],
    sources: Sources | None,
    scored: Bool[np.ndarray, " rows"],
    score: Shaped[np.ndarray, " scored"],
) -> Float[np.ndarray, " scored"]:
    if sources is None:
        raise ValueError("source weights: got no sources; expected budget={'sources': Sources(...)}")
    if score.min() < 0:
        raise ValueError("source weights: this method has negative scores, which a factor would turn about; use vote")
    factor = np.ones(len(sources.names))
    for name, value in factors.items():
        if value < 0:
            raise ValueError(f"weight of source {name}: got {value}; expected a number >= 0")
        factor[sources.code_of(name)] = value
    return factor[sources.code[scored]]


def _voters_of(
    columns: Columns, tasks: Mapping[str, float], thresholds: Float[np.ndarray, " tasks"]
) -> dict[str, Bool[np.ndarray, " rows"]]:
    """The rows that each of the given tasks votes for."""
    voters = {}
    for task in tasks:
        if task not in columns.tasks:
            raise ValueError(f"quota: no task {task!r}; expected some of {', '.join(columns.tasks)}")
        column = columns.tasks.index(task)
        voters[task] = columns.scored & (columns.scores[:, column] >= thresholds[column])
    return voters


def _spread(part: Shaped[np.ndarray, " scored"], scored: Bool[np.ndarray, " rows"], fill: float) -> np.ndarray:
    """Values of the scored rows, put back among all rows."""
    dtype = part.dtype if not np.isnan(fill) else np.dtype(np.float64)
    if scored.all():
        return part.astype(dtype, copy=False)
    whole = np.full(len(scored), fill, dtype)
    whole[scored] = part
    return whole
