"""Where a command's model comes from: a warm-up folder (`--checkpoint`), or its parts named one by one."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import nn

from icons.cli.options.groups import CheckpointOptions, PreprocessingOptions
from icons.datamodules.preprocessing import Preprocessing
from icons.models.adam_state import load_adam_state
from icons.models.folder import ModelFolder
from icons.models.loading import load_model
from icons.models.warmup_folder import open_warmup
from icons.modules.warmup import hardly_moved
from icons.preconditioner import Preconditioner, Sign


@dataclass(frozen=True)
class ModelSource:
    """A model before it is loaded, with the preprocessing it was trained with and Adam's moments."""

    folder: ModelFolder
    adapter: Path | None
    preprocessing: Preprocessing
    optimizer_state: Path | None
    warning: str | None = None

    @classmethod
    def resolve(
        cls,
        parts: CheckpointOptions,
        optimizer_state: Path | None = None,
        preparing: PreprocessingOptions | None = None,
    ) -> "ModelSource":
        """Checks that either `checkpoint` or `model` is given, and fills in what the checkpoint knows.

        Args:
            parts: the checkpoint, or the parts.
            optimizer_state: Adam's moments, if not the checkpoint's.
            preparing: what the user asked for; None, and the template "auto", mean: as the warm-up did, or the default.

        Raises:
            ValueError: neither or both are given, or the preprocessing differs from the warm-up's.
        """
        names = [] if preparing is None else [field.name for field in fields(PreprocessingOptions)]
        asked = {name: value for name in names if (value := getattr(preparing, name)) not in (None, "auto", {})}
        checkpoint, model = parts.checkpoint, parts.model
        named = {name: getattr(parts, name) for name in ("vision_tower", "mm_projector", "adapter")}
        if (checkpoint is None) == (model is None):
            got = "neither" if model is None else "both"
            raise ValueError(f"model: got {got} of --checkpoint and --model; give one: a warm-up folder, or the parts")
        if checkpoint is None:
            assert model is not None
            return cls(ModelFolder.open(model, **named), parts.adapter, Preprocessing(**asked), optimizer_state)
        for name, value in named.items():
            if value is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} {value}: the warm-up folder {checkpoint} names its own; leave the "
                    "option out"
                )
        warmup = open_warmup(checkpoint)
        trained = Preprocessing.from_dict(warmup.facts.preprocessing)
        for name, value in asked.items():
            if getattr(trained, name) != value:
                raise ValueError(
                    f"--{name.replace('_', '-')} {value}: the warm-up in {checkpoint} used {getattr(trained, name)!r}, "
                    "and gradients of differently prepared text do not compare; leave the option out"
                )
        warning = hardly_moved(warmup.facts.losses.before, warmup.facts.losses.after)
        return cls(warmup.model_folder, warmup.adapter, trained, optimizer_state or checkpoint, warning)

    def load(self, **options: Any) -> nn.Module:
        """The model with its adapter, on the CPU, in eval mode; options as for `load_model`."""
        return load_model(self.folder, adapter=self.adapter, **options)

    def preconditioner(
        self, form: Literal["adam", "diagonal", "sign", "none"], model: nn.Module
    ) -> Preconditioner | None:
        """Adam's state for the forms that need one.

        Raises:
            ValueError: `adam` or `diagonal` is asked for and there is no optimizer state.
        """
        if form == "none":
            return None
        if form == "sign":
            return Sign()
        if self.optimizer_state is None:
            raise ValueError(
                f"--preconditioner {form} needs Adam's moments: got no --optimizer-state; name a warm-up folder, a "
                "Lightning checkpoint, an optimizer.pt or a DeepSpeed folder, or use --preconditioner none"
            )
        return load_adam_state(self.optimizer_state, model, form=form)
