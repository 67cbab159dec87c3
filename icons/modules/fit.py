"""A fit from its settings to its folder: resuming, `Trainer.fit`, what is written down, what is said."""

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, RichProgressBar
from lightning.pytorch.utilities import rank_zero_only

from icons.agreement import IMAGE_FILES, check_image_files, check_tasks
from icons.choices import ModelDtype
from icons.models.tensor_files import load_data
from icons.models.warmup_folder import MANIFEST
from icons.modules.fit_checkpoint import BEFORE, LAST, NEW, FitCheckpoint, Interrupted, checkpoint_of
from icons.modules.fit_lock import SameStart
from icons.modules.named_strategy import named_strategy
from icons.modules.progress import FitProgress
from icons.modules.warmup import WarmupModule
from icons.output import remove

_PRECISION = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
TRAINER: dict[str, Any] = {
    "gradient_clip_val": 1.0,  # as in LLaVA: Hugging Face's default
    "num_sanity_val_steps": -1,  # measures all tasks before training
    "check_val_every_n_epoch": 1_000_000,  # WarmupModule measures when training ends; in between nobody looks
    "use_distributed_sampler": False,  # the datamodule's batches are each rank's own
    "logger": False,
    "enable_checkpointing": False,  # FitCheckpoint does it
    "enable_model_summary": False,
}
log = logging.getLogger(__name__)


@rank_zero_only
def say(text: str) -> None:
    """Logs on one rank of many."""
    log.info(text)


def resolved_dtype(dtype: ModelDtype) -> Literal["float32", "bfloat16", "float16"]:
    """`auto` is bfloat16 on a GPU, and float32 on a CPU, where half precision is slower and not tested as well."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if torch.cuda.is_available() else "float32"


def ranks_of(trainer: Mapping[str, Any] | None) -> int:
    """Processes that Trainer flags ask for: devices x nodes, `auto` and -1 counted on this machine."""
    flags = trainer or {}
    devices = flags.get("devices", "auto")
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        count = len(devices)
    elif str(devices) in ("auto", "-1"):
        count = torch.cuda.device_count() if flags.get("accelerator", "auto") in ("auto", "gpu", "cuda") else 1
    else:
        count = len(str(devices).split(",")) if "," in str(devices) else int(devices)
    return max(1, count) * int(flags.get("num_nodes", 1))


def trainer_flags(given: Mapping[str, Any], epochs: int, accumulate: int, dtype: str) -> dict[str, Any]:
    """Lightning's flags for a fit; what the user gives wins, but for what other options say.

    Several processes run under DDP that looks for unused parameters: a batch without images leaves the projector so.

    Raises:
        ValueError: a flag contradicts an option, or a strategy cannot divide the ranks.
    """
    owned = {"max_epochs": "--epochs", "accumulate_grad_batches": "--accumulate", "precision": "--dtype"}
    for flag, option in owned.items():
        if flag in given:
            raise ValueError(f"--trainer.{flag} {given[flag]}: use {option} in its place")
    fixed = {"use_distributed_sampler": False, "num_sanity_val_steps": -1}
    for flag, value in fixed.items():
        if given.get(flag, value) != value:
            raise ValueError(f"--trainer.{flag} {given[flag]}: expected {value}, or the option left out")
    flags = TRAINER | {"max_epochs": epochs, "accumulate_grad_batches": accumulate, "precision": _PRECISION[dtype]}
    flags |= given
    flags["callbacks"] = _as_list(given.get("callbacks"))
    if any(isinstance(callback, Checkpoint) for callback in flags["callbacks"]):
        flags["enable_checkpointing"] = given.get("enable_checkpointing", True)
    if flags["logger"]:
        flags["log_every_n_steps"] = given.get("log_every_n_steps", 1)  # warm-ups are short: from the first step on
    if "val_check_interval" in given and "check_val_every_n_epoch" not in given:
        # a number of batches counts through all epochs, a share of an epoch within each
        flags["check_val_every_n_epoch"] = None if isinstance(given["val_check_interval"], int) else 1
    if ranks_of(given) > 1 and flags.get("strategy", "auto") in ("auto", "ddp"):
        flags["strategy"] = "ddp_find_unused_parameters_true"
    return named_strategy(flags, ranks_of(flags))


def _as_list(given: Any) -> list[Any]:
    """One callback or several, as the command line and YAML give them."""
    return list(given) if isinstance(given, Sequence) else [] if given is None else [given]


def already_done(
    out: Path, settings: Mapping[str, Any], image_files: Mapping[str, Any], task_files: Mapping[str, Any]
) -> bool:
    """Whether `out` holds the finished fit of these very settings, images and tasks.

    Raises:
        ValueError: it holds a finished fit of other settings; names the first with both values. Or an image file has
            been replaced, or a task's data.
    """
    if not (out / MANIFEST).is_file():
        return False
    manifest, remedy = json.loads((out / MANIFEST).read_text()), "give another folder, or --resume false to replace it"
    kept = manifest.get("settings", {})
    for name, value in json.loads(json.dumps(dict(settings))).items():
        if kept.get(name) != value:
            raise ValueError(
                f"--out {out}: holds a finished fit with {name} {kept.get(name)!r}, now it is {value!r}; {remedy}"
            )
    check_image_files(manifest, {IMAGE_FILES: image_files}, f"the fit in {out}", remedy=remedy)
    check_tasks(manifest.get("tasks", {}), task_files, f"the fit in {out}", remedy)
    return True


def run_fit(
    module: WarmupModule,
    datamodule: LightningDataModule,
    flags: Mapping[str, Any],
    out: Path,
    *,
    minutes: float,
    seed: int,
    resume: bool,
    refused: ValueError | None = None,
) -> Trainer | int:
    """Trains, from `out/last.ckpt` if that is there and `resume`.

    Args:
        module, datamodule, flags, out, minutes, seed, resume: of the fit.
        refused: why rank 0 may not begin; raised on every rank.

    Returns:
        The Trainer when training has ended; the exit status when it was interrupted and saved.
    """
    if not resume and refused is None:
        clear(out)
    last = checkpoint_of(out, say, check_resumable) if resume and refused is None else None
    if last is not None:
        say(f"going on with the interrupted fit in {last}")
    callbacks = [SameStart(refused, last), FitCheckpoint(out, minutes, seed), *_as_list(flags.get("callbacks"))]
    if flags.get("enable_progress_bar", True):
        in_terminal = sys.stdout.isatty()
        callbacks.append(RichProgressBar() if in_terminal else FitProgress())
        flags = {**flags, "enable_progress_bar": in_terminal}  # else Lightning adds a bar of its own
    if flags.get("logger"):
        callbacks.append(LearningRateMonitor("step"))
    with quiet():
        runner = Trainer(**{**flags, "default_root_dir": flags.get("default_root_dir", out), "callbacks": callbacks})
        for logger in runner.loggers:
            logger.log_hyperparams(module.settings)
        try:
            runner.fit(module, datamodule=datamodule, ckpt_path=last)
        except Interrupted as stop:
            say(f"{stop}; run the same line again to go on")
            return stop.status
    return runner


def check_resumable(last: Path) -> None:
    """Refuses a checkpoint that cannot be read as data alone, before Lightning reads it.

    Raises:
        ValueError: it is broken, or holds more than data.
    """
    if last.is_file():  # a folder is DeepSpeed's or FSDP's, which reads it
        load_data(last, "the checkpoint of a fit", "restore it, or start again with --resume false")


@rank_zero_only
def clear(out: Path) -> None:
    """Takes away what a former fit has left, so that nothing of it can be mistaken for the new one's."""
    (out / MANIFEST).unlink(missing_ok=True)
    for name in (LAST, BEFORE, NEW):
        remove(out / name)
    for left in out.glob("hpc_ckpt_*.ckpt"):  # by Lightning, which would resume from them before all others
        remove(left)


def losses_of(module: WarmupModule) -> dict[str, Any]:
    """The manifest's part: loss and exact matches of each task, before and after."""
    sides = {"before": module.before, "after": module.after}
    return {
        "losses": {side: {task: result["loss"] for task, result in tasks.items()} for side, tasks in sides.items()},
        "accuracy": {
            side: {task: result["accuracy"] for task, result in tasks.items()} for side, tasks in sides.items()
        },
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's advertising, and without the warnings that nobody can act on; all of them where this
    package's own log is asked for every detail."""
    if logging.getLogger("icons").isEnabledFor(logging.DEBUG):
        yield
        return
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers")
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.", category=FutureWarning)
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # no tasks
            warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
            warnings.filterwarnings("ignore", message="predict returned None")  # sums are kept by the module
            yield
    finally:
        logger.setLevel(level)
