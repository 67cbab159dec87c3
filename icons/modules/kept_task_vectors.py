"""The task vectors of `icons score`: kept ones from their folder, the others computed."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Trainer
from torch import nn

from icons.agreement import TASK_VECTOR, check_compatible
from icons.datamodules.datamodule import ConversationDataModule
from icons.datamodules.sampler import UnitBatchSampler, unit_dataloader
from icons.models.fingerprint import adapter_fingerprint, base_fingerprint
from icons.modules.task_vectorizer import TaskVector, TaskVectorizer
from icons.partition import Partition, UnitPlan, assign

log = logging.getLogger(__name__)


def describe_vectors(
    model: nn.Module, modules: Mapping[str, ConversationDataModule], unit: bool
) -> dict[str, dict[str, Any]]:
    """What each task's vector is made from."""
    model_part = {
        "model": {"fingerprint": base_fingerprint(model)},
        "adapter": {"fingerprint": adapter_fingerprint(model)},
        "normalize": "exact" if unit else "none",
    }
    return {name: {**module.describe(), **model_part} for name, module in modules.items()}


def find_vectors(
    trainer: Trainer,
    model: nn.Module,
    modules: Mapping[str, ConversationDataModule],
    manifests: Mapping[str, Mapping[str, Any]],
    folder: Path,
    unit: bool,
) -> dict[str, TaskVector]:
    """The tasks' vectors: those in `folder` that were made from the same files and model, the others computed.

    Every rank computes whole tasks, so that the sums do not depend on the number of ranks.
    """
    todo = [name for name in modules if not is_kept(folder / f"{name}.safetensors", manifests[name])]
    if todo:
        mine = assign(range(len(todo)), trainer.world_size, trainer.global_rank)
        loaders = []
        for place, name in enumerate(todo):
            module, dataset = modules[name], modules[name].dataset
            plan = UnitPlan(Partition(len(dataset), len(dataset)), [0] if place in mine else [])
            sampler = UnitBatchSampler(plan, dataset.lengths, module.batch_size, module.max_tokens)
            loaders.append(unit_dataloader(dataset, sampler, dataset.collate))
        vectorizer = TaskVectorizer(model, todo, unit)
        trainer.predict(vectorizer, loaders, return_predictions=False)
        for place in mine:
            vector = vectorizer.vector(todo[place], dict(manifests[todo[place]]))
            vector.save(folder / f"{todo[place]}.safetensors")
        trainer.strategy.barrier()
    return {name: TaskVector.load(folder / f"{name}.safetensors") for name in modules}


def is_kept(file: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a task vector is there and was made from the same; says so if it is there and was not."""
    if not file.is_file():
        return False
    try:
        check_compatible(TaskVector.load(file).manifest, manifest, TASK_VECTOR, str(file), "this run")
    except ValueError as difference:
        log.info("computing the task vector anew: %s", difference)
        return False
    return True
