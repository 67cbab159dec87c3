"""WarmupModule: fine-tuning as LLaVA does it, for the warm-up on a small share and for the final fine-tune alike."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from icons.agreement import IMAGE_FILES, check_image_files, check_tasks, differences
from icons.batch import IGNORE_INDEX, Batch, model_inputs, sample_losses, supervised_tokens
from icons.models.warmup_folder import Trained
from icons.modules.moments import gather
from icons.modules.sharded_fit import ShardedFit

_PROJECTOR_NAMES = ("multi_modal_projector", "mm_projector")
_LEAST_FALL = 0.05


class WarmupModule(ShardedFit):
    """Trains a model's trainable parameters with `Trainer.fit`, and measures each task before and after.

    The loss is the mean over the batch's supervised tokens, as Hugging Face's Trainer and LLaVA have it (the loss whose
    *gradient* is compared later is the mean per sample). AdamW; cosine schedule after a linear warm-up; the projector
    has a learning rate of its own. Tasks are measured by Lightning's sanity check (before, with
    `Trainer(num_sanity_val_steps=-1)`) and once more when training ends.

    Args:
        model: parameters with `requires_grad` are trained; any Hugging Face causal or image-text model.
        learning_rate: of everything but the projector; LLaVA's for LoRA is 2e-4.
        projector_learning_rate: of the projector between vision tower and language model; LLaVA's is 2e-5.
        warmup_ratio: share of the steps in which the learning rate rises from 0.
        weight_decay: on matrices only (biases and norms never decay); LLaVA's is 0.
        betas: Adam's.
        eps: Adam's.
        tasks: names of the validation data loaders, in their order.
        settings: what a resumed fit must agree on; saved in every checkpoint, compared when one is loaded.
        image_files: marks of images (`icons.datamodules.image_marks`), saved and compared likewise.
        task_files: what the tasks are read from (`ConversationDataModule.describe_tasks`), saved and compared likewise:
            before and after are to be measured on the same.

    Attributes:
        before: task -> {"loss", "accuracy", "rows"} before training; empty until measured.
        after: the same, after training.
        outcome: trained weights and Adam's moments by name, on rank 0, after training.

    Source: haotian-liu/LLaVA, scripts/v1_5/finetune_lora.sh and llava/train/llava_trainer.py.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float = 2e-4,
        projector_learning_rate: float = 2e-5,
        warmup_ratio: float = 0.03,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        tasks: Sequence[str] = ("held-out",),
        settings: Mapping[str, Any] | None = None,
        image_files: Mapping[str, Any] | None = None,
        task_files: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.train()  # Lightning leaves modes as they are, and dropout belongs to training
        self.learning_rate = learning_rate
        self.projector_learning_rate = projector_learning_rate
        self.warmup_ratio = warmup_ratio
        self.weight_decay = weight_decay
        self.betas = betas
        self.eps = eps
        self.tasks = list(tasks)
        self.settings, self.image_files = dict(settings or {}), dict(image_files or {})
        self.task_files = dict(task_files or {})
        self.before: dict[str, dict[str, float]] = {}
        self.after: dict[str, dict[str, float]] = {}
        self.outcome: Trained | None = None
        self.sums: list[Tensor] = []
        self.strict_loading = False  # checkpoints hold the trained parameters only

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy over the batch's supervised tokens, float32; 0 when no row of it could be read."""
        if not len(batch["row"]):  # a loss all the same: the other ranks wait for this one's gradients
            zeros = [parameter.sum() * 0.0 for parameter in self.trained().values()]
            return torch.stack(zeros).sum()
        loss = token_mean_loss(self.model(**model_inputs(batch), use_cache=False).logits, batch["labels"])
        self.log("loss", loss.detach(), prog_bar=True, batch_size=len(batch["row"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.sums = [torch.zeros(3, device=self.device) for _ in self.tasks]

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds the batch's losses, exact matches and rows to its task's sums."""
        if not len(batch["row"]):
            return
        logits, labels = self.model(**model_inputs(batch), use_cache=False).logits, batch["labels"]
        answered = supervised_tokens(labels) > 0
        losses, matches = sample_losses(logits, labels)[answered], exact_matches(logits, labels)[answered]
        self.sums[dataloader_idx] += torch.stack([losses.sum(), matches.sum(), answered.sum()]).float()

    def on_validation_epoch_end(self) -> None:
        """Turns the sums of all ranks into means.

        Raises:
            ValueError: a task has no row that can be used.
        """
        self.meet()
        measured: dict[str, dict[str, float]] = {}
        for task, sums in zip(self.tasks, self.sums, strict=True):
            loss, matches, rows = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
            if not rows:
                raise ValueError(
                    f"task {task}: none of its rows can be used; expected one at least: `icons inspect` says why"
                )
            measured[task] = {"loss": loss / rows, "accuracy": matches / rows, "rows": int(rows)}
        if self.trainer.sanity_checking:
            self.before = measured
            if self.trainer.logger is not None:  # Lightning logs nothing of the sanity check
                self.trainer.logger.log_metrics(_logged(measured), step=0)
        else:
            self.after = measured
            self.log_dict(_logged(measured))

    def on_train_end(self) -> None:
        """Measures the tasks once more, wherever training ended (epochs, `max_steps`, `max_time`), and collects."""
        if self.tasks:
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True
        self.outcome = gather(self.trainer, self)

    def configure_optimizers(self) -> Any:
        """AdamW over named parameters, so that its moments are known by name in every checkpoint."""
        groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.trained().items():
            projector = any(part in name for part in _PROJECTOR_NAMES)
            rate = self.projector_learning_rate if projector else self.learning_rate
            decay = self.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append((name, parameter))
        optimizer = torch.optim.AdamW(
            [{"params": named, "lr": rate, "weight_decay": decay} for (rate, decay), named in groups.items()],
            betas=self.betas,
            eps=self.eps,
        )
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, total, self.warmup_ratio))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | int | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As the Trainer's flags say; under FSDP through its root module, which knows the norm of all shards."""
        if isinstance(self.trainer.strategy, FSDPStrategy) and gradient_clip_val and gradient_clip_algorithm != "value":
            self.trainer.strategy.model.clip_grad_norm_(float(gradient_clip_val))  # type: ignore[union-attr,operator]
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters with `requires_grad`, by their name in the model."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the trained parameters only (a 7B base model would be 14 GB a time), with settings and measurements."""
        trained = {f"model.{name}" for name in self.trained()}
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in trained}
        files = {IMAGE_FILES: self.image_files, "tasks": self.task_files}
        checkpoint["warmup"] = {"settings": self.settings, **files, "before": self.before}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with a fit of other settings, images or tasks.

        Raises:
            ValueError: a setting differs; names it with both values. Or an image file has been replaced, or a task's
                data.
        """
        saved = checkpoint["warmup"]["settings"]
        for name, then, now in differences(saved, self.settings, sorted({*saved, *self.settings})):
            raise ValueError(
                f"{name}: the interrupted fit had {then!r}, now it is {now!r}; a fit resumes with the settings it "
                "began with: give the same, or start again with --resume false"
            )
        marks, remedy = {IMAGE_FILES: self.image_files}, "start again with --resume false"
        check_image_files(checkpoint["warmup"], marks, "the interrupted fit", remedy=remedy)
        check_tasks(checkpoint["warmup"].get("tasks", {}), self.task_files, "the interrupted fit", remedy)
        self.before = checkpoint["warmup"]["before"]


def _logged(measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Measurements as loggers and `EarlyStopping(monitor=...)` know them.

    >>> _logged({"gqa": {"loss": 1.5, "accuracy": 0.25, "rows": 8}})
    {'loss/gqa': 1.5, 'accuracy/gqa': 0.25}
    """
    return {f"{name}/{task}": float(result[name]) for task, result in measured.items() for name in ("loss", "accuracy")}


def token_mean_loss(
    logits: Float[Tensor, "batch length vocab"], labels: Int[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy over all supervised tokens of the batch (0 when there are none).

    Equal to the loss that Hugging Face models return; written as the samples' losses weighted by their tokens.
    """
    tokens = supervised_tokens(labels)
    return (sample_losses(logits, labels) * tokens).sum() / tokens.sum().clamp(min=1)


def exact_matches(
    logits: Float[Tensor, "batch length vocab"], labels: Int[Tensor, "batch length"]
) -> Int[Tensor, " batch"]:
    """1 where every supervised token is the most likely one given the tokens before it, else 0.

    This is what greedy decoding would answer, end of sequence included. A sample without supervised tokens gives 1:
    callers leave it out.

    >>> logits = torch.tensor([[[0.0, 1.0], [5.0, 2.0], [0.0, 0.0]]])
    >>> exact_matches(logits, torch.tensor([[-100, 1, 0]])), exact_matches(logits, torch.tensor([[-100, 1, 1]]))
    (tensor([1]), tensor([0]))
    """
    targets = labels[:, 1:]
    wrong = (logits[:, :-1].argmax(dim=-1) != targets) & (targets != IGNORE_INDEX)
    return (~wrong.any(dim=1)).long()


def cosine(step: int, total: int, warmup_ratio: float) -> float:
    """Factor on the learning rate: linear from 0 over the first `ceil(total * warmup_ratio)` steps, then a cosine to 0.

    Source: transformers' get_cosine_schedule_with_warmup; LLaVA's `--warmup_ratio 0.03 --lr_scheduler_type cosine`.

    >>> [round(cosine(step, 10, 0.1), 3) for step in (0, 1, 5, 9, 10)]
    [0.0, 1.0, 0.587, 0.03, 0.0]
    """
    rising = math.ceil(total * warmup_ratio)
    if step < rising:
        return step / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, total - rising))))


def hardly_moved(before: Mapping[str, float], after: Mapping[str, float]) -> str | None:
    """A warning when a warm-up has learned next to nothing, or None.

    Rule: the fall of the loss relative to the loss before, averaged over the tasks known on both sides, is below 5 %
    (or is not a number). Gradients of a model that has not begun to learn say little about what the data will teach
    it, and a selection made from them can be worse than a random one.

    Args:
        before: task -> mean loss before training.
        after: task -> mean loss after training.

    >>> hardly_moved({"gqa": 2.0, "pope": 1.0}, {"gqa": 1.2, "pope": 0.9}) is None
    True
    >>> print(hardly_moved({"gqa": 2.0}, {"gqa": 1.96}))
    the warm-up has hardly learned: the loss fell by 2.0 % (gqa 2 -> 1.96), expected 5 % or more; influence from here \
misleads: train longer (--epochs), on more (--fraction), or with a higher --learning-rate
    """
    tasks = [task for task in before if task in after]
    if not tasks:
        return None
    fall = sum((before[task] - after[task]) / max(before[task], 1e-12) for task in tasks) / len(tasks)
    if fall >= _LEAST_FALL:
        return None
    losses = ", ".join(f"{task} {before[task]:.4g} -> {after[task]:.4g}" for task in tasks)
    moved = f"fell by {100 * fall:.1f} %" if fall >= 0 else f"rose by {-100 * fall:.1f} %" if fall < 0 else "is NaN"
    return (
        f"the warm-up has hardly learned: the loss {moved} ({losses}), expected {100 * _LEAST_FALL:.0f} % or more; "
        "influence from here misleads: train longer (--epochs), on more (--fraction), or with a higher --learning-rate"
    )
