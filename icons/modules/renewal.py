"""Renewal: scores whose tasks' rows have other statuses than when they were made are computed again.

Failed rows that were tried again change statuses. A task's mean has changed then, and with it every row's score; of a
training row that has changed, its own score alone, which its unit's statuses tell.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from icons.agreement import IMAGE_FILES, STATUSES
from icons.store import GradientStore, ScoreStore
from icons.store.lease import Leases
from icons.terminal import counted


def described(store: GradientStore) -> dict[str, Any]:
    """A source, with the statuses that its rows have now."""
    about = {name: entry for name, entry in store.manifest.items() if name != IMAGE_FILES}
    return {"path": store.path, **about, STATUSES: store.status_digest()}


def renew(store: ScoreStore, manifest: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Has all units computed again if a task's rows have other statuses than those that the scores were made from.

    Raises:
        ValueError: so it is, and another run is still computing with the former ones.
    """
    if changed := _changed_tasks(store, manifest):
        lock = Leases(store.storage)
        # a unit beyond the last one: of the store as a whole
        if (busy := lock.living()) or not lock.acquire(store.partition.num_units):
            raise ValueError(
                f"the score store {store.path}: the rows of task {changed[0]} have changed, and "
                f"{busy or 'another run'} is still scoring with the former ones; run the same line again when that "
                "run has ended"
            )
        try:
            if changed := _changed_tasks(ScoreStore.open(store.path), manifest):
                _unwrite(store, changed, say)
                store.amend(**_sources_in(manifest))
        finally:
            lock.close()
    elif _statuses_of(store.manifest["train"]) != _statuses_of(manifest["train"]):
        store.amend(**_sources_in(manifest))


def _changed_tasks(store: ScoreStore, manifest: Mapping[str, Any]) -> list[str]:
    former, now = store.manifest["tasks"], manifest["tasks"]
    return [name for name in now if _statuses_of(former[name]) != _statuses_of(now[name])]


def _unwrite(store: ScoreStore, changed: Sequence[str], say: Callable[[str], None]) -> None:
    if written := sorted(set(range(store.partition.num_units)) - set(store.missing())):
        known = any(any(_statuses_of(store.manifest["tasks"][name])) for name in changed)
        why = "have changed" if known else "may have changed (an earlier version did not note their statuses)"
        say(f"{store.path}: the rows of {', '.join(changed)} {why}: {counted(len(written), 'unit')} to compute anew")
        store.unwrite(written)


def _sources_in(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's part that follows from the sources' statuses."""
    return {name: manifest[name] for name in ("train", "tasks", "num_validation", "warnings")}


def _statuses_of(sources: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The statuses of several sources, as they were when something was made from them; None: it was not noted."""
    return [source.get(STATUSES) for source in sources]
