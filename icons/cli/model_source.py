"""Where a command's model comes from: a warm-up folder (`--checkpoint`), or its parts named one by one."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from icons.choices import Preconditioning, Target
from icons.cli.options.groups import CheckpointOptions, DataOptions, PreprocessingOptions
from icons.datamodules.datamodule import ConversationDataModule
from icons.datamodules.preprocessing import Preprocessing
from icons.kronecker import KroneckerPreconditioner
from icons.models.adam_state import load_adam_state
from icons.models.folder import ModelFolder
from icons.models.loading import load_model
from icons.models.saved_factors import load_factors
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

    def datamodule(self, options: DataOptions, data: Path, images: Path | None, **other: Any) -> ConversationDataModule:
        """Batches of a data file for this model, prepared as it was trained; read and batched as the options say,
        `other` in their place."""
        names = {"batch_size", "max_tokens", "num_workers", "trust_remote_code"} & {one.name for one in fields(options)}
        settings = {name: getattr(options, name) for name in names} | options.reading | other
        return ConversationDataModule(
            data, images, model_folder=self.folder, preprocessing=self.preprocessing, **settings
        )

    def check_differentiable(self, target: Target, form: Preconditioning, trust_remote_code: bool) -> None:
        """What can be known before weights are read: that there is something to differentiate, and Adam's moments.

        Raises:
            ValueError: there is no adapter, though `target` means an adapter's parameters (a model whose own code is
                run may bring some), or `form` needs moments and none are named.
        """
        if self.adapter is None and target == "lora" and not trust_remote_code:
            raise ValueError(
                f"--model {self.folder.model}: got no --adapter, whose parameters --target lora differentiates; name "
                "one, or a warm-up folder as --checkpoint, or give --target trainable"
            )
        self._check_moments(form)

    def _check_moments(self, form: Preconditioning) -> None:
        if form in ("adam", "diagonal") and self.optimizer_state is None:
            raise ValueError(
                f"--preconditioner {form} needs Adam's moments: got no --optimizer-state; name a warm-up folder, a "
                "Lightning checkpoint, an optimizer.pt or a DeepSpeed folder, or use --preconditioner none"
            )

    def load(self, target: Target, differentiated: bool = True, **options: Any) -> nn.Module:
        """The model with its adapter, on the CPU, in eval mode; options as for `load_model`.

        Raises:
            ValueError: it is to be differentiated, and has no parameter that `target` means.
        """
        model = load_model(self.folder, adapter=self.adapter, target=target, **options)
        if differentiated and not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                f"--target {target}: {self.folder.model} has no such parameter; expected one at least: name an "
                "adapter, or a warm-up folder as --checkpoint"
            )
        return model

    def preconditioner(
        self,
        form: Preconditioning,
        model: nn.Module,
        factors: Path | None = None,
        damping: float | None = None,
        root: bool = False,
    ) -> Preconditioner | None:
        """Adam's state, or Kronecker factors, for the forms that need them.

        Args:
            form: of the preconditioner.
            model: that is differentiated.
            factors: the file of `kfac`, which must be given for it.
            damping: of `kfac`; None: its default.
            root: of `kfac`: see `KroneckerPreconditioner`.

        Raises:
            ValueError: `adam` or `diagonal` is asked for and there is no optimizer state, or the factors are none of
                this model's.
        """
        if form == "kfac":
            assert factors is not None
            given = {} if damping is None else {"damping": damping}
            return KroneckerPreconditioner(load_factors(factors, model), root=root, **given)
        if form == "none":
            return None
        if form == "sign":
            return Sign()
        self._check_moments(form)
        assert self.optimizer_state is not None
        return load_adam_state(self.optimizer_state, model, form=form)
