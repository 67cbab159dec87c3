"""Whether a selection has the marks of ones that fail, from the scores alone, before anything is trained.

The selection is compared with random sets of its size: how many validation rows it hurts, how many rows it is worth
(redundancy), and what it is made of, against the pool and against what the tasks ask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from icons.consensus.composition import Kind, variety
from icons.consensus.pairs import Pairs
from icons.consensus.random_sets import Compared, GradientPass, random_sets, sums_from_pairs
from icons.consensus.unit_rows import UnitRows
from icons.scores import Scorer


@dataclass(frozen=True)
class Limits:
    """Where a measure becomes a mark of failure. One place for all of them.

    Attributes:
        hurt: share of a task's validation rows that are hurt, above the random sets' 97.5th percentile by this much.
        effective: effective number of rows, as a share of random sets'.
        answers: effective number of different answers, likewise.
        scarce: an answer that tasks ask for has less than this share of what it has in the pool.
        asked: share of the tasks' validation rows from which an answer counts as asked for.
        frequent: an answer has this much more of the selection than of the pool and of the tasks' validation rows.
    """

    hurt: float = 0.05
    effective: float = 0.4
    answers: float = 0.25
    scarce: float = 0.0  # chosen on six pools: any limit above 0 gave 24 % false alarms there (docs/selection_study.md)
    asked: float = 0.05
    frequent: float = 0.2


_LIMITS = Limits()


@dataclass(frozen=True)
class Health:
    """The measures of one selection.

    Attributes:
        num_selected: its rows.
        hurt: task -> share of its validation rows whose summed influence from the selection is negative.
        effective: effective number of rows (of 1,000 rows) by the gradients' cosines; None: not known.
        kinds: what the selection is made of, those that differ most from the pool first.
        notes: what could not be measured, and why.
    """

    num_selected: int
    hurt: dict[str, Compared] = field(default_factory=dict)
    effective: Compared | None = None
    kinds: list[Kind] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        rows: Int[np.ndarray, " selected"],
        scored: Bool[np.ndarray, " rows"],
        gradients: Scorer | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        pairs: Pairs | None = None,
        kinds: Sequence[Kind] = (),
        notes: Sequence[str] = (),
        seed: int = 0,
    ) -> "Health":
        """The measures of a selection; one pass over the gradients.

        Args:
            rows: the selection.
            scored: rows that have a score, which random sets are drawn from.
            gradients: a scorer made with `pairwise`, as `icons.consensus.origin.scorer_of` gives; None: whom the
                selection hurts and how redundant it is are not measured.
            groups: of the scorer's tasks, task -> members.
            pairs: products with validation rows, if they are there already: then they are not computed again.
            kinds: from `composition`.
            notes: what else could not be measured.
            seed: of the random sets.
        """
        if gradients is None or len(rows) == 0:
            return cls(len(rows), kinds=list(kinds), notes=list(notes))
        sets = random_sets(rows, scored, seed=seed)
        unit = UnitRows(gradients)
        measured = GradientPass.over(unit, sets, scored, seed)
        if pairs is not None:
            sums = sums_from_pairs(pairs, sets)
        elif gradients.checkpoints[0].tasks.spans:  # sums of rows say nothing of cosines within subspaces
            with Pairs.of_gradients(gradients, groups) as made:
                sums = sums_from_pairs(made, sets)
        else:
            sums = measured.sums_on(unit.of_tasks(groups or {}))
        return cls(len(rows), hurt(sums), measured.effective(seed), list(kinds), list(notes))

    def plain(self) -> dict[str, Any]:
        """As JSON has it: what `from_plain` reads."""
        return {**asdict(self), "measures": self.measures(), "warnings": self.warnings()}

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> "Health":
        effective = content["effective"]
        return cls(
            content["num_selected"],
            {task: Compared(**part) for task, part in content["hurt"].items()},
            None if effective is None else Compared(**effective),
            [Kind(**kind) for kind in content["kinds"]],
            list(content["notes"]),
        )

    def measures(self) -> dict[str, float]:
        """Every measure as one number, for studies of which of them foretell failure; only those that are known.

        Names end with the direction in which a selection looks worse: `_up` or `_down`.
        """
        measures: dict[str, float] = {}
        if self.hurt:
            values = list(self.hurt.values())
            measures["hurt_mean_up"] = float(np.mean([part.value for part in values]))
            measures["hurt_excess_mean_up"] = float(np.mean([part.value - part.mean for part in values]))
            measures["hurt_excess_worst_up"] = max(part.value - part.mean for part in values)
        if self.effective is not None:
            measures["effective_rows_ratio_down"] = self.effective.value / self.effective.mean
        answers = [kind for kind in self.kinds if kind.trait == "answer"]
        if answers:
            measures["answer_variety_ratio_down"] = variety(k.selected for k in answers) / variety(
                k.pool for k in answers
            )
            measures["answer_excess_up"] = max(kind.selected - max(kind.pool, kind.tasks or 0) for kind in answers)
            measures["answer_distance_up"] = sum(abs(kind.selected - kind.pool) for kind in answers) / 2
        if answers and all(kind.tasks is not None for kind in answers):
            measures["answer_gap_up"] = self.gap("answer")
            asked = [kind for kind in answers if (kind.tasks or 0) >= _LIMITS.asked and kind.pool > 0]
            if asked:
                measures["scarcest_answer_ratio_down"] = min(kind.selected / kind.pool for kind in asked)
        return measures

    def gap(self, trait: str) -> float:
        """How much worse than the pool the selection covers what the tasks ask, in nats: sum of t log(p / s).

        Shares are smoothed by half a row.
        """
        half = 0.5 / max(self.num_selected, 1)
        kinds = [kind for kind in self.kinds if kind.trait == trait]
        return float(sum((k.tasks or 0) * np.log((k.pool + half) / (k.selected + half)) for k in kinds))

    def warnings(self, limits: Limits = _LIMITS) -> list[str]:
        """The marks of failed selections that this one has, and what to do; empty: none."""
        warnings = []
        for task, part in self.hurt.items():
            if part.value > part.high + limits.hurt:
                warnings.append(
                    f"the selection hurts {100 * part.value:.0f} % of the validation rows of {task}; random sets hurt "
                    f"{100 * part.mean:.0f} % ({100 * part.low:.0f} to {100 * part.high:.0f} %)"
                )
        if self.effective is not None and self.effective.value < limits.effective * self.effective.mean:
            warnings.append(
                f"the selection is redundant: 1,000 of its rows are worth {self.effective.value:.0f}, of random rows "
                f"{self.effective.mean:.0f}"
            )
        measured = self.measures()
        if measured.get("answer_variety_ratio_down", 1) < limits.answers:
            ratio = 100 * measured["answer_variety_ratio_down"]
            warnings.append(f"the selection has few different answers: {ratio:.0f} % of the pool's effective number")
        for kind in (kind for kind in self.kinds if kind.trait == "answer"):
            shares = f"{100 * kind.selected:.0f} % of the selection, {100 * kind.pool:.0f} % of the pool"
            asked = "" if kind.tasks is None else f", {100 * kind.tasks:.0f} % of the tasks' validation rows"
            if (kind.tasks or 0) >= limits.asked and kind.selected < limits.scarce * kind.pool:
                warnings.append(
                    f"the selection has lost an answer that tasks ask for: “{kind.value}” has {shares}{asked}"
                )
            elif kind.selected > max(kind.pool, kind.tasks or 0) + limits.frequent:
                warnings.append(f"the selection is full of one answer: “{kind.value}” has {shares}{asked}")
        return warnings


WHAT_TO_DO = (
    "Such selections have trained worse than random rows. Compare with --method coverage on scores made with `icons "
    "influence --drop-axes 3`, or with filtered_random (`icons validate --rule` tries rules on a small share), warm up "
    "for longer, or give more validation rows."
)


def hurt(
    sums: Mapping[str, Float[np.ndarray, "_ sets"]],
) -> dict[str, Compared]:
    """Per task, the share of validation rows whose summed influence is negative.

    Args:
        sums: task -> `[M, 1 + sets]`, summed influence on each validation row, from the selection and from random sets.

    >>> hurt({"qa": np.array([[-1.0, 1.0, 1.0], [2.0, 1.0, -1.0]])})["qa"].value
    0.5
    """
    shares = {task: (part < 0).mean(axis=0) for task, part in sums.items()}
    return {task: Compared.of(part[0], part[1:]) for task, part in shares.items()}
