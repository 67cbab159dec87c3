"""The task vectors of `icons score`: kept ones from their folder, the others computed."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning import Trainer
from torch import nn

from icons.agreement import TASK_VECTOR, check_compatible, check_image_files
from icons.datamodules.datamodule import ConversationDataModule
from icons.datamodules.sampler import UnitBatchSampler, unit_dataloader
from icons.models.fingerprint import adapter_fingerprint, base_description
from icons.modules.task_directions import (
    TaskCombiner,
    TaskLocator,
    TaskSketcher,
    TaskSpan,
    of_axes,
    of_span,
    orthonormal,
    sketch_of,
    without_axes,
)
from icons.modules.task_vectorizer import TaskPass, TaskVector, TaskVectorizer
from icons.partition import Partition, UnitPlan, assign
from icons.scores.span import mean_within

log = logging.getLogger(__name__)


def describe_vectors(
    model: nn.Module, modules: Mapping[str, ConversationDataModule], unit: bool
) -> dict[str, dict[str, Any]]:
    """What each task's vector is made from."""
    model_part = {
        "model": {"fingerprint": base_description(model)["fingerprint"]},
        "adapter": {"fingerprint": adapter_fingerprint(model)},
        "normalize": "exact" if unit else "none",
    }
    return {name: {**module.describe(), **model_part} for name, module in modules.items()}


def find_directed(
    trainer: Trainer,
    model: nn.Module,
    modules: Mapping[str, ConversationDataModule],
    manifests: Mapping[str, Mapping[str, Any]],
    folder: Path,
    unit: bool,
    drop_axes: int = 0,
    subspace: float | None = None,
) -> tuple[dict[str, TaskVector], dict[str, TaskSpan]]:
    """The tasks' vectors, without their leading axes, and their spans, if scores are to be cosines within these; see
    `icons.modules.task_directions`. What `folder` has that was made from the same is not made anew.

    Args:
        drop_axes, subspace: as for `icons.influence`; one of them at most.

    Raises:
        ValueError: the rows do not vary along so many axes, or no row of a task has a gradient.
    """
    kept = _Kept(trainer, modules, folder)
    vectors = kept.parts_of("", manifests, lambda tasks: TaskVectorizer(model, tasks, unit))
    if not drop_axes and subspace is None:
        return vectors, {}
    about: dict[str, Any] = {"projector": sketch_of(model).describe()}
    made = kept.parts_of("sketch.", _with_directions(manifests, about), lambda tasks: TaskSketcher(model, tasks, unit))
    sketches = {task: sketch.vector for task, sketch in made.items()}
    if drop_axes:
        others = {task: vector.manifest["data"]["fingerprint"] for task, vector in vectors.items()}
        coefficients = of_axes(sketches, drop_axes, unit)
        about |= {"drop_axes": drop_axes, "tasks": others}
    else:
        assert subspace is not None
        coefficients = {task: of_span(sketch, subspace) for task, sketch in sketches.items()}
        about |= {"subspace": subspace}
    about_tasks = _with_directions(manifests, about)
    parts = kept.parts_of("sums.", about_tasks, lambda tasks: TaskCombiner(model, tasks, coefficients))
    if drop_axes:
        axes = orthonormal([parts[task].vector for task in modules])
        return {task: without_axes(vector, axes) for task, vector in vectors.items()}, {}
    directions = {task: orthonormal([part.vector]) for task, part in parts.items()}
    located = kept.parts_of("places.", about_tasks, lambda tasks: TaskLocator(model, tasks, directions))
    means = {task: mean_within(part.vector["rows"]) for task, part in located.items()}
    return vectors, {task: TaskSpan(directions[task], mean) for task, mean in means.items()}


def _with_directions(manifests: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {task: {**manifest, "directions": dict(about)} for task, manifest in manifests.items()}


@dataclass(frozen=True)
class _Kept:
    """What passes over tasks' validation rows find, kept in a folder: `TASK.KINDsafetensors`.

    Every rank computes whole tasks, so that the sums do not depend on the number of ranks.
    """

    trainer: Trainer
    modules: Mapping[str, ConversationDataModule]
    folder: Path

    def parts_of(
        self,
        kind: str,
        manifests: Mapping[str, Mapping[str, Any]],
        make: Callable[[dict[str, int]], TaskPass],
    ) -> dict[str, TaskVector]:
        """Every task's part: what lies there and was made from the same, the others computed.

        Args:
            kind: part of the files' names.
            manifests: task -> what its part is made from.
            make: the pass over the rows of some tasks, task -> number of rows.
        """
        # a name with a slash, as a benchmark's part has, is no folder
        files = {name: self.folder / f"{name.replace('/', '%2F')}.{kind}safetensors" for name in self.modules}
        todo = [name for name, file in files.items() if not _is_kept(file, manifests[name])]
        if todo:
            mine = assign(range(len(todo)), self.trainer.world_size, self.trainer.global_rank)
            module = make({name: len(self.modules[name].dataset) for name in todo})
            loaders = [self.loader(name, index in mine) for index, name in enumerate(todo)]
            self.trainer.predict(module, loaders, return_predictions=False)
            for index in mine:
                module.vector(todo[index], dict(manifests[todo[index]])).save(files[todo[index]])
            self.trainer.strategy.barrier()
        return {name: _loaded(file, manifests[name]) for name, file in files.items()}

    def loader(self, name: str, mine: bool) -> Any:
        module, dataset = self.modules[name], self.modules[name].dataset
        plan = UnitPlan(Partition(len(dataset), len(dataset)), [0] if mine else [])
        sampler = UnitBatchSampler(plan, dataset.lengths, module.batch_size, module.max_tokens)
        return unit_dataloader(dataset, sampler, dataset.collate)


def _loaded(file: Path, manifest: Mapping[str, Any]) -> TaskVector:
    """What was found to be there, or was put there, a moment ago.

    Raises:
        ValueError: another run has put its own there meanwhile.
    """
    vector = TaskVector.load(file)
    meanwhile = "another run has put its own there meanwhile: give another --task-vectors, and run the same line again"
    check_compatible(vector.manifest, manifest, TASK_VECTOR, str(file), "this run", meanwhile)
    return vector


def _is_kept(file: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a task vector is there and was made from the same; says so if it is there and was not."""
    if not file.is_file():
        return False
    try:
        kept = TaskVector.load(file).manifest
        check_compatible(kept, manifest, TASK_VECTOR, str(file), "this run")
        check_image_files(kept, manifest, str(file))
    except ValueError as difference:
        log.info("computing the task vector anew: %s", difference)
        return False
    return True
