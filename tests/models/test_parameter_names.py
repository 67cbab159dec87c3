"""A parameter is recognised under every name it has been given."""

import pytest

from icons.models.parameter_names import canonical_name, current_name, match_names

CURRENT = {
    "model.layers.3.mlp.up_proj.weight": "model.language_model.layers.3.mlp.up_proj.weight",
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
    "model.norm.weight": "model.language_model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    "language_model.lm_head.weight": "lm_head.weight",
    "language_model.model.layers.0.x": "model.language_model.layers.0.x",
    "multi_modal_projector.linear_1.bias": "model.multi_modal_projector.linear_1.bias",
    "model.mm_projector.0.weight": "model.multi_modal_projector.linear_1.weight",
    "mm_projector.2.bias": "model.multi_modal_projector.linear_2.bias",
    "model.language_model.layers.0.x": "model.language_model.layers.0.x",
    "transformer.h.0.attn.c_attn.weight": "transformer.h.0.attn.c_attn.weight",
}


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize(("old", "new"), CURRENT.items())
def test_current_names(prefix: str, old: str, new: str) -> None:
    assert current_name(prefix + old) == prefix + new


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.language_model.layers.0.q.lora_A.default.weight",
        "base_model.model.model.layers.0.q.lora_A.default.weight",
        "base_model.model.model.layers.0.q.lora_A.weight",
        "base_model.model.language_model.model.layers.0.q.lora_A.weight",
        "model.base_model.model.model.layers.0.q.lora_A.other.weight",
        "_forward_module.model.base_model.model.model.layers.0.q.lora_A.default.weight",
        "module.base_model.model.model.layers.0._fsdp_wrapped_module.q.lora_A.default.weight",
        "model._orig_mod.base_model.model.model.layers.0.q.lora_A.default.weight",
    ],
)
def test_one_spelling_for_every_way_to_save(name: str) -> None:
    assert canonical_name(name) == "model.layers.0.q.lora_A.weight"


def test_leaves_out_a_component_that_only_the_saved_names_have() -> None:
    assert match_names(["net.a.x", "net.b.y"], ["a.x"], "file") == {"a.x": "net.a.x"}
    assert match_names(["a.x", "a.y"], ["a.x"], "file") == {"a.x": "a.x"}


def test_refuses_names_that_are_missing_or_mean_the_same() -> None:
    with pytest.raises(ValueError, match="file: holds nothing for 1 of the 2 parameters of the model, such as c"):
        match_names(["a", "b"], ["a", "c"], "file")
    with pytest.raises(ValueError, match=r"mm_projector.0.weight and .*linear_1.weight both mean the parameter"):
        match_names(["mm_projector.0.weight", "multi_modal_projector.linear_1.weight"], [], "file")
