"""Full fine-tuning of models whose layers are not Llama's: every weight's rows equal one backward pass per sample."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import SMALL, assert_rows_close, one_by_one, text_batch
from torch import nn
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    FalconConfig,
    FalconForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from icons.gradients import per_sample_gradients
from icons.gradients.capture import SlowerPathWarning

ONE_LAYER: dict[str, Any] = SMALL | {"num_hidden_layers": 1}


def falcon() -> nn.Module:
    return FalconForCausalLM(FalconConfig(**ONE_LAYER, new_decoder_architecture=True, num_kv_heads=2))


def gemma_3n() -> nn.Module:
    config = Gemma3nTextConfig(
        **SMALL | {"intermediate_size": [48, 48]}, head_dim=8, num_key_value_heads=2, num_kv_shared_layers=0,
        vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, laurel_rank=4,
        activation_sparsity_pattern=[0.5, 0.0], layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3nForCausalLM(config)


def llama_4() -> nn.Module:
    config = Llama4TextConfig(
        **SMALL,
        intermediate_size_mlp=48,
        num_local_experts=2,
        head_dim=8,
        num_key_value_heads=2,
        interleave_moe_layer_step=2,
    )
    return Llama4ForCausalLM(config)


def chameleon() -> nn.Module:
    quantizer = {
        "embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1],
        "num_res_blocks": 1, "resolution": 16,
    }  # fmt: skip
    config = ChameleonConfig(
        **ONE_LAYER, num_key_value_heads=4, vq_config=quantizer, vocabulary_map={"<image>": 63, "IMGIMGA": 5}
    )
    model = ChameleonForConditionalGeneration(config)
    model.model.vqmodel.requires_grad_(False)
    return model


def phimoe() -> nn.Module:
    return PhimoeForCausalLM(PhimoeConfig(**ONE_LAYER, num_local_experts=2, num_key_value_heads=2))


@pytest.mark.parametrize("make", [falcon, gemma_3n, llama_4, chameleon, phimoe], ids=lambda make: make.__name__)
def test_every_weight_of_a_model_with_unusual_layers(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, batch = make().eval(), text_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowerPathWarning)
        found = per_sample_gradients(model, batch)
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    for block, expected in zip(found.split(sizes, 1), one_by_one(model, batch).split(sizes, 1), strict=True):
        assert_rows_close(block, expected, tolerance=1e-4)  # of each weight by itself: a small one's error shows too
