"""Per-sample gradients against one backward pass per sample, alone and unpadded."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig
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
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from icons.batch import model_inputs, sample_losses
from icons.gradients import (
    TaskMatrix,
    exact_influence,
    per_sample_gradients,
    projected_gradients,
    scored_gradients,
    weighted_gradient,
)
from icons.gradients.capture import SlowerPathWarning
from icons.preconditioner import AdamPreconditioner, Sign
from icons.projection import CountSketch, Identity, Rademacher

ARCHITECTURES = {
    "llama": llama,
    "llama, grouped heads": lambda: llama(num_key_value_heads=2),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2)),
    "qwen2, biases": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, ffn_dim=48, word_embed_proj_dim=32)
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_one_backward_pass_per_sample(architecture: str) -> None:
    torch.manual_seed(0)
    model, batch = with_lora(ARCHITECTURES[architecture]()), text_batch()
    assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


@pytest.mark.parametrize("target", ["lora", "projector too"])
def test_rows_with_two_images_none_and_a_cut_one(target: str) -> None:
    model, batch = with_lora(llava(), r".*language_model.*(q|v|down)_proj"), image_batch()
    for name, parameter in model.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad_(target != "lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerPathWarning)
        assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_and_order_change_nothing(attention: str) -> None:
    model, batch = with_lora(llama(attn_implementation=attention)), text_batch()
    order = torch.tensor([2, 0, 1])
    shuffled = {name: value[order] for name, value in text_batch(padded=20).items()}
    fields = ("input_ids", "attention_mask", "labels")
    shuffled |= {
        name: torch.cat([batch[name][order], batch[name].new_full((3, 6), -100 if name == "labels" else 0)], dim=1)
        for name in fields
    }
    assert_rows_close(per_sample_gradients(model, shuffled), per_sample_gradients(model, batch)[order])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the self-test needs none
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    model, batch = with_lora(llama()), text_batch()
    expected = per_sample_gradients(model, batch)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})  # type: ignore[operator]
    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer)
    assert_rows_close(per_sample_gradients(model, batch), expected)


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})  # type: ignore[operator]
    for module in model.modules():
        module.training = isinstance(module, GradientCheckpointingLayer)
    return model


@pytest.mark.filterwarnings("ignore::icons.gradients.capture.SlowerPathWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the self-test needs none
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("broken", [False, True])
def test_checkpointed_layers_with_parameters_on_the_slower_path(reentrant: bool, broken: bool) -> None:
    """A tower with LoRA: its rows are images. Under no_grad, as in `Trainer.predict`."""
    model, batch = with_lora(llava(), r".*(vision_tower|language_model).*(q_proj|v_proj)$"), image_batch()
    assert "entries_per_row" not in batch  # so that nothing tells whose the images are
    if broken:
        batch["pixel_values"][2] = torch.inf
    oracle = one_by_one(model, batch)
    with pytest.warns(SlowerPathWarning), torch.no_grad():
        plain = per_sample_gradients(model, batch)
    checkpointed(model, reentrant)
    with torch.no_grad():
        found = per_sample_gradients(model, batch)
    for rows in (plain, found):
        assert_rows_close(rows[: 3 - broken], oracle[: 3 - broken])
        assert bool(rows[2].isfinite().all()) != broken


def test_bfloat16_weights_give_float32_rows_near_the_float32_ones() -> None:
    model, batch = with_lora(llama()), text_batch()
    expected = per_sample_gradients(model, batch)
    found = per_sample_gradients(model.bfloat16(), batch)
    assert found.dtype == torch.float32
    assert_rows_close(found, expected, 0.05)


@pytest.mark.parametrize(
    ("names", "tied"),
    [("norm", False), ("embed_tokens", False), ("norm q_proj embed_tokens", False), ("embed_tokens q_proj", True)],
)
def test_norms_embeddings_and_tied_weights_take_no_slower_path(names: str, tied: bool) -> None:
    model, batch = trainable(llama(tie_word_embeddings=tied), names), text_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerPathWarning)
        assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


def test_a_weight_shared_by_two_linear_layers() -> None:
    model, batch = trainable(llama(), "q_proj"), text_batch()
    layers = model.model.layers  # type: ignore[union-attr]
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight  # type: ignore[index,union-attr]
    assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


def test_a_module_used_twice_in_one_forward() -> None:
    model, batch = with_lora(llama(), ["q_proj", "v_proj"]), text_batch()
    layers = model.base_model.model.model.layers
    layers[1].self_attn.q_proj = layers[0].self_attn.q_proj
    adam = adam_of(model)
    gradient = one_by_one(model, batch)
    assert_rows_close(per_sample_gradients(model, batch), gradient)
    found = projected_gradients(model, batch, Identity(), adam)  # not linear: the uses must be summed first
    assert_rows_close(found.gradient, preconditioned(model, gradient, adam))


def test_dora() -> None:
    model, batch = with_lora(llama(), ["q_proj"], use_dora=True), text_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerPathWarning)
        assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


def test_biases_of_linear_layers() -> None:
    model, batch = trainable(Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)), "q_proj"), text_batch()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerPathWarning)
        assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


def test_an_adapter_that_is_not_active_has_gradient_zero() -> None:
    model, batch = with_lora(llama(), ["q_proj"]), text_batch()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerPathWarning)
        assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


class AlsoPenalised(nn.Module):
    """Reads a weight of a linear layer beside calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.model = trainable(llama(), "q_proj")

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        found = self.model(input_ids=input_ids, **options)
        weight = self.model.model.layers[1].self_attn.q_proj.weight  # type: ignore[index,union-attr]
        found.logits = found.logits + (found.logits * weight.square().sum())
        return found


def test_a_weight_that_is_also_read_outside_its_layer() -> None:
    model, batch = AlsoPenalised().eval(), text_batch()
    with pytest.warns(SlowerPathWarning, match=r"1 trainable parameters .*layers.1.*one backward pass per sample"):
        assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


def test_text_before_images_leaves_a_trained_projector_on_the_quick_path() -> None:
    model, images = with_lora(llava(), r".*language_model.*q_proj"), image_batch()
    for name, parameter in model.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad_(True)
    text = text_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerPathWarning)
        for batch in (text, images, text):
            assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))


def test_an_empty_batch() -> None:
    model, batch = with_lora(llama()), {name: value[:0] for name, value in text_batch().items()}
    assert len(per_sample_gradients(model, batch)) == 0
    assert projected_gradients(model, batch, CountSketch(16)).gradient.shape == (0, 16)


def test_a_sample_without_supervised_tokens_has_gradient_zero() -> None:
    model, batch = with_lora(llama()), text_batch()
    batch["labels"][1] = -100
    found = projected_gradients(model, batch, CountSketch(64))
    assert found.norm[1] == 0
    assert found.norm[0] > 0
    assert found.tokens.tolist()[1] == 0


def test_a_non_finite_gradient_stays_visible_in_its_own_row() -> None:
    model, batch = with_lora(llava(), r".*language_model.*q_proj"), image_batch()
    batch["pixel_values"][2] = float("inf")
    found = projected_gradients(model, batch, CountSketch(64))
    assert found.norm.isfinite().tolist() == [True, True, False]


def test_weights_are_left_as_they_were() -> None:
    model, batch = with_lora(llama()), text_batch()
    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    first.grad = torch.ones_like(first)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with torch.no_grad():
        projected_gradients(model, batch, CountSketch(16))
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not first)
    assert torch.equal(first.grad, torch.ones_like(first))


def test_inference_mode_is_refused() -> None:
    model, batch = with_lora(llama()), text_batch()
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode=False"):
        per_sample_gradients(model, batch)


def test_active_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"drops out at random \(rate 0.1\).*model.eval"):
        per_sample_gradients(with_lora(llama()).train(), text_batch())


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        per_sample_gradients(llama().eval().requires_grad_(False), text_batch())


class Longer(nn.Module):
    """A model that inserts a position, as models do that expand images themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.model = with_lora(llama())

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        return self.model(input_ids=torch.cat([input_ids, input_ids[:, :1]], dim=1))


@pytest.mark.filterwarnings("ignore::icons.gradients.capture.SlowerPathWarning")
def test_logits_must_lie_as_labels_do() -> None:
    with pytest.raises(ValueError, match=r"logits of Longer have shape \(3, 15, 64\).*one position per label"):
        per_sample_gradients(Longer().eval(), text_batch())


def adam_of(model: nn.Module, form: Any = "adam") -> AdamPreconditioner:
    generator = torch.Generator().manual_seed(4)
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    first = {name: 0.01 * torch.randn(value.shape, generator=generator) for name, value in named.items()}
    second = {name: 1e-3 * torch.rand(value.shape, generator=generator) for name, value in named.items()}
    return AdamPreconditioner(first, second, step=7, form=form)


def blocks(model: nn.Module, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    sizes = [value.numel() for value in named.values()]
    for (name, value), block in zip(named.items(), rows.split(sizes, dim=1), strict=True):
        yield name, block.reshape(-1, *value.shape).clone()


def preconditioned(model: nn.Module, rows: Tensor, preconditioner: Any) -> Tensor:
    return torch.cat([preconditioner.apply(name, block).flatten(1) for name, block in blocks(model, rows)], dim=1)


def projected(model: nn.Module, rows: Tensor, projector: Any) -> Tensor:
    shapes = {name: block.shape[1:] for name, block in blocks(model, rows)}
    total = projector.start(len(rows), shapes, rows.device)
    for name, block in blocks(model, rows):
        sign = projector.sign(name, block.shape[1:], block.device)
        projector.add(total, name, block if sign is None else block * sign)
    return total


@pytest.mark.parametrize("form", ["none", "adam", "diagonal", "sign"])
@pytest.mark.parametrize("kind", [CountSketch, Rademacher])
def test_projected_gradients_are_the_projection_of_per_sample_gradients(form: str, kind: Any) -> None:
    model, batch, projector = with_lora(llama()), text_batch(), kind(96, seed=3)
    rows = per_sample_gradients(model, batch)
    preconditioner = {"none": None, "sign": Sign()}.get(form) if form in ("none", "sign") else adam_of(model, form)
    expected = rows if preconditioner is None else preconditioned(model, rows, preconditioner)
    found = projected_gradients(model, batch, projector, preconditioner)
    torch.testing.assert_close(found.norm, expected.norm(dim=1), rtol=1e-4, atol=0)
    assert_rows_close(found.gradient, projected(model, expected, projector), 1e-3 if form == "sign" else 1e-4)
    single = sample_losses(model(**model_inputs(batch), use_cache=False).logits, batch["labels"])
    torch.testing.assert_close(found.loss, single.detach())
    assert found.tokens.tolist() == [9, 2, 6]


def test_a_row_does_not_depend_on_the_rows_before_it() -> None:
    model, batch, adam = with_lora(llama()), text_batch(), adam_of(with_lora(llama()))
    first = projected_gradients(model, batch, CountSketch(64), adam)
    again = projected_gradients(model, batch, CountSketch(64), adam)
    assert torch.equal(first.gradient, again.gradient)


def task_vectors(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    return [{name: torch.randn(value.shape, generator=generator) for name, value in named} for _ in range(count)]


@pytest.mark.parametrize("form", ["none", "adam", "diagonal"])
def test_exact_influence_is_a_matrix_product_of_unit_gradients(form: Any) -> None:
    model, batch = with_lora(llama()), text_batch()
    vectors = task_vectors(model, 4)
    adam = None if form == "none" else adam_of(model, form)
    rows = per_sample_gradients(model, batch)
    rows = rows if adam is None else preconditioned(model, rows, adam)
    flat = torch.stack([torch.cat([value.flatten() for value in vector.values()]) for vector in vectors])
    expected = (rows / rows.norm(dim=1, keepdim=True)) @ flat.mT
    torch.testing.assert_close(exact_influence(model, batch, vectors, adam), expected, rtol=1e-4, atol=1e-4)


def test_one_pass_gives_scores_and_projected_rows() -> None:
    model, batch, adam = with_lora(llama()), text_batch(), adam_of(with_lora(llama()))
    vectors = task_vectors(model, 2)
    product, norm, found = scored_gradients(model, batch, TaskMatrix(model, vectors), adam, CountSketch(64))
    alone_found = projected_gradients(model, batch, CountSketch(64), adam)
    torch.testing.assert_close(found.gradient, alone_found.gradient, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product / norm[:, None], exact_influence(model, batch, vectors, adam))


def test_a_task_vector_of_another_model_is_refused() -> None:
    model = with_lora(llama())
    name, value = next(iter(task_vectors(model, 1)[0].items()))
    with pytest.raises(ValueError, match=r"task vector 0: nonsense .*expected one of the trainable parameters"):
        TaskMatrix(model, [{"nonsense": value}])
    with pytest.raises(ValueError, match=r"task vector 0: .* expected shape"):
        TaskMatrix(model, [{name: value[:1, :1]}])


def test_the_weighted_gradient_is_the_weighted_sum_of_rows() -> None:
    model, batch = with_lora(llama()), text_batch()
    weights = torch.tensor([0.5, 0.0, -2.0])
    rows = per_sample_gradients(model, batch)
    found = torch.cat([value.flatten() for value in weighted_gradient(model, batch, weights).values()])
    torch.testing.assert_close(found, weights @ rows, rtol=1e-4, atol=1e-6)
    empty = {name: value[:0] for name, value in batch.items()}
    assert all(not value.any() for value in weighted_gradient(model, empty, weights[:0]).values())
