"""What transformers 5 names anew is written under the old names too, and reads itself back the same."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from icons.models.export.folder import export_model
from icons.models.export.old_settings import old_rope, with_old_settings
from icons.models.folder import ModelFolder

SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
SLIDING = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("rope", "old"),
    [
        ({"rope_type": "default", "rope_theta": 1e6}, {"rope_theta": 1e6, "rope_scaling": None}),
        (
            LINEAR,
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0}},
        ),
        (
            {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1]},
            {"rope_theta": 1e6, "rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [1, 1]}},
        ),
        (
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.5},
        ),
        (
            {"full_attention": {"rope_theta": 1e6}, "sliding_attention": SLIDING},
            {"rope_theta": 1e6, "rope_scaling": None, "rope_local_base_freq": 1e4},
        ),
        ({}, {"rope_theta": 1e4, "rope_scaling": None}),
    ],
)
def test_a_rope_in_the_words_of_transformers_4(rope: dict[str, Any], old: dict[str, Any]) -> None:
    assert old_rope(rope) == old


def test_configs_inside_a_config_get_both_forms_too() -> None:
    values = with_old_settings({"dtype": "float16", "text_config": {"rope_parameters": LINEAR}})
    assert (values["torch_dtype"], values["text_config"]["rope_theta"]) == ("float16", 1e6)
    assert values["text_config"]["rope_parameters"] == LINEAR


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_both_forms_are_read_back_as_one(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    else:
        layers = ["sliding_attention", "full_attention"]
        rope = {"full_attention": LINEAR, "sliding_attention": SLIDING}
        config = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=layers, rope_parameters=rope)
        model = Gemma3ForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    export_model(ModelFolder.open(tmp_path / "model"), None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 1e6
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
        assert torch.equal(found, model.eval()(input_ids=ids).logits)


@pytest.mark.slow
@pytest.mark.skipif(
    "ICONS_TRANSFORMERS_4" not in os.environ, reason="ICONS_TRANSFORMERS_4 names no python with transformers 4"
)
def test_transformers_4_gives_the_same_logits() -> None:
    script = Path(__file__).parents[3] / "scripts" / "check_old_transformers.py"
    subprocess.run([sys.executable, str(script), os.environ["ICONS_TRANSFORMERS_4"]], check=True)
