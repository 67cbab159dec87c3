"""What else can be collected of a sample: its representation, its loss alone, its batch with noise for images.

In the original's options (`info_type`): `reps` (here `represented`), `loss` (`losses`), and `delta`, the gradient
with the image ablated (`projected_gradients` of `with_noise_images(batch)`); `grads` is `projected_gradients`, whose
`gradient_type` `adam`, `sgd` and `sign` are `adam`, none and `sign` here.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icons.batch import Batch
from icons.gradients.chance import refuse_dropout, without_chance
from icons.gradients.output_layer import SupervisedPositions, output_layer
from icons.gradients.packing import keep_unpacked


def losses(model: nn.Module, batch: Batch) -> Float[Tensor, " batch"]:
    """The samples' losses, as `projected_gradients` gives them, without a backward pass.

    Raises:
        ValueError: the model drops out, or draws random numbers in whatever way.
    """
    refuse_dropout(model, [module for module in model.modules() if module.training])
    keep_unpacked(model)
    if len(batch["labels"]) == 0:
        return torch.zeros(0, device=batch["labels"].device, dtype=torch.float32)
    with torch.no_grad(), without_chance(model):
        return SupervisedPositions(model, batch["labels"]).run(model, batch)


def represented(model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "batch width"], Float[Tensor, " batch"]]:
    """The last token's hidden state that the output layer reads (`reps` in LESS and in the original), and the samples'
    losses, float32, from one forward pass.

    The original takes the first token's, which under causal attention has seen nothing of the sample.

    Raises:
        ValueError: the model drops out, draws random numbers in whatever way, or does not tell its output layer.
    """
    width = width_of(model)
    refuse_dropout(model, [module for module in model.modules() if module.training])
    if len(batch["labels"]) == 0:
        device = batch["labels"].device
        return torch.zeros(0, width, device=device, dtype=torch.float32), torch.zeros(
            0, device=device, dtype=torch.float32
        )
    seen: list[Tensor] = []

    def remember(_module: nn.Module, args: tuple[Any, ...]) -> None:
        last = batch["attention_mask"].sum(dim=1) - 1
        seen.append(args[0][torch.arange(len(last), device=last.device), last])

    head = output_layer(model, trained=True)
    assert head is not None
    handle = head.register_forward_pre_hook(remember)  # before the output layer's input is narrowed
    try:
        each = losses(model, batch)
    finally:
        handle.remove()
    return seen[0].float(), each


def width_of(model: nn.Module) -> int:
    """Numbers of a representation.

    Raises:
        ValueError: the model does not tell its output layer.
    """
    head = output_layer(model, trained=True)
    if head is None:
        raise ValueError(
            f"representations: {type(model).__name__} has no output layer that get_output_embeddings() gives; "
            "expected a causal or image-text model of transformers"
        )
    return int(next(head.parameters()).shape[-1])


def with_noise_images(batch: Batch, seed: int = 0) -> dict[str, Any]:
    """The batch with every image replaced by one image of standard normal noise.

    The noise depends on the seed and the image's shape alone, so that a row depends on no other row. Batches without
    images come back as they are.

    >>> batch = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    >>> noise = with_noise_images(batch)["pixel_values"]
    >>> bool((noise[0] == noise[1]).all()), bool((noise == 0).any())
    (True, False)
    """
    pixels = batch.get("pixel_values")
    if pixels is None:
        return dict(batch)
    noise = torch.randn(pixels.shape[1:], generator=torch.Generator().manual_seed(seed))
    return dict(batch) | {"pixel_values": noise.to(pixels).expand_as(pixels)}
