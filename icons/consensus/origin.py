"""Where scores come from: the gradient stores that a score store was made from, opened again."""

from collections.abc import Mapping, Sequence
from typing import Any

from icons.agreement import SOURCE, check_compatible
from icons.scores import Scorer
from icons.store import GradientStore, ScoreStore


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
    manifest: Mapping[str, Any] = store.manifest
    trains, of_tasks = opened(store, train, tasks)
    weights = manifest.get("weights") or []
    return Scorer.of(
        trains,
        of_tasks,
        normalize=manifest.get("normalize", "projected"),
        task_normalize=manifest.get("task_normalize"),
        weights=weights if len(weights) == len(trains) else None,
        groups=manifest.get("groups") or {},
        reduce=manifest.get("reduce", "max"),
        pairwise=pairwise,
        drop_axes=manifest.get("drop_axes", 0),
        subspace=manifest.get("subspace"),
    )


def opened(
    store: ScoreStore, train: Sequence[str] | None, tasks: Mapping[str, Sequence[str]] | None
) -> tuple[list[GradientStore], dict[str, list[GradientStore]]]:
    """The gradient stores of training rows and of tasks, checked against the score store's manifest."""
    entries = store.manifest.get("train") or []
    groups: Mapping[str, Sequence[str]] = store.manifest.get("groups") or {}
    trains = list(train) if train else [entry["path"] for entry in entries]
    known = of_tasks(store.manifest)
    paths = {name: [entry["path"] for entry in found] for name, found in known.items()}
    paths |= {name: list(given) for name, given in (tasks or {}).items()}
    wanted = [member for task in store.tasks for member in groups.get(task, [task])]
    lacking = [name for name in wanted if name not in paths]
    if not trains or lacking:
        raise ValueError(
            f"scores {store.path}: names no gradients of training and validation rows (it was made without them); "
            f"expected --train STORE and --task NAME=STORE for {', '.join(lacking or wanted)}"
        )
    found = [GradientStore.open(path) for path in trains]
    for source, entry in zip(found, entries, strict=False):
        check_compatible(source.manifest, entry, SOURCE, f"the store {source.path}", f"the scores {store.path}")
    opened_tasks = {name: [GradientStore.open(path) for path in paths[name]] for name in wanted}
    for name, sources in opened_tasks.items():
        for source, entry in zip(sources, known.get(name, []), strict=False):
            check_compatible(source.manifest, entry, SOURCE, f"the store {source.path}", f"the scores {store.path}")
    return found, opened_tasks


def of_tasks(manifest: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Task -> its gradient stores' entries in a score store's manifest; none where it was scored without them."""
    tasks = manifest.get("tasks")
    if not isinstance(tasks, Mapping):
        return {}
    return {
        name: entries
        for name, entries in tasks.items()
        if isinstance(entries, list) and all(isinstance(entry, Mapping) and "path" in entry for entry in entries)
    }
