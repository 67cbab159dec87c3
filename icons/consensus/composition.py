"""What a selection is made of, against the pool and against what the tasks ask."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

_MOST_NAMES, OTHERS = 40, "(others)"
"""Words of a trait that are told apart: the most frequent ones."""


@dataclass(frozen=True)
class Kind:
    """Rows of one kind: their share of the selection, of the pool, and of the tasks' validation rows (None: unknown).

    `deviation` is the difference between selection and pool in standard deviations of a random draw.
    """

    trait: str
    value: str
    selected: float
    pool: float
    tasks: float | None
    deviation: float


def variety(shares: Iterable[float]) -> float:
    """Effective number of kinds: the exponential of the entropy of their shares.

    >>> round(variety([0.5, 0.5, 0.0]), 6)
    2.0
    """
    present = np.array([share for share in shares if share > 0])
    return float(np.exp(-(present * np.log(present)).sum())) if len(present) else 0.0


def composition(
    traits: Mapping[str, np.ndarray],
    selected: Bool[np.ndarray, " rows"],
    tasks: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> list[Kind]:
    """What selection, pool and tasks are made of, those kinds first whose share differs most from the pool's.

    Args:
        traits: trait -> the word of each row.
        selected: which of these rows are selected.
        tasks: task -> the traits of its validation rows; tasks weigh equally.
    """
    kinds: list[Kind] = []
    tasks = tasks or {}
    num, size = int(selected.sum()), len(selected)
    for trait, words in traits.items():
        names, code = frequent(words, selected, [part[trait] for part in tasks.values()])
        pool = np.bincount(code, minlength=len(names)) / max(size, 1)
        chosen = np.bincount(code[selected], minlength=len(names)) / max(num, 1)
        asked = [shares(part[trait], names) for part in tasks.values()]
        spread = np.sqrt(pool * (1 - pool) / max(num, 1) * max(1 - num / max(size, 1), 1e-9))
        for index, name in enumerate(names.tolist()):
            share = float(np.mean([part[index] for part in asked])) if asked else None
            apart = float((chosen[index] - pool[index]) / spread[index]) if spread[index] > 0 else 0.0
            kinds.append(Kind(trait, name, float(chosen[index]), float(pool[index]), share, apart))
    return sorted(kinds, key=lambda kind: (-abs(kind.selected - kind.pool), kind.trait, kind.value))


def frequent(
    words: np.ndarray, selected: Bool[np.ndarray, " rows"], of_tasks: Sequence[np.ndarray]
) -> tuple[np.ndarray, Int[np.ndarray, " rows"]]:
    """The most frequent words of pool, selection or tasks, `OTHERS` for the rest, and each row's place among them."""
    names, code = np.unique(np.concatenate([words, *of_tasks]).astype(str), return_inverse=True)
    code = code[: len(words)]
    most = np.bincount(code, minlength=len(names)) / max(len(words), 1)
    most = np.maximum(most, np.bincount(code[selected], minlength=len(names)) / max(int(selected.sum()), 1))
    for part in of_tasks:
        most = np.maximum(most, shares(part, names))
    kept = np.sort(np.lexsort((names, -most))[:_MOST_NAMES])
    position = np.full(len(names), len(kept))
    position[kept] = np.arange(len(kept))
    every = names[kept] if len(kept) == len(names) else np.append(names[kept], OTHERS)
    return every, position[code]


def shares(words: np.ndarray, names: np.ndarray) -> Float[np.ndarray, " names"]:
    """Share of each name among the words; words that are no names are `OTHERS`, where that is one.

    >>> shares(np.array(["a", "b", "a", "c"], dtype=object), np.array(["a", OTHERS])).tolist()
    [0.5, 0.5]
    """
    index_of = {name: number for number, name in enumerate(names.tolist())}
    counted = np.zeros(len(names))
    for word in words.tolist():
        number = index_of.get(str(word), index_of.get(OTHERS))
        if number is not None:
            counted[number] += 1
    return counted / max(len(words), 1)
