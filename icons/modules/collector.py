"""What `icons gradients` collects in a gradient's place: representations, losses, and gradients without the image."""

from typing import Any

from torch import nn

from icons.batch import Batch, supervised_tokens
from icons.choices import Collect
from icons.gradients.features import losses, represented, width_of, with_noise_images
from icons.modules.extractor import GradientExtractor
from icons.modules.sample_module import Fields, SampleModule
from icons.preconditioner import Preconditioner
from icons.projection import Projector

DIFFERENTIATED = ("gradients", "image_ablation")
"""What takes a backward pass, a preconditioner and a projection."""


def collector(
    collect: Collect, model: nn.Module, projector: Projector, preconditioner: Preconditioner | None = None
) -> SampleModule:
    """The module that measures `collect`.

    Args:
        collect: `gradients`; `representations`, the last token's hidden state; `loss`; or `image_ablation`, gradients
            with noise in place of the images. The original calls them `grads`, `reps`, `loss` and `delta`.
        model: any Hugging Face causal or image-text model.
        projector: of gradients; its seed is the noise's too.
        preconditioner: of gradients.
    """
    if collect == "representations":
        return _RepresentationCollector(model)
    if collect == "loss":
        return _LossCollector(model)
    kind = _AblationCollector if collect == "image_ablation" else GradientExtractor
    return kind(model, projector, preconditioner)


class _RepresentationCollector(SampleModule):
    """The hidden state from which the output layer would predict what follows the sample, whole: `[B, width]`.

    Source: representation-based selection, the baseline of LESS (section 5.1).
    """

    def compute(self, batch: Batch) -> Fields:
        """`gradient [B, width]` is the representation, `norm` its length; no backward pass."""
        states, loss = represented(self.model, batch)
        tokens = supervised_tokens(batch["labels"]).int()
        return {"gradient": states, "norm": states.norm(dim=1), "loss": loss.float(), "tokens": tokens}

    def describe(self) -> dict[str, Any]:
        return super().describe() | _undifferentiated(width_of(self.model)) | {"collect": "representations"}


class _LossCollector(SampleModule):
    """The loss alone: `[B, 1]`, since a store's rows are vectors. Nothing takes such rows for gradients: their manifest
    says `collect: loss`, and scores of them are refused.
    """

    def compute(self, batch: Batch) -> Fields:
        """`gradient [B, 1]` is the loss; no backward pass."""
        loss = losses(self.model, batch).float()
        tokens = supervised_tokens(batch["labels"]).int()
        return {"gradient": loss[:, None], "norm": loss.abs(), "loss": loss, "tokens": tokens}

    def describe(self) -> dict[str, Any]:
        return super().describe() | _undifferentiated(1) | {"collect": "loss"}


def _undifferentiated(dim: int) -> dict[str, Any]:
    """What the manifest says of numbers that are stored as they are."""
    return {"projector": {"kind": "identity", "dim": dim, "seed": 0}, "preconditioner": {"form": "none"}}


class _AblationCollector(GradientExtractor):
    """Gradients of the batch with every image replaced by noise: what a sample teaches without its image.

    A sample without image has its plain gradient.
    """

    def compute(self, batch: Batch) -> Fields:
        return super().compute(with_noise_images(batch, self.projector.seed))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"collect": "image_ablation"}
