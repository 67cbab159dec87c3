"""Losses, representations and image ablation against plain forward passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from icons.batch import model_inputs, sample_losses
from icons.gradients.features import losses, represented, with_noise_images
from icons.gradients.output_layer import SupervisedPositions


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (3, 10), generator=generator)
    mask = torch.arange(10) < torch.tensor([10, 6, 8])[:, None]
    labels = ids.masked_fill(~mask, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels, "row": torch.arange(3)}


def test_losses_are_those_of_whole_logits() -> None:
    network, data = model(), batch()
    with torch.no_grad():
        expected = sample_losses(network(**model_inputs(data)).logits, data["labels"])
    torch.testing.assert_close(losses(network, data), expected)
    assert losses(network, {name: value[:0] for name, value in data.items()}).shape == (0,)


@pytest.mark.parametrize("trained", [True, False])
def test_only_supervised_positions_reach_an_output_layer_that_is_not_trained(trained: bool) -> None:
    network, data = model(), batch()
    network.lm_head.weight.requires_grad_(trained)
    positions = SupervisedPositions(network, data["labels"])
    with positions.narrowed():
        logits = network(**model_inputs(data)).logits
    assert logits.shape[:2] == ((3, 10) if trained else (1, 6 + 2 + 4))
    torch.testing.assert_close(
        positions.losses(logits), sample_losses(network(**model_inputs(data)).logits, data["labels"])
    )


def test_a_representation_is_the_last_tokens_hidden_state() -> None:
    network, data = model(), batch()
    with torch.no_grad():
        hidden = network(**model_inputs(data), output_hidden_states=True).hidden_states[-1]
    expected = torch.stack([hidden[0, 9], hidden[1, 5], hidden[2, 7]])
    torch.testing.assert_close(represented(network, data)[0], expected)
    assert represented(network, {name: value[:0] for name, value in data.items()})[0].shape == (0, 16)


def test_a_model_without_output_layer_has_no_representation() -> None:
    with pytest.raises(ValueError, match=r"Linear has no output layer.*expected a causal or image-text model"):
        represented(nn.Linear(2, 2), batch())


class Wavering(LlamaForCausalLM):
    """In eval mode too it draws random numbers, and without any module for it."""

    def forward(self, *args: Any, **options: Any) -> Any:
        found = super().forward(*args, **options)
        found.logits = found.logits * (1 + 0.1 * torch.rand(()))
        return found


@pytest.mark.parametrize("measure", [losses, represented])
def test_chance_is_refused(measure: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"Wavering drew random numbers .*expected a pass without: call model.eval"):
        measure(Wavering(model().config).eval(), batch())


def test_noise_is_the_same_image_whatever_the_batch() -> None:
    data = batch() | {"pixel_values": torch.zeros(3, 3, 4, 4)}
    found = with_noise_images(data, seed=5)
    assert torch.equal(
        found["pixel_values"][2:], with_noise_images({"pixel_values": torch.ones(1, 3, 4, 4)}, 5)["pixel_values"]
    )
    assert torch.equal(found["labels"], data["labels"])
    assert "pixel_values" not in with_noise_images(batch())
