"""Where scores come from: the gradient stores that a score store was made from, opened again."""

from collections.abc import Mapping, Sequence
from typing import Any

from icons.agreement import SOURCE, check_compatible
from icons.scores import Scorer
from icons.store import GradientStore, ScoreStore
from icons.store.manifest import ScoreManifest


def scorer_of(
    store: ScoreStore,
    train: Sequence[str] | None = None,
    tasks: Mapping[str, Sequence[str]] | None = None,
    pairwise: bool = False,
) -> Scorer:
    """A scorer as the one that made the score store.

    Args:
        store: the score store.
        train: gradient stores of the training rows, one per checkpoint; default: those in its manifest.
        tasks: task -> gradient stores of its validation rows, likewise.
        pairwise: also give products with single validation rows.

    Raises:
        ValueError: the score store names no gradient stores (`icons score` makes none); or one that is given is not the
            one the scores were made from.
        FileNotFoundError: a store is no longer where it was.
    """
    facts = store.facts
    trains, of_tasks = opened(store, train, tasks)
    return Scorer.of(
        trains,
        of_tasks,
        normalize=facts.normalize,
        task_normalize=facts.task_normalize,
        weights=facts.weights if len(facts.weights) == len(trains) else None,
        groups=facts.groups,
        reduce=facts.reduce,
        pairwise=pairwise,
        drop_axes=facts.drop_axes,
        subspace=facts.subspace,
    )


def opened(
    store: ScoreStore, train: Sequence[str] | None, tasks: Mapping[str, Sequence[str]] | None
) -> tuple[list[GradientStore], dict[str, list[GradientStore]]]:
    """The gradient stores of training rows and of tasks, checked against the score store's manifest."""
    facts = store.facts
    entries = facts.train
    trains = list(train) if train else [entry["path"] for entry in entries]
    known = of_tasks(facts)
    paths = {name: [entry["path"] for entry in listed] for name, listed in known.items()}
    paths |= {name: list(given) for name, given in (tasks or {}).items()}
    wanted = [member for task in store.tasks for member in facts.members(task)]
    lacking = [name for name in wanted if name not in paths]
    if not trains or lacking:
        raise ValueError(
            f"scores {store.path}: names no gradients of training and validation rows (it was made without them); "
            f"expected --train STORE and --task NAME=STORE for {', '.join(lacking or wanted)}"
        )
    opened_trains = [GradientStore.open(path) for path in trains]
    for source, entry in zip(opened_trains, entries, strict=False):
        check_compatible(source.manifest, entry, SOURCE, f"the store {source.path}", f"the scores {store.path}")
    opened_tasks = {name: [GradientStore.open(path) for path in paths[name]] for name in wanted}
    for name, sources in opened_tasks.items():
        for source, stated in zip(sources, known.get(name, []), strict=False):
            check_compatible(source.manifest, stated, SOURCE, f"the store {source.path}", f"the scores {store.path}")
    return opened_trains, opened_tasks


def of_tasks(facts: ScoreManifest) -> dict[str, list[Mapping[str, Any]]]:
    """Task -> its gradient stores' entries in a score store's manifest; none where it was scored without them."""
    return {
        name: entries
        for name, entries in facts.tasks.items()
        if isinstance(entries, list) and all(isinstance(entry, Mapping) and "path" in entry for entry in entries)
    }


def scorer_behind(scores: Any, train: Any, tasks: Any, num_rows: int, names: Sequence[str], pairwise: bool) -> Scorer:
    """The gradients that the scores come from: those that are given, or that a score store names.

    Raises:
        ValueError: they are neither given nor named by the scores, or they are of other rows or tasks.
    """
    if train is not None and tasks is not None:
        scorer = Scorer.of(train, tasks, pairwise=pairwise)
    elif hasattr(scores, "scorer"):
        scorer = scores.scorer(pairwise)
    elif isinstance(scores, ScoreStore):
        scorer = scorer_of(scores, pairwise=pairwise)
    else:
        raise ValueError(
            "got scores without gradients; expected a score store that names its gradient stores, or train and tasks "
            "as `icons.influence` takes them"
        )
    check_same("gradients", scorer, num_rows, names)
    return scorer


def check_same(what: str, opened: Any, num_rows: int, tasks: Sequence[str]) -> None:
    """Compares the rows and tasks of gradients, or of products of them, with those of the scores.

    Raises:
        ValueError: they are others.
    """
    if opened.num_rows != num_rows or opened.tasks != list(tasks):
        raise ValueError(
            f"{what}: got {opened.num_rows} rows and the tasks {', '.join(opened.tasks)}; expected "
            f"{num_rows} and {', '.join(tasks)}, as the scores have"
        )
