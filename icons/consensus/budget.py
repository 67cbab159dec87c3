"""How many rows a selection may have, and which: counts, tokens, quotas, lists of rows that are always or never in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int, Shaped

from icons.consensus.ranking import best, ordered


@dataclass(frozen=True)
class Sources:
    """Which source (any field of the records) each row comes from.

    Attributes:
        code: `[N]` integers, places in `names`.
        names: the sources.
    """

    code: Int[np.ndarray, " rows"]
    names: Sequence[str]

    def code_of(self, name: str) -> int:
        """The code of a source.

        Raises:
            ValueError: no row comes from it.
        """
        if name not in self.names:
            some = ", ".join(sorted(self.names)[:10])
            raise ValueError(f"source {name!r}: no record has it; expected one of {some}")
        return list(self.names).index(name)


@dataclass(frozen=True)
class Budget:
    """What a selection has to keep to, beside its order.

    Rows are taken in steps: `include`; then for every task with a quota the best rows it votes for until the quota is
    reached (rows already taken that the task votes for count); then the best of the rest, passing over sources that
    have their share; until there are `num_rows` rows, or the next row would exceed `max_tokens`.

    Attributes:
        num_rows: rows to select; fewer if there are no more.
        include: rows that are always in; they count towards `num_rows` and the budgets.
        exclude: rows that are never in.
        task_quotas: task -> share of `num_rows` that has to come from the rows this task votes for, at least.
        source_quotas: source -> share of `num_rows` that may come from it, at most.
        sources: needed with `source_quotas`.
        max_tokens: supervised tokens of the whole selection, at most.
        tokens: `[N]` tokens of each row; needed with `max_tokens`.
    """

    num_rows: int
    include: Sequence[int] = ()
    exclude: Sequence[int] = ()
    task_quotas: Mapping[str, float] = field(default_factory=dict)
    source_quotas: Mapping[str, float] = field(default_factory=dict)
    sources: Sources | None = None
    max_tokens: int | None = None
    tokens: Int[np.ndarray, " rows"] | None = None

    def __post_init__(self) -> None:
        for name, share in [*self.task_quotas.items(), *self.source_quotas.items()]:
            if not 0 <= share <= 1:
                raise ValueError(f"quota of {name}: got {share}; expected a share of the selection, 0 to 1")
        both = sorted(set(self.include) & set(self.exclude))
        if both:
            raise ValueError(f"rows {both[:5]}: are both to be included and to be excluded; expected one of them")
        if self.max_tokens is not None and self.tokens is None:
            raise ValueError("token budget: got no tokens per row; expected a score store that has them")

    @property
    def is_bounded(self) -> bool:
        """Whether more than the number of rows decides: then the selection has no single border."""
        return bool(self.include or self.task_quotas or self.source_quotas or self.max_tokens is not None)

    def take(
        self,
        scored: Bool[np.ndarray, " rows"],
        score: Shaped[np.ndarray, " rows"],
        tie: Shaped[np.ndarray, " rows"],
        voters: Mapping[str, Bool[np.ndarray, " rows"]],
    ) -> Int[np.ndarray, " selected"]:
        """The selected rows, ascending.

        Args:
            scored: rows that may be selected at all.
            score: by which they are ranked.
            tie: which breaks ties of `score`; ties of both go to the lower row.
            voters: for every task with a quota, the rows it votes for.

        Raises:
            ValueError: a row to include or exclude is not there, or one to include has no score.
        """
        self.check(scored)
        free = scored.copy()
        free[np.asarray(self.exclude, np.int64)] = False
        taken = np.zeros(len(scored), bool)
        taken[np.asarray(self.include, np.int64)] = True
        for task, share in self.task_quotas.items():
            voted = voters[task]
            wanted = min(int(share * self.num_rows) - int((taken & voted).sum()), self.num_rows - int(taken.sum()))
            taken[best(free & voted & ~taken, score, tie, wanted)] = True
        wanted = self.num_rows - int(taken.sum())
        rest = free & ~taken
        if not self.source_quotas and self.max_tokens is None:
            taken[best(rest, score, tie, wanted)] = True
            return np.flatnonzero(taken)
        order = ordered(np.flatnonzero(rest), score, tie)
        order = order[self.within_quota(order, taken)][: max(wanted, 0)]
        return np.flatnonzero(taken | np.isin(np.arange(len(scored)), self.within_tokens(order, taken)))

    def check(self, scored: Bool[np.ndarray, " rows"]) -> None:
        for verb, rows in (("include", self.include), ("exclude", self.exclude)):
            beyond = [row for row in rows if not 0 <= row < len(scored)]
            if beyond:
                raise ValueError(f"rows to {verb}: got {beyond[:5]}; expected 0 to {len(scored) - 1}")
        failed = [row for row in self.include if not scored[row]]
        if failed:
            raise ValueError(
                f"rows to include: {failed[:5]} have no score (they failed), so they cannot be selected; take them off "
                "the list"
            )

    def within_quota(
        self, order: Int[np.ndarray, " rest"], taken: Bool[np.ndarray, " rows"]
    ) -> Bool[np.ndarray, " rest"]:
        """Which of the rows, in this order, find room in the quota of their source."""
        room = np.ones(len(order), bool)
        for name, share in self.source_quotas.items():
            assert self.sources is not None
            code = self.sources.code_of(name)
            have = int((taken & (self.sources.code == code)).sum())
            same = np.flatnonzero(self.sources.code[order] == code)
            room[same[max(0, int(share * self.num_rows) - have) :]] = False
        return room

    def within_tokens(
        self, order: Int[np.ndarray, " rest"], taken: Bool[np.ndarray, " rows"]
    ) -> Int[np.ndarray, " some"]:
        """The first of the rows, in this order, up to the one that would exceed the token budget."""
        if self.max_tokens is None:
            return order
        assert self.tokens is not None
        spent = int(self.tokens[taken].sum()) + np.cumsum(self.tokens[order], dtype=np.int64)
        return order[: int(np.searchsorted(spent, self.max_tokens, side="right"))]
