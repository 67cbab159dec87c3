"""The models that `icons validate` trains in one folder: with which settings, which of them now, and what is left."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from icons.cli.console import tell
from icons.cli.options.groups import LearningOptions
from icons.cli.options.validate import ValidateOptions
from icons.cli.pairs import files_of
from icons.cli.warmup import retrain
from icons.datamodules.records import open_records
from icons.interruption import RESUME
from icons.models.folder import ModelFolder
from icons.models.pinned_settings import claim
from icons.partition import assign, parse_shard
from icons.terminal import counted
from icons.validation.retraining import Retrainer, Retraining

SETTINGS = "settings.json"


def retrainer(options: ValidateOptions, data: Path, images: Path | None, out: Path) -> Retrainer:
    """What trains on parts of `data` in `out`, where the settings are kept.

    Raises:
        ValueError: `out` holds trainings with other settings.
    """
    start = {name: getattr(options, name) for name in ("model", "vision_tower", "mm_projector")}
    settings: dict[str, Any] = {one.name: getattr(options, one.name) for one in fields(LearningOptions)}
    content = {
        "data": open_records(data).fingerprint,
        "model": ModelFolder.open(**start).fingerprint(),
        "tasks": {name: open_records(file).fingerprint for name, (file, _) in files_of(options.task).items()},
    }
    claim(out / SETTINGS, settings | content, "trainings")
    fixed = {"images": images, "task": options.task, "trainer": options.trainer, "min_rows": 1, "max_failed": 1.0}
    return Retrainer(data, out, start | settings | options.reading | fixed, retrain)


def share_of(trainings: Sequence[Retraining], shard: str | None) -> list[Retraining]:
    """Those of an array job; without one, all."""
    index, count = (0, 1) if shard is None else parse_shard(shard)
    return [trainings[number] for number in assign(range(len(trainings)), count, index)]


def left_to_others(count: int) -> int:
    """Says that other processes are still training; the exit status."""
    said = f"{counted(count, 'model')} {'is' if count == 1 else 'are'} still being trained by other processes"
    tell(f"{said}; run the same line again when they are done, for the table")
    return RESUME
