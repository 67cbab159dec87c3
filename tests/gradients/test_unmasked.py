"""Padding on the right needs no attention mask, where that is shown; everything else keeps its own."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_models import assert_rows_close, image_batch, llama, llava, one_by_one, text_batch, with_lora
from torch import Tensor, nn
from transformers import LlamaForCausalLM, XLNetConfig, XLNetLMHeadModel

from icons.gradients import per_sample_gradients, weighted_gradient
from icons.gradients.altered_batches import use_of, with_more_padding, without_mask
from icons.gradients.paths import KNOWN


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
        assert masks[before:] == [True, False]  # a batch without padding loses nothing by its mask
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


class Crowded(LlamaForCausalLM):
    """Tokens beyond the forty-fifth of a batch find no room, as with experts of limited capacity; padding takes none,
    where it is seen to be padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        late = there.sum() > 45
        seen = self.get_input_embeddings()(input_ids) * (0.5 if late else 1)
        return super().forward(inputs_embeds=seen, attention_mask=attention_mask, **kwargs)


class Bidirectional(LlamaForCausalLM):
    """All tokens that the mask shows, see each other by their mean."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        embedded = self.get_input_embeddings()(input_ids)
        mean = (embedded * there[..., None]).sum(dim=1) / there.sum(dim=1)[:, None]
        return super().forward(inputs_embeds=embedded + 0.02 * mean[:, None], attention_mask=attention_mask, **kwargs)


@pytest.mark.filterwarnings("ignore:PeftModel. a sample's loss depends on the very token")
@pytest.mark.parametrize("first", [None, (14, 14), (14, 13), (14, 5)])
@pytest.mark.parametrize("kind", [Counting, Demanding, Failing, Crowded, Bidirectional])
def test_a_model_that_needs_its_mask_keeps_it(kind: type[LlamaForCausalLM], first: tuple[int, ...] | None) -> None:
    """Whatever it is shown first: a batch without padding, with hardly any, or one padded row, which is left out where
    the others are tried in other company."""
    model = with_lora(kind(llama().config), ["q_proj"])
    if first is not None:
        shown = text_batch(first)
        assert_rows_close(per_sample_gradients(model, shown), one_by_one(model, shown))
    batch = text_batch((12, 5, 9, 9))
    with masks_of(model) as masks:
        rows = per_sample_gradients(model, batch)
        assert masks[-1]
    assert_rows_close(rows, one_by_one(model, batch))


def test_more_padding_is_what_the_batch_has() -> None:
    """Some models know padding by its id, and a row without any does not tell it."""
    batch = text_batch((14, 5)) | {"token_type_ids": torch.tensor([[7] * 14, [7] * 5 + [9] * 9])}
    padded = with_more_padding(llama(), batch, left=False, columns=3)
    assert padded is not None
    assert not padded["input_ids"][:, 14:].any() and not padded["attention_mask"][:, 14:].any()
    assert (padded["token_type_ids"][:, 14:] == 9).all() and (padded["labels"][:, 14:] == -100).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hardly_any_padding_and_no_more_positions_show_what_a_mask_is_for(dtype: torch.dtype) -> None:
    """As XLNet in bfloat16: rows were 8 % off, and losses no more than their noise."""
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48, pad_token_id=0)
    model = XLNetLMHeadModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    model, batch = with_lora(model, r".*ff.layer_[12]").to(dtype), text_batch((14, 13))
    with warnings.catch_warnings(action="ignore"):
        rows = per_sample_gradients(model, batch)
    assert KNOWN[model].unmasked[use_of(batch)] == 0
    assert_rows_close(rows, one_by_one(model, batch), 1e-5 if dtype == torch.float32 else 0.03)


class ByIds(LlamaForCausalLM):
    """Takes ids that are 0 for padding, and sees how many there are."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        seen = self.get_input_embeddings()(input_ids) + 3e-3 * (input_ids == 0).sum(dim=1)[:, None, None]
        return super().forward(inputs_embeds=seen, attention_mask=attention_mask, **kwargs)


def test_what_a_later_batch_is_refused_for_is_refused_each_time() -> None:
    model, full = with_lora(ByIds(llama().config), ["q_proj"]), text_batch((14, 14))
    assert_rows_close(per_sample_gradients(model, full), one_by_one(model, full))
    for batch in (text_batch((14, 5)), text_batch((14, 5)), text_batch()):
        with pytest.raises(ValueError, match="depends on its padding"):
            per_sample_gradients(model, batch)


def test_a_pass_that_ends_early_leaves_the_verdict_to_the_next() -> None:
    """As where memory runs out, and the batch comes again in smaller ones."""
    model, full, padded = with_lora(ByIds(llama().config), ["q_proj"]), text_batch((14, 14)), text_batch()
    per_sample_gradients(model, full)

    def runs_out(_module: Any, _args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError

    handle = model.get_submodule("base_model.model.model.norm").register_forward_hook(runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        per_sample_gradients(model, padded)
    handle.remove()
    with pytest.raises(ValueError, match="depends on its padding"):
        per_sample_gradients(model, padded)


class Centred(LlamaForCausalLM):
    """Its logits change after the output layer, which is then not narrowed."""

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = output.logits - 0.5 * output.logits.cumsum(dim=1)
        return output


@pytest.mark.filterwarnings("ignore::icons.gradients.self_test.WholeLogitsWarning")
def test_the_verdict_is_one_whether_the_model_is_known_to_need_all_logits_or_not() -> None:
    model, padded = with_lora(Centred(llama().config), ["q_proj"]), text_batch()
    for batch in (padded, padded | {"token_type_ids": torch.zeros_like(padded["labels"])}):
        with masks_of(model) as masks:
            rows = per_sample_gradients(model, batch)
            assert not masks[-1]
        assert_rows_close(rows, one_by_one(model, batch))


def test_rows_are_the_same_to_the_last_bit_whichever_batch_comes_first() -> None:
    batches = [text_batch((14, 14)), text_batch((14, 13)), text_batch((14, 5)), text_batch((9,)), text_batch()]

    def run(first: int) -> list[Tensor]:
        model = with_lora(llama(max_position_embeddings=15), ["q_proj"])
        return [per_sample_gradients(model, batch) for batch in batches[first:]]

    whole = run(0)
    for first in range(1, len(batches)):
        assert all(torch.equal(one, other) for one, other in zip(whole[first:], run(first), strict=True))


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


def positions(batch: dict[str, Tensor]) -> None:
    batch["position_ids"] = torch.arange(14).repeat(3, 1)


def no_padding(batch: dict[str, Tensor]) -> None:
    batch["attention_mask"][:] = 1


def nothing(batch: dict[str, Tensor]) -> None:
    del batch["attention_mask"]


@pytest.mark.parametrize("change", [hole, left, predicted_padding, documents, by_pairs, positions, no_padding, nothing])
def test_any_other_mask_stays(change: Any) -> None:
    batch = text_batch()
    assert "attention_mask" not in without_mask(batch)
    change(batch)
    assert without_mask(batch) is batch
