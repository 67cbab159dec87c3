"""Columns of a former score store, so that a task can be added without scoring the others again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icons.agreement import REUSED_SCORES, TASK_VECTOR, check_compatible, check_image_files
from icons.batch import Status
from icons.store import ScoreStore
from icons.store.image_files import check_images_of_rows
from icons.terminal import counted


@dataclass(frozen=True)
class FormerScores:
    """A finished score store, and which of its columns are taken over as they are.

    Attributes:
        store: the former store.
        taken: columns that are taken over.
        columns: all columns of the new store, in order.
    """

    store: ScoreStore
    taken: Sequence[str]
    columns: Sequence[str]

    @classmethod
    def of(
        cls,
        store: ScoreStore,
        columns: Mapping[str, Sequence[str]],
        tasks: Mapping[str, Mapping[str, Any]],
        reduce: str,
    ) -> "FormerScores":
        """Takes over each column that the store has of the same tasks, made from the same files.

        Args:
            store: the former store.
            columns: column -> the tasks that it is made of.
            tasks: task -> the manifest that its vector has, or would have.
            reduce: how several tasks become one column.

        Raises:
            ValueError: the store is not finished, or it already has all columns.
        """
        if missing := store.missing():
            raise ValueError(f"--reuse {store.path}: lacks {counted(len(missing), 'unit')}; finish the store first")
        taken = [name for name, members in columns.items() if _is_same(store, name, members, tasks, reduce)]
        if len(taken) == len(columns):
            raise ValueError(
                f"--reuse {store.path}: has all of {', '.join(columns)} already; expected a further --task, or use it "
                "as it is"
            )
        return cls(store, taken, list(columns))

    def manifest(self, own: Mapping[str, Any], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """The manifest of the new store: as if all its columns had been computed now.

        Raises:
            ValueError: the former scores were made from something else: the field and both values. Or an image file has
                been replaced.
        """
        former = self.store.manifest
        check_compatible(former, own, REUSED_SCORES, f"--reuse {self.store.path}", "this run")
        check_images_of_rows(self.store, own, remedy="score all tasks without --reuse")
        tasks = {**former["tasks"], **own["tasks"]}
        members = {name: list(groups.get(name, [name])) for name in self.columns}
        return {
            **own,
            "tasks": {task: tasks[task] for several in members.values() for task in several},
            "groups": {name: list(several) for name, several in groups.items()},
            "num_validation": [sum(tasks[task]["num_rows"] for task in several) for several in members.values()],
        }

    def widened(self, outputs: Mapping[str, Tensor], computed: Sequence[str]) -> dict[str, Tensor]:
        """A batch's scores of the `computed` columns, with those of the former store at their places. A row that failed
        in either is failed."""
        rows = outputs["row"].cpu().numpy()
        first = int(rows.min())
        block = slice(first, int(rows.max()) + 1)
        status = torch.from_numpy(self.store.stored("status", block)[rows - first])
        now = outputs["status"].cpu()
        wide = {**outputs, "status": torch.where(now == Status.DONE, status.to(now.dtype), now)}
        for name in ("influence", "stderr"):
            kept = self.store.stored(name, block)[rows - first]
            new = outputs[name].cpu()
            parts = {column: torch.from_numpy(kept[:, self.store.tasks.index(column)]) for column in self.taken}
            parts |= {column: new[:, index] for index, column in enumerate(computed)}
            wide[name] = torch.stack([parts[column] for column in self.columns], dim=1)
        return wide


def _is_same(
    store: ScoreStore, column: str, members: Sequence[str], tasks: Mapping[str, Mapping[str, Any]], reduce: str
) -> bool:
    facts = store.facts
    if column not in store.tasks or any(task not in tasks for task in members):
        return False
    if facts.members(column) != list(members) or (len(members) > 1 and facts.reduce != reduce):
        return False
    try:
        for task in members:
            check_compatible(facts.tasks[task], tasks[task], TASK_VECTOR)
            check_image_files(facts.tasks[task], tasks[task], f"the store {store.path}")
    except ValueError:
        return False
    return True
