"""GradientExtractor: the predict step that turns batches of conversations into rows of the gradient store."""

from typing import Any

from torch import nn

from icons.batch import Batch
from icons.gradients import projected_gradients
from icons.modules.sample_module import Fields, SampleModule
from icons.preconditioner import Preconditioner, described
from icons.projection import Projector


class GradientExtractor(SampleModule):
    """Projected per-sample gradients of a model's trainable parameters, through `Trainer.predict`.

    Use `Trainer(inference_mode=False, use_distributed_sampler=False)` and `return_predictions=False`, with a
    `GradientWriter` among the callbacks. The model is put into eval mode: dropout would make a row depend on chance.

    Args:
        model: any Hugging Face causal or image-text model; the parameters with `requires_grad` are differentiated.
        projector: maps the gradient to K numbers; the same map for training and validation rows.
        preconditioner: turns the gradient into an optimizer's step (training side); None leaves it as it is
            (validation side).

    Source: arXiv 2501.00654, section 3 (stage 1); LESS, arXiv 2402.04333, section 3.2.
    """

    def __init__(self, model: nn.Module, projector: Projector, preconditioner: Preconditioner | None = None) -> None:
        super().__init__(model)
        self.projector = projector
        self.preconditioner = preconditioner

    def compute(self, batch: Batch) -> Fields:
        """`gradient [B, K]` float32, `norm [B]` and `loss [B]` float32, `tokens [B]` int32."""
        rows = projected_gradients(self.model, batch, self.projector, self.preconditioner)
        return {"gradient": rows.gradient, "norm": rows.norm, "loss": rows.loss, "tokens": rows.tokens.int()}

    def describe(self) -> dict[str, Any]:
        """This extractor's part of the manifest: what must agree for two stores to be combined."""
        parts = {"projector": self.projector.describe(), "preconditioner": described(self.preconditioner)}
        return super().describe() | parts
