"""The merge of image features, and parity with the original LLaVA code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from icons.batch import model_inputs, sample_losses
from icons.gradients import per_sample_gradients
from icons.gradients.capture import SlowerPathWarning
from icons.models.folder import ModelFolder
from icons.models.llava import merge_images
from icons.models.loading import load_model
from icons.models.parameter_names import canonical_name

Batches = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("samples", [[0], [1], [2], [0, 1, 2], [2, 1, 1, 0]], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_losses_equal_the_originals(
    llava: ModelFolder,
    adapter: Path,
    expected: dict[str, Tensor],
    make_batch: Batches,
    samples: list[int],
    attention: Any,
) -> None:
    model, batch = load_model(llava, adapter=adapter, attention=attention), make_batch(samples)
    with torch.no_grad():
        losses = sample_losses(model(**model_inputs(batch), use_cache=False).logits, batch["labels"])
    wanted = torch.stack([expected[f"{sample}.loss"] for sample in samples])
    torch.testing.assert_close(losses.double(), wanted, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings(f"ignore::{SlowerPathWarning.__module__}.SlowerPathWarning")
@pytest.mark.parametrize("samples", [[0], [1], [2], [0, 1, 2]], ids=str)
def test_gradients_of_lora_and_projector_equal_the_originals(
    llava: ModelFolder, adapter: Path, expected: dict[str, Tensor], make_batch: Batches, samples: list[int]
) -> None:
    model = load_model(llava, adapter=adapter, target="trainable")
    gradients = per_sample_gradients(model, make_batch(samples))
    start = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        for i, sample in enumerate(samples):
            saved = {
                canonical_name(key.partition(".grad.")[2]): key for key in expected if key.startswith(f"{sample}.grad.")
            }
            wanted = expected[saved[canonical_name(name)]]
            got = gradients[i, start : start + parameter.numel()].view_as(parameter)
            assert (got - wanted).norm() <= 1e-6 * wanted.norm() + 1e-12, (name, sample)
        start += parameter.numel()
    assert (
        start
        == gradients.shape[1]
        == sum(value.numel() for key, value in expected.items() if key.startswith("0.grad."))
    )


def test_equals_transformers_own_merge_where_that_works(huggingface_llava: Path) -> None:
    """Its own merge: no negative ids, whole images only."""
    theirs = LlavaForConditionalGeneration.from_pretrained(huggingface_llava).eval()
    ours = load_model(ModelFolder.open(huggingface_llava))
    ids = torch.tensor([[1, 99, 99, 99, 99, 5, 6], [7, 8, 99, 99, 99, 99, 9], [3, 4, 5, 6, 0, 0, 0]])
    mask = (ids != 0).long()
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        got = ours(input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=False).logits
    torch.testing.assert_close(got, wanted, atol=0, rtol=0)


def test_an_image_cut_at_the_end_equals_the_whole_one_up_to_there(
    llava: ModelFolder, adapter: Path, make_batch: Batches
) -> None:
    model, batch = load_model(llava, adapter=adapter), make_batch([0])
    end = int((batch["input_ids"][0] == -200).nonzero()[5]) + 1  # six of sixteen features
    inputs = model_inputs(batch)
    short = {name: value[:, :end] if value.dim() == 2 else value for name, value in inputs.items()}
    with torch.no_grad():
        whole, cut = model(**inputs).logits, model(**short).logits
    torch.testing.assert_close(cut, whole[:, :end], atol=1e-6, rtol=1e-6)


def test_a_sample_does_not_depend_on_its_batch(llava: ModelFolder, adapter: Path, make_batch: Batches) -> None:
    model, batch = load_model(llava, adapter=adapter), make_batch([0, 1, 2])
    with torch.no_grad():
        together = model(**model_inputs(batch), use_cache=False).logits
        for i in range(3):
            alone = make_batch([i])
            logits = model(**model_inputs(alone), use_cache=False).logits[0]
            torch.testing.assert_close(together[i, : len(logits)], logits, atol=1e-6, rtol=1e-5)


def test_merge_takes_images_in_order_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4, 3, 2, generator=generator)
    places = torch.tensor(
        [[0, 1, 1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 1]], dtype=torch.bool
    )
    text = torch.randn(3, 8, 2, generator=generator)
    wanted, image = text.clone(), 0
    for row in range(3):
        taken = 0
        for position in range(8):
            if places[row, position]:
                wanted[row, position] = features[image, taken]
                taken += 1
                if taken == 3:
                    image, taken = image + 1, 0
        image += taken > 0
    assert torch.equal(merge_images(text, features, places), wanted)


@pytest.mark.parametrize("count", [1, 3])
def test_refuses_images_that_are_not_one_per_run(count: int) -> None:
    places = torch.tensor([[True, True], [True, False]])
    with pytest.raises(ValueError, match=rf"{count} images? for \[1, 1\] runs of image positions"):
        merge_images(torch.zeros(2, 2, 1), torch.zeros(count, 2, 1), places)


def test_refuses_image_positions_without_images(llava: ModelFolder) -> None:
    model = load_model(llava)
    with pytest.raises(ValueError, match="1 image position and no pixel_values"):
        model(torch.tensor([[1, -200, 3]]))


def test_a_trained_projector_takes_part_in_text_only_batches(
    llava: ModelFolder, adapter: Path, make_batch: Batches
) -> None:
    model, batch = load_model(llava, adapter=adapter, target="trainable").train(), make_batch([1])
    model(**model_inputs(batch)).logits.sum().backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if "multi_modal_projector" in name}
    assert len(gradients) == 4
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())
