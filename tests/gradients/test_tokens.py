"""Ids that are no tokens are refused by name, whoever is handed them; on a GPU they would end the process."""

import pytest
import torch
from small_models import IMAGE, image_batch, llama, llava, text_batch, with_lora

from icons.batch import sample_losses
from icons.gradients import per_sample_gradients
from icons.gradients.per_sample import weighted_gradient


@pytest.mark.parametrize("strange", [-1, 64, -101])
def test_a_label_that_is_no_token_is_refused(strange: int) -> None:
    model, batch = with_lora(llama(), ["q_proj"]), text_batch()
    batch["labels"][1, 4] = strange
    message = rf"labels: got {strange}, which is neither a token nor -100 .*expected ids from 0 to 63"
    with pytest.raises(ValueError, match=message):
        per_sample_gradients(model, batch)
    with pytest.raises(ValueError, match=message):
        weighted_gradient(model, batch, torch.ones(3))
    with pytest.raises(ValueError, match=message):
        sample_losses(torch.zeros(3, 14, 64), batch["labels"])


def test_the_first_label_is_never_looked_up() -> None:
    model, batch = with_lora(llama(), ["q_proj"]), text_batch()
    expected = per_sample_gradients(model, batch)
    batch["labels"][:, 0] = -1
    assert torch.equal(per_sample_gradients(model, batch), expected)


@pytest.mark.parametrize("strange", [-1, 64])
def test_an_input_id_without_embedding_is_refused_in_the_first_batch_and_later(strange: int) -> None:
    model, batch = with_lora(llama(), ["q_proj"]), text_batch()
    wrong = batch | {"input_ids": batch["input_ids"].clone()}
    wrong["input_ids"][1, 0] = strange
    message = rf"input_ids: PeftModel looks up {strange}; expected ids from 0 to 63"
    with pytest.raises(ValueError, match=message):
        per_sample_gradients(model, wrong)
    expected = per_sample_gradients(model, batch)
    with pytest.raises(ValueError, match=message):
        per_sample_gradients(model, wrong)
    assert torch.equal(per_sample_gradients(model, batch), expected)


def test_marks_of_images_are_no_strange_ids() -> None:
    batch = image_batch()
    assert (batch["input_ids"] == IMAGE).any()
    assert per_sample_gradients(with_lora(llava(), r".*language_model.*q_proj"), batch).any(dim=1).all()
