"""The batch contract: the loss of a sample does not depend on its batch or its padding."""

import pytest
import torch
from torch.nn import functional as F

from icons.batch import IGNORE_INDEX, model_inputs, sample_losses, supervised_tokens


def random_batch(lengths: list[int], padded: int, vocabulary: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(lengths), padded, vocabulary, generator=generator)
    labels = torch.randint(0, vocabulary, (len(lengths), padded), generator=generator)
    for sample, length in enumerate(lengths):
        labels[sample, length:] = IGNORE_INDEX
        labels[sample, :2] = IGNORE_INDEX
    return logits, labels


def test_loss_of_a_sample_is_its_own_token_mean() -> None:
    logits, labels = random_batch([9, 5, 7], 12)
    for sample in range(3):
        alone = F.cross_entropy(logits[sample, :-1], labels[sample, 1:], ignore_index=IGNORE_INDEX)
        torch.testing.assert_close(sample_losses(logits, labels)[sample], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_loss_is_float32_or_wider(dtype: torch.dtype) -> None:
    logits, labels = random_batch([9, 5], 12)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert sample_losses(logits.to(dtype), labels).dtype == expected


def test_a_sample_without_supervised_tokens_has_loss_zero_and_no_gradient() -> None:
    logits, labels = random_batch([9, 5], 12)
    labels[1] = IGNORE_INDEX
    logits.requires_grad_()
    losses = sample_losses(logits, labels)
    losses.sum().backward()
    assert losses[1] == 0
    assert logits.grad is not None
    assert logits.grad[1].abs().max() == 0
    assert logits.grad.isfinite().all()
    assert supervised_tokens(labels).tolist() == [7, 0]


def test_the_first_position_is_never_predicted() -> None:
    labels = torch.tensor([[3, 4], [3, IGNORE_INDEX]])
    assert supervised_tokens(labels).tolist() == [1, 0]


def test_an_empty_batch_has_no_losses() -> None:
    assert sample_losses(torch.zeros(0, 4, 7), torch.zeros(0, 4, dtype=torch.int64)).shape == (0,)


def test_only_the_models_own_fields_reach_it() -> None:
    batch = {"input_ids": 1, "labels": 2, "row": 3, "failed_row": 4, "failed_status": 5, "pixel_values": 6}
    assert model_inputs(batch) == {"input_ids": 1, "pixel_values": 6}
