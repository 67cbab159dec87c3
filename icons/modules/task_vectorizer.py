"""Task vectors of exact influence: the mean of a task's unit gradients, one tensor per trainable parameter."""

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from icons.batch import Batch
from icons.gradients import TaskMatrix, scored_gradients, weighted_gradient
from icons.models.tensor_files import write_tensors
from icons.modules.sharding import ShardedModule


@dataclass
class TaskVector:
    """The mean of a task's (unit) gradients, one tensor per trainable parameter.

    Attributes:
        vector: parameter name -> float32 tensor of its shape, on the CPU.
        num_rows: validation rows that the mean is over; failed rows do not count.
        manifest: what it was made from.
    """

    vector: dict[str, Tensor]
    num_rows: int
    manifest: dict[str, Any]

    def save(self, file: Path) -> None:
        """Writes safetensors with the manifest in its metadata; atomically."""
        about = {"num_rows": str(self.num_rows), "manifest": json.dumps(self.manifest)}
        write_tensors(file, self.vector, about)

    @classmethod
    def load(cls, file: Path) -> "TaskVector":
        with safe_open(file, framework="pt") as tensors:
            about = tensors.metadata()
            vector = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
        return cls(vector, int(about["num_rows"]), json.loads(about["manifest"]))


class TaskPass(ShardedModule):
    """One pass over the validation rows of some tasks, task by task.

    Args:
        model: any Hugging Face causal or image-text model.
        tasks: names, in the order of the dataloaders.
    """

    def __init__(self, model: nn.Module, tasks: Iterable[str]) -> None:
        super().__init__()
        self.model, self.tasks = model.eval(), list(tasks)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if len(batch["labels"]):
            self.visit(self.tasks[dataloader_idx], batch)

    @abstractmethod
    def visit(self, task: str, batch: Batch) -> None:
        """Takes a batch of at least one of the task's rows."""

    @abstractmethod
    def vector(self, task: str, manifest: dict[str, Any]) -> TaskVector:
        """What was found of one task, in the form in which it is kept."""


class TaskVectorizer(TaskPass):
    """Adds up the unit gradients of each task's rows; no per-sample gradient is kept.

    The mean over validation rows is linear: per batch one streaming pass gives the norms, and one ordinary batched
    backward pass of sum_i loss_i / |g_i| the sum of the unit gradients.

    Args:
        model, tasks: see `TaskPass`.
        unit: divide each row's gradient by its norm; False: the mean of plain gradients.
    """

    def __init__(self, model: nn.Module, tasks: Iterable[str], unit: bool = True) -> None:
        super().__init__(model, tasks)
        self.unit = unit
        self.totals: dict[str, dict[str, Tensor]] = {}  # of tasks of which a row was seen
        self.counts = dict.fromkeys(self.tasks, 0)

    def visit(self, task: str, batch: Batch) -> None:
        _, norm, _ = scored_gradients(self.model, batch, TaskMatrix(self.model, []))
        good = norm.isfinite() & (norm > 0)
        weights = torch.where(good, 1 / norm if self.unit else torch.ones_like(norm), 0)
        add_to(self.totals.setdefault(task, {}), weighted_gradient(self.model, batch, weights))
        self.counts[task] += int(good.sum())

    def vector(self, task: str, manifest: dict[str, Any]) -> TaskVector:
        """The mean of one task.

        Raises:
            ValueError: no row of the task has a gradient.
        """
        count = self.counts[task]
        if count == 0:
            raise ValueError(f"task {task}: no validation row has a finite gradient; expected at least one usable row")
        return TaskVector({name: value.cpu() / count for name, value in self.totals[task].items()}, count, manifest)


def add_to(total: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Adds tensors to a sum by name."""
    for name, value in values.items():
        total[name] = total[name] + value if name in total else value
