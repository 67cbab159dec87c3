"""Adapters other than LoRA, with dropout of ranks: rows equal one backward pass per sample, and depend on no chance."""

import warnings
from typing import Any

import peft
import pytest
import torch
from small_models import SMALL, assert_rows_close, one_by_one, text_batch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from icons.gradients import per_sample_gradients
from icons.gradients.capture import SlowerPathWarning

TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
KINDS: dict[str, peft.PeftConfig] = {
    "LoKr": peft.LoKrConfig(r=3, rank_dropout=0.5, module_dropout=0.5, **TARGETS),
    "LoKr, both factors decomposed": peft.LoKrConfig(r=2, decompose_both=True, rank_dropout=0.5, **TARGETS),
    "LoHa": peft.LoHaConfig(r=3, rank_dropout=0.5, module_dropout=0.5, **TARGETS),
    "DoRA": peft.LoraConfig(r=3, use_dora=True, lora_dropout=0.5, **TARGETS),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "IA3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "OFT": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0, module_dropout=0.5),
}


def adapted(kind: str) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**SMALL | {"num_hidden_layers": 1})), KINDS[kind])
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_another_kind(kind: str) -> None:
    model, batch = adapted(kind).eval(), text_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerPathWarning)
        found = per_sample_gradients(model, batch)
    assert_rows_close(found, one_by_one(model, batch))


@pytest.mark.parametrize("kind", ["LoKr", "LoHa"])
def test_ranks_that_drop_out_are_refused(kind: str) -> None:
    """No `nn.Dropout` says so: the draw itself is seen."""
    model = adapted(kind).train()
    with pytest.raises(
        ValueError, match=r"PeftModel drew random numbers in its forward pass \(\d+ modules in train mode"
    ):
        per_sample_gradients(model, text_batch())
