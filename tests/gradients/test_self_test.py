"""Models and batches outside the contract are told in one line, before a row is made."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from icons.gradients import per_sample_gradients
from icons.gradients.capture import SlowerPathWarning
from icons.gradients.features import losses
from icons.gradients.self_test import RouterLossWarning, SeesItsTargetWarning, WholeLogitsWarning


def padded_left(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    shifts = (batch["attention_mask"] == 0).sum(dim=1).tolist()
    fields = ("input_ids", "attention_mask", "labels")
    moved = {name: torch.stack([row.roll(by) for row, by in zip(batch[name], shifts, strict=True)]) for name in fields}
    return batch | moved


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32))


def test_an_encoder_decoder_is_refused() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    config = BartConfig(vocab_size=64, encoder_attention_heads=2, decoder_attention_heads=2, **sizes)
    model = BartForConditionalGeneration(config).eval()
    with pytest.raises(ValueError, match=r"BartForConditionalGeneration is an encoder-decoder.*expected a causal"):
        per_sample_gradients(model, text_batch())


def test_padding_on_the_left_is_refused_where_positions_shift_and_taken_where_not() -> None:
    batch = text_batch()
    model = with_lora(gpt2())
    per_sample_gradients(model, batch)  # this side is fine
    with pytest.raises(ValueError, match=r"a sample's loss depends on its padding: got .* pad on the right"):
        per_sample_gradients(model, padded_left(batch))
    turning = with_lora(llama())
    assert_rows_close(per_sample_gradients(turning, padded_left(batch)), one_by_one(turning, batch))


class Mixed(LlamaForCausalLM):
    """Its logits are centred over positions after the output layer."""

    def forward(self, *args: Any, **options: Any) -> Any:
        found = super().forward(*args, **options)
        earlier = found.logits.cumsum(dim=1) / torch.arange(1, found.logits.shape[1] + 1)[:, None]
        found.logits = found.logits - 0.5 * earlier
        return found


@pytest.mark.parametrize("names", ["q_proj", "vision_tower projector norm"])
def test_a_batch_without_supervised_tokens_is_zero_and_hides_nothing_from_the_next(names: str) -> None:
    model, batch = trainable(llava(), names), image_batch()
    found = per_sample_gradients(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert found.shape[0] == 3 and not found.any()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowerPathWarning)
        assert_rows_close(per_sample_gradients(model, batch), one_by_one(model, batch))
    shifting, left = with_lora(gpt2()), padded_left(text_batch())
    assert not per_sample_gradients(shifting, {**left, "labels": torch.full_like(left["labels"], -100)}).any()
    with pytest.raises(ValueError, match="depends on its padding"):
        per_sample_gradients(shifting, left)


def test_logits_that_are_mixed_over_positions_are_not_narrowed() -> None:
    torch.manual_seed(0)
    model, batch = with_lora(Mixed(LlamaConfig(**SMALL)), "all-linear"), text_batch()
    with pytest.warns(WholeLogitsWarning, match="logits change after the output layer"):
        found = per_sample_gradients(model, batch)
    assert_rows_close(found, one_by_one(model, batch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(per_sample_gradients(model, batch), found)


class BatchMixed(LlamaForCausalLM):
    """Samples of a batch see one another."""

    def forward(self, *args: Any, **options: Any) -> Any:
        found = super().forward(*args, **options)
        found.logits = found.logits + 5 * found.logits.mean(dim=(0, 1), keepdim=True)
        return found


def test_samples_that_see_one_another_are_refused() -> None:
    model = with_lora(BatchMixed(LlamaConfig(**SMALL)))
    with (
        warnings.catch_warnings(action="ignore", category=WholeLogitsWarning),
        pytest.raises(ValueError, match=r"loss depends on (its padding|.*samples beside it)"),
    ):
        per_sample_gradients(model, text_batch())


class Bidirectional(LlamaForCausalLM):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        seen = attention_mask[:, None, None, :].bool().expand(-1, 1, input_ids.shape[1], -1)
        return super().forward(input_ids, attention_mask=seen, **options)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.06), (torch.float16, 0.02), (torch.float32, 0.002)])
def test_a_little_of_other_samples_is_found_in_any_precision(dtype: torch.dtype, share: float) -> None:
    """Half precision's own noise is no reason to refuse; changes of a hundredth of the loss and less are."""
    model, batch = with_lora(llama(hidden_size=64, num_hidden_layers=4).to(dtype), ["q_proj"]), text_batch()
    per_sample_gradients(model, batch)
    norm = model.get_submodule("base_model.model.model.norm")
    norm.register_forward_hook(lambda _module, _args, output: output * (1 + share * len(output)))
    with pytest.raises(ValueError, match=r"a sample's loss depends on .*the samples beside it: got"):
        per_sample_gradients(model, batch)


def test_each_row_is_tried_in_other_company() -> None:
    """The most padded row alone would not tell: it is not one of those that see others."""
    model, batch = with_lora(llama(), ["q_proj"]), text_batch()

    def see_the_row_before(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:2], output[2:] + output[1:-1]])

    model.get_submodule("base_model.model.model.layers.0.mlp").register_forward_hook(see_the_row_before)
    with pytest.raises(ValueError, match="a sample's loss depends on the samples beside it: got"):
        per_sample_gradients(model, batch)


@pytest.mark.parametrize("state", ["merged", "disabled"])
def test_an_adapter_that_takes_no_part_is_refused(state: str) -> None:
    model: Any = with_lora(llama(), ["q_proj", "v_proj"])
    batch, layer = (
        text_batch(),
        model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj"),
    )
    per_sample_gradients(model, batch)
    if state == "merged":
        layer.merge()
    else:
        layer._disable_adapters = True
    with pytest.raises(
        ValueError, match=rf"v_proj\.lora_A\.default\.weight is {state}: its gradient would be a silent zero"
    ):
        per_sample_gradients(model, batch)


def test_complex_weights_are_refused() -> None:
    model = with_lora(llama(), ["q_proj"])
    model.register_parameter("phases", nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    with pytest.raises(
        ValueError, match=r"PeftModel trains complex numbers \(phases\), which a row of real ones cannot"
    ):
        per_sample_gradients(model, text_batch())


def test_labels_of_fewer_bits_are_the_same_labels() -> None:
    model, batch = with_lora(llama(), ["q_proj"]), text_batch()
    expected = one_by_one(model, batch)
    assert_rows_close(per_sample_gradients(model, batch | {"labels": batch["labels"].int()}), expected)


def test_a_model_that_sees_its_targets_is_told() -> None:
    torch.manual_seed(0)
    model, batch = with_lora(Bidirectional(LlamaConfig(**SMALL))), text_batch()
    with pytest.warns(SeesItsTargetWarning, match="loss depends on the very token that it is to predict"):
        found = per_sample_gradients(model, batch)
    assert_rows_close(found, one_by_one(model, batch))


@pytest.mark.parametrize(("asks", "share"), [(True, 0.02), (True, 0.0), (False, 0.02)])
def test_the_loss_of_routers_is_told_where_training_asks_for_it(asks: bool, share: float) -> None:
    sizes = {"num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(**SMALL, **sizes, output_router_logits=asks, router_aux_loss_coef=share)
    torch.manual_seed(0)
    model, batch = with_lora(MixtralForCausalLM(config), ["q_proj"]), text_batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = per_sample_gradients(model, batch)
        assert torch.equal(per_sample_gradients(model, batch), found)
    told = [str(one.message) for one in caught if one.category is RouterLossWarning]
    assert len(told) == int(asks and share > 0)
    assert all("PeftModel: the router's loss is not part of the sample's loss" in line for line in told)
    assert_rows_close(found, one_by_one(model, batch))


@pytest.mark.parametrize("kind", ["OPT", "Bloom"])
def test_dropout_that_is_no_module_is_refused(kind: str) -> None:
    if kind == "OPT":
        sizes = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
        model: Any = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32, attention_dropout=0.0))
    else:
        model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.1))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with pytest.raises(ValueError, match=rf"{kind}ForCausalLM drew random numbers.*modules? in train mode"):
        per_sample_gradients(model, text_batch())


def test_models_without_logits_are_named() -> None:
    batch = text_batch()
    with pytest.raises(ValueError, match=r"LlamaModel gave BaseModelOutputWithPast without logits.*output layer"):
        per_sample_gradients(trainable(LlamaModel(LlamaConfig(**SMALL)), "q_proj"), batch)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM gives tuples .*set config.return_dict to True"):
        per_sample_gradients(trainable(llama(return_dict=False), "q_proj"), batch)


@pytest.mark.filterwarnings("ignore")
def test_prompt_tuning_is_named() -> None:
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    model = get_peft_model(llama(), config).eval()
    with pytest.raises(ValueError, match=r"logits of PeftModelForCausalLM have shape \(3, 16, 64\).*prompt tuning"):
        per_sample_gradients(model, text_batch())


def test_a_model_without_weights_is_named() -> None:
    with torch.device("meta"):
        model = trainable(llama(), "q_proj")
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no weights \(.* is on the meta device\)"):
        per_sample_gradients(model, text_batch())


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_trained_weights_are_refused(mesh: DeviceMesh) -> None:
    """FSDP2 swaps a layer's weights for whole ones while it runs: no tap would know them, and rows would be zeros."""
    model = with_lora(llama(), ["q_proj"])
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    with pytest.raises(ValueError, match=r"PeftModel is sharded over devices \(.*\).*expected whole trained weights"):
        per_sample_gradients(model, text_batch())


def test_sharded_frozen_weights_change_nothing(mesh: DeviceMesh) -> None:
    model = with_lora(llama(), ["q_proj"])
    expected = per_sample_gradients(model, text_batch())
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for module in [*model.base_model.model.model.layers, model]:
        fully_shard(module, mesh=mesh, ignored_params=trained)
    assert torch.equal(per_sample_gradients(model, text_batch()), expected)


def test_layers_that_run_on_pieces_of_their_weights_are_refused(mesh: DeviceMesh) -> None:
    model = with_lora(llama(), ["q_proj"])
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [Shard(1)]), requires_grad=False)
    with pytest.raises(ValueError, match=r"is sharded over devices \(.*layers\.1\.mlp\.down_proj\.weight\)"):
        per_sample_gradients(model, text_batch())


@pytest.mark.parametrize("measure", [per_sample_gradients, losses])
def test_weights_that_bitsandbytes_has_packed_are_refused_and_others_stay_as_they_are(measure: Any) -> None:
    model = with_lora(llama(), ["q_proj"])
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    layer.support_avx512bf16_for_cpu = True  # type: ignore[assignment]
    measure(model, text_batch())
    assert layer.support_avx512bf16_for_cpu is False
    layer.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"4-bit weights of .*down_proj are packed .* load it again"):
        measure(model, text_batch())


class ByFunctions(nn.Module):
    """Has no layers; its sums are added in another order when the rows are odd in number, as kernels of GPUs may."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        table, output = (torch.randn(64, 64, generator=generator) for _ in range(2))
        self.table, self.output = nn.Parameter(table.bfloat16()), nn.Parameter(output.bfloat16())
        self.config = SimpleNamespace(max_position_embeddings=64)

    def forward(self, input_ids: Tensor, **_options: Any) -> Any:
        states = nn.functional.embedding(input_ids, self.table)
        if len(states) % 2:
            halves = zip(states.chunk(2, dim=-1), self.output.chunk(2, dim=-1), strict=True)
            return SimpleNamespace(logits=sum(part @ weight.T for part, weight in halves))
        return SimpleNamespace(logits=states @ self.output.T)


@pytest.mark.filterwarnings("ignore::icons.gradients.capture.SlowerPathWarning")
def test_half_precision_whose_noise_cannot_be_measured_is_not_refused_for_it() -> None:
    assert per_sample_gradients(ByFunctions(), text_batch((12, 5, 9, 7))).any()
