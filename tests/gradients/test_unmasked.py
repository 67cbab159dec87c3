"""Padding on the right needs no attention mask, where that is shown; everything else keeps its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_models import assert_rows_close, image_batch, llama, llava, one_by_one, text_batch, with_lora
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from icons.gradients import per_sample_gradients, weighted_gradient
from icons.gradients.altered_batches import without_mask


@contextmanager
def masks_of(model: nn.Module) -> Iterator[list[bool]]:
    """Whether each pass over the language model got a mask."""
    found: list[bool] = []
    text = next(module for name, module in model.named_modules() if type(module).__name__ == "LlamaModel")

    def see(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        found.append(kwargs.get("attention_mask") is not None)

    handle = text.register_forward_pre_hook(see, with_kwargs=True)
    yield found
    handle.remove()


@pytest.mark.parametrize("kind", ["text", "images"])
def test_later_passes_run_without_and_rows_are_right(kind: str) -> None:
    model, batch = (llama(), text_batch()) if kind == "text" else (llava(), image_batch())
    model = with_lora(model, r".*(q|up)_proj$" if kind == "text" else r".*language_model.*(q|up)_proj$")
    with masks_of(model) as masks:
        for _ in range(2):
            rows = per_sample_gradients(model, batch)
        assert not masks[-1]
        weighted_gradient(model, batch, torch.ones(3))
        assert not masks[-1]
    assert_rows_close(rows, one_by_one(model, batch))


def test_a_first_batch_without_padding_shows_it_too() -> None:
    model, full, padded = with_lora(llama(), ["q_proj"]), text_batch((14, 14)), text_batch()
    with masks_of(model) as masks:
        per_sample_gradients(model, full)
        rows = per_sample_gradients(model, padded)
        assert not masks[-1]
    assert_rows_close(rows, one_by_one(model, padded))


def test_where_nothing_can_be_padded_a_later_batch_shows_it_once() -> None:
    model, full, padded = with_lora(llama(max_position_embeddings=14), ["q_proj"]), text_batch((14, 14)), text_batch()
    per_sample_gradients(model, full)
    with masks_of(model) as masks:
        rows = per_sample_gradients(model, padded)
        assert not masks[-1] and len(masks) > 1
        before = len(masks)
        per_sample_gradients(model, full)
        per_sample_gradients(model, padded)
        assert masks[before:] == [False, False]
    assert_rows_close(rows, one_by_one(model, padded))


class Counting(LlamaForCausalLM):
    """What it sees depends on how many tokens there are, which nothing but a mask tells."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        seen = self.get_input_embeddings()(input_ids) + 3e-3 * there.sum(dim=1)[:, None, None]
        return super().forward(inputs_embeds=seen, attention_mask=attention_mask, **kwargs)


class Demanding(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class Failing(LlamaForCausalLM):
    """Without a mask, not a number."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        output.logits = output.logits + (torch.nan if attention_mask is None else 0)
        return output


@pytest.mark.parametrize("first", ["padded", "full"])
@pytest.mark.parametrize("kind", [Counting, Demanding, Failing])
def test_a_model_that_needs_its_mask_keeps_it(kind: type[LlamaForCausalLM], first: str) -> None:
    model = with_lora(kind(llama().config), ["q_proj"])
    if first == "full":
        per_sample_gradients(model, text_batch((14, 14)))
    batch = text_batch()
    with masks_of(model) as masks:
        rows = per_sample_gradients(model, batch)
        assert masks[-1]
    assert_rows_close(rows, one_by_one(model, batch))


def hole(batch: dict[str, Tensor]) -> None:
    batch["attention_mask"][0, 4] = 0
    batch["labels"][0, 4] = -100


def left(batch: dict[str, Tensor]) -> None:
    for name in ("input_ids", "attention_mask", "labels"):
        batch[name] = batch[name].flip(1)


def predicted_padding(batch: dict[str, Tensor]) -> None:
    batch["labels"][1, -1] = 5


def documents(batch: dict[str, Tensor]) -> None:
    batch["attention_mask"] *= 2


def by_pairs(batch: dict[str, Tensor]) -> None:
    batch["attention_mask"] = batch["attention_mask"][:, None, None, :].expand(-1, 1, 14, 14)


def nothing(batch: dict[str, Tensor]) -> None:
    del batch["attention_mask"]


@pytest.mark.parametrize("change", [hole, left, predicted_padding, documents, by_pairs, nothing])
def test_any_other_mask_stays(change: Any) -> None:
    batch = text_batch()
    assert "attention_mask" not in without_mask(batch)
    change(batch)
    assert without_mask(batch) is batch
