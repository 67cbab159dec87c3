"""Layers that look like plain ones and are not: their rows equal one backward pass per sample all the same."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import (
    SMALL,
    assert_rows_close,
    image_batch,
    llama,
    llava,
    one_by_one,
    text_batch,
    trainable,
    with_lora,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import MixtralConfig, MixtralForCausalLM

from icons.gradients import per_sample_gradients, projected_gradients
from icons.gradients.capture import SlowerPathWarning
from icons.gradients.paths import KNOWN
from icons.projection import CountSketch


class Gained(nn.Linear):
    """A linear layer with a parameter of its own beside the usual ones."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.full((sizes[1],), 1.5))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.gain


class Scaled(nn.Linear):
    """A linear layer that multiplies its weight by a number without dimensions, a parameter too."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * self.factor, self.bias)


class Rounded(nn.Linear):
    """Multiplies a rounded input, whose gradient passes straight through, as BitNet's layers do: near the plain one."""

    def forward(self, input: Tensor) -> Tensor:
        rounded = input + ((input * 16).round() / 16 - input).detach()
        return super().forward(rounded)


class PerHead(nn.Module):
    """A small linear layer, called with `[B * L, heads, width]`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, 4, 8)).reshape(x.shape)


class Keyword(nn.Module):
    """Calls its layer by keyword, and changes what it gives in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(input=x).mul_(2.0).add_(1.0)


class Pair(nn.Module):
    """Owns a parameter and gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.scale, x


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(x)[0]


class Turned(nn.Module):
    """Its layer sees `[L, B, width]`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


def pruned() -> nn.Module:
    layer = nn.Linear(32, 32)
    prune.random_unstructured(layer, "weight", amount=0.5)
    return layer


def hooked() -> nn.Module:
    layer = nn.Linear(32, 32)
    layer.register_forward_hook(lambda _module, _args, output: output * 1.7)
    return layer


ODD: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(32, 32)),
    "prune": pruned,
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(32, 32)),
    "another parameter": lambda: Gained(32, 32),
    "a scaled weight, a parameter without dimensions": lambda: Scaled(32, 32),
    "a hook that scales the output": hooked,
    "rounded inputs": lambda: Rounded(32, 32),
    "heads": PerHead,
    "keyword, in place": Keyword,
    "a convolution over time": lambda: nn.Sequential(Transposed(), nn.Conv1d(32, 32, 1), Transposed()),
    "a tuple": First,
    "positions first": Turned,
}
SLOW = {"a tuple", "positions first"}


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def with_odd_layer(make: Callable[[], nn.Module]) -> nn.Module:
    model = llama().requires_grad_(False)
    model.model.layers[1].self_attn.q_proj = make()  # type: ignore[index,union-attr]
    return model.eval()


@pytest.mark.parametrize("kind", ODD)
def test_a_layer_that_is_not_plain(kind: str) -> None:
    torch.manual_seed(1)
    model, batch = with_odd_layer(ODD[kind]), text_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if kind in SLOW else "error")
        found = per_sample_gradients(model, batch)
    assert_rows_close(found, one_by_one(model, batch))


@pytest.mark.parametrize("first", ["one image a row", "two, none and one"])
@pytest.mark.parametrize("part", ["lora", "tower"])
def test_a_trained_tower_whose_images_are_as_many_as_rows(part: str, first: str) -> None:
    """Three rows with three images, one a row or not: no shape tells them apart."""
    model = llava()
    if part == "lora":
        model = with_lora(model, r".*(language_model|vision_tower).*(q|v)_proj")
    else:
        trainable(model, "vision_tower")
    uneven = image_batch()
    even = dict(uneven) | {"input_ids": uneven["input_ids"].clone(), "labels": uneven["labels"].clone()}
    even["input_ids"][even["input_ids"] == -200] = 7
    even["input_ids"][:, 1:5] = -200
    even["labels"][even["input_ids"] == -200] = -100
    even["labels"][2, 5:7] = 7
    for batch in (even, uneven) if first == "one image a row" else (uneven, even):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowerPathWarning)
            found = per_sample_gradients(model, batch)
        assert_rows_close(found, one_by_one(model, batch))


def told(batch: dict[str, Any], *images: int) -> dict[str, Any]:
    """The batch with the number of each row's images."""
    return batch | {"entries_per_row": {"pixel_values": torch.tensor(images)}}


@pytest.mark.parametrize("names", ["vision_tower", "lora"])
def test_a_tower_takes_no_slower_path_when_the_batch_tells_whose_its_images_are(names: str) -> None:
    """Two images, none, and a cut one, on which no number of image tokens tells: in batches of any rows, and of one."""
    model = llava()
    model = with_lora(model, r".*vision_tower.*(q|v)_proj") if names == "lora" else trainable(model, names)
    batch = image_batch()
    expected = one_by_one(model, batch)
    last = {name: value[2:] for name, value in batch.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerPathWarning)
        for rows, each in ((slice(2, 3), told(last, 1)), (slice(0, 3), told(batch, 2, 0, 1))):
            assert_rows_close(per_sample_gradients(model, each), expected[rows])


@pytest.mark.filterwarnings("ignore::icons.gradients.capture.SlowerPathWarning")
def test_a_wrong_number_of_images_is_not_believed() -> None:
    model, batch = with_lora(llava(), r".*vision_tower.*(q|v)_proj"), image_batch()
    for images in ((1, 1, 1), (1, 0, 2), (3, 0, 0)):
        assert_rows_close(per_sample_gradients(model, told(batch, *images)), one_by_one(model, batch))


@pytest.mark.filterwarnings("ignore::icons.gradients.capture.SlowerPathWarning")
def test_a_weight_that_images_alone_read_once_more_is_found_after_text() -> None:
    model, batch = with_lora(llava(), r".*language_model.*(q|v)_proj"), image_batch()
    weight = dict(model.named_parameters())
    read = next(value for name, value in weight.items() if "lora_A" in name)
    projector: Any = next(part for name, part in model.named_modules() if name.endswith("multi_modal_projector"))
    projector.register_forward_hook(lambda _module, _args, output: output * (1 + read.sum()))
    for _ in range(2):
        assert_rows_close(per_sample_gradients(model, text_batch()), one_by_one(model, text_batch()))
    assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


@pytest.mark.filterwarnings("ignore::icons.gradients.capture.SlowerPathWarning")
@pytest.mark.parametrize("told_of", [True, False])
def test_what_a_batch_gives_does_not_depend_on_the_batches_before_it(told_of: bool) -> None:
    """Bit for bit, whichever batch is the first: so that a run may be resumed anywhere."""
    batch = image_batch()
    single, text = ({name: value[row] for name, value in batch.items()} for row in (slice(2, 3), slice(1, 2)))
    del text["pixel_values"]
    batches = [batch, single, text, text_batch()]
    if told_of:
        batches[:2] = told(batch, 2, 0, 1), told(single, 1)
    found: list[list[Tensor]] = []
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)):
        model = trainable(llava(), "q_proj pre_layrnorm projector")
        rows = {place: per_sample_gradients(model, batches[place]) for place in order}
        found.append([rows[place] for place in range(4)])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.filterwarnings("ignore::icons.gradients.capture.SlowerPathWarning")
@pytest.mark.parametrize("kind", ODD)
def test_a_broken_row_in_the_first_batch_hides_no_wrong_path(kind: str) -> None:
    torch.manual_seed(1)
    model, batch = with_odd_layer(ODD[kind]), text_batch()
    expected = one_by_one(model, batch)
    batch["input_ids"][0, 4] = 63
    batch["input_ids"][1:][batch["input_ids"][1:] == 63] = 62
    expected = one_by_one(model, batch)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    embeddings.weight[63] = torch.nan
    found = per_sample_gradients(model, batch)
    assert not found[0].isfinite().all()
    assert_rows_close(found[1:], expected[1:])


def test_a_batch_of_one_row_proves_nothing_of_larger_ones() -> None:
    model, uneven = with_lora(llava(), r".*vision_tower.*(q|v)_proj"), image_batch()
    single = {name: value[2:] for name, value in uneven.items()}
    for batch in (single, uneven):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowerPathWarning)
            assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


class Reversed(nn.Module):
    """Its inner layer gets the rows in another order."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.weight = inner, torch.empty(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flip(0)).flip(0)


@pytest.mark.filterwarnings("ignore::icons.gradients.capture.SlowerPathWarning")
@pytest.mark.parametrize("cause", ["not supervised", "not finite"])
def test_a_batch_in_which_one_row_alone_has_a_gradient_proves_nothing_of_others(cause: str) -> None:
    model, batch = with_lora(llama(), ["q_proj"]), text_batch()
    adapted: Any = model
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"] = Reversed(layer.lora_A["default"])
    first, embeddings = {name: value.clone() for name, value in batch.items()}, adapted.get_input_embeddings()
    kept = embeddings.weight.clone()
    if cause == "not supervised":
        first["labels"][[0, 2]] = -100
    else:
        first["input_ids"][first["input_ids"] == 63] = 62
        first["input_ids"][[0, 2], 4] = 63
        embeddings.weight.data[63] = torch.nan
    assert_rows_close(per_sample_gradients(model, first)[1:2], one_by_one(model, first)[1:2])
    embeddings.weight.data.copy_(kept)
    assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


def test_experts_that_get_some_of_the_tokens() -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=3, num_key_value_heads=2))
    trainable(model, "experts gate")
    for batch in (text_batch(), text_batch((4, 4), 4)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowerPathWarning)
            assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


def test_an_adapter_that_was_zero_is_proven_when_it_no_longer_is() -> None:
    """A zero lora_B hides lora_A: that the first proof was silent must not make it true."""
    model, batch = with_lora(llama(), ["q_proj"]), text_batch()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    layer: Any = model.base_model.model.model.layers[1].self_attn.q_proj  # type: ignore[union-attr]
    layer.lora_A["default"].register_forward_hook(lambda _module, _args, output: output * 1.7)
    first = per_sample_gradients(model, batch)
    assert_rows_close(first, one_by_one(model, batch))
    assert KNOWN[model].silent
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    for _ in range(2):
        found = projected_gradients(model, batch, CountSketch(64)).norm
        torch.testing.assert_close(found, one_by_one(model, batch).norm(dim=1), rtol=1e-5, atol=0)
    assert not KNOWN[model].silent


def test_hooks_and_parametrisations_that_come_later_are_seen() -> None:
    model, batch = with_lora(llama(), ["q_proj"]), text_batch()
    per_sample_gradients(model, batch)
    layer: Any = model.base_model.model.model.layers[0].self_attn.q_proj  # type: ignore[union-attr]
    layer.lora_B["default"].register_forward_hook(lambda _module, _args, output: output * 1.7)
    assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))
    parametrizations.weight_norm(layer.lora_A["default"])
    assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


def test_the_trainable_set_may_change_between_calls() -> None:
    model, batch = trainable(llama(), "."), text_batch()
    for names in (".", "q_proj norm", "embed_tokens", "."):
        trainable(model, names)
        assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


class Sometimes(nn.Module):
    """Reads its layer's weight outside the layer, where a text begins with another token than 5."""

    def __init__(self) -> None:
        super().__init__()
        self.model = trainable(llama(), "nothing")
        self.aside = nn.Linear(1, 64)

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        found = self.model(input_ids=input_ids, **options)
        if input_ids[0, 0] != 5:
            found.logits = found.logits * (1 + self.aside.weight[:, 0])
        return found


@pytest.mark.filterwarnings("ignore::icons.gradients.capture.SlowerPathWarning")
def test_a_weight_that_took_no_part_at_first_is_noticed_when_it_does() -> None:
    model, batch = Sometimes(), text_batch()
    other = dict(batch) | {"input_ids": batch["input_ids"].clone()}
    batch["input_ids"][:, 0] = 5
    for each in (batch, other):
        found = per_sample_gradients(model, each)
        assert torch.allclose(found, one_by_one(model, each), rtol=1e-4, atol=1e-7)
    assert found.any()


@pytest.mark.filterwarnings("ignore::icons.gradients.capture.SlowerPathWarning")
@pytest.mark.parametrize("names", ["q_proj norm", "proj", "vision_tower q_proj"])
def test_one_row_that_is_not_finite_costs_its_row_alone(names: str) -> None:
    """On every path: the taps', the modules', and one backward pass per sample."""
    model = trainable(llava(), names)
    batch = image_batch()
    expected = one_by_one(model, batch)
    batch["pixel_values"][2] = float("nan")  # the last row's
    for _ in range(2):  # in the first pass too, where nothing is proven yet
        found = per_sample_gradients(model, batch)
        assert not found[2].isfinite().all()
        assert_rows_close(found[:2], expected[:2])


def test_batches_that_meet_nothing_trainable_are_proven_once() -> None:
    """A projector is trained, and no row has an image: the next such batch costs a pass and no proof."""
    model, batch, passes = trainable(llava(), "projector"), text_batch(), list[nn.Module]()
    handle = model.register_forward_pre_hook(lambda module, _args: passes.append(module))
    assert not per_sample_gradients(model, batch).any()
    passes.clear()
    assert not per_sample_gradients(model, batch).any()
    assert len(passes) == 1
    handle.remove()
