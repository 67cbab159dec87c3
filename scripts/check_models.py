"""Per-sample gradients of every causal architecture of transformers, in float32, bfloat16 and float16.

Each is made small from its own config class, with random weights, and its rows are compared with one backward pass per
sample, alone and unpadded: with an adapter in each layer, and with all weights trained. In float32 they must be equal
to 1e-4. In half precision no two ways of summing are; there the measure is the float32 gradient of the same rounded
weights: a row may be twice as far from it as the plain half-precision gradient of that sample alone.

    python scripts/check_models.py                       # all of them: ten minutes on one core
    python scripts/check_models.py llama gemma3n_text --train full --dtypes float32 bfloat16 --verbose

Prints a line for each that is refused, warned about or wrong, and for each that cannot be made so small or does not run
so itself; then how many there were of each. Exit status 1 if a row is wrong.
"""

import argparse
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from icons.batch import model_inputs, sample_losses
from icons.gradients import per_sample_gradients

LARGEST = 8_000_000  # parameters: what has more was not made small
_FFN = r"(moe_|mlp_|ffn_|shared_|expert_|dense_)*(intermediate|ffn)_(size|dim|hidden_size)(_mlp)?"
SIZES: dict[str, Any] = {
    r"vocab_size(_per_layer_input)?|n_vocab|text_vocab_size": 64,
    r"hidden_size|d_model|n_embd|dim|embedding_size|word_embed_proj_dim|hidden_dim|lru_width|emb_dim|block_dim": 32,
    rf"{_FFN}|d_ff|n_inner|(en|de)coder_ffn_dim|(moe_)?shared_expert_intermediate_size": 48,
    r"num_(hidden_)?layers|n_layers?|(en|de)coder_layers|num_blocks": 2,
    r"num_(attention_)?heads|n_heads?|(en|de)coder_attention_heads|mamba_n(um)?_heads|linear_num_(key|value)_heads": 4,
    r"num_(global_)?key_value_heads|num_kv_heads|multi_query_group_num|n_kv_heads": 2,
    r"(global_|v_|qk_nope_|index_)?head_dim|kv_channels|linear_(key|value)_head_dim|(kv|q|o)_lora_rank": 8,
    r"qk_rope_head_dim|rotary_dim": 4,
    r"qk_head_dim": 12,
    r"(moe_)?num_(local_|routed_)?experts|n_routed_experts": 4,
    r"num_experts_per_tok|moe_k|moe_topk|(moe_)?top_k(_experts)?": 2,
    r"n_group|topk_group|num_expert_group|(moe_)?n(um)?_shared_experts": 1,
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1,
    r"max_position_embeddings|n_positions|n_ctx|max_seq(uence)?_len(gth)?|context_length": 64,
    r"sliding_window|attention_window_size|window_size|local_attention": 8,
    r"pad_token_id": 0,
    r"bos_token_id": 1,
    r"eos_token_id": 2,
    r"\w*dropout\w*|\w*_pdrop|router_jitter_noise|layerdrop": 0.0,
}
"""What numbers of a config become, by name."""
CHANGES: dict[str, dict[str, Any]] = {
    "axk1": {"head_dim": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v3": {"head_dim": 4},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma3n": {"num_kv_shared_layers": 0},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "kimi_linear": {"num_experts_per_tok": 2, "num_experts_per_token": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"hidden_size": 16, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "plbart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "youtu": {"head_dim": 4},
    "zaya": {"num_experts_per_tok": 1},
}
"""What some want beside that."""


def small_config(kind: str) -> Any:
    """The config of this architecture's text model with few layers, heads, experts and tokens."""
    text = AutoConfig.for_model(kind).get_text_config(decoder=True)
    changes = dict(_shrunk(text.to_dict()))
    if "kv_lora_rank" in changes:  # each head has keys of its own
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    return type(text)(**changes | CHANGES.get(kind, {}))


def _shrunk(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        new = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)
        if new is not None and value is not None and not isinstance(value, bool):
            yield name, [new] * 2 if isinstance(value, list) else float(new) if isinstance(value, float) else new
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type", "block_types") and value:
            yield name, (list(dict.fromkeys(value)) * 2)[:2]


def model_of(kind: str, train: str) -> nn.Module:
    """The same weights each time.

    Raises:
        ValueError: it is not small.
    """
    torch.manual_seed(0)
    config = small_config(kind)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"it has {size:,} parameters; expected at most {LARGEST:,}: more of its sizes belong in SIZES")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(model)
    if train == "lora":
        # PEFT refuses the first two in a Mamba, which reads their weights itself
        chosen = LoraConfig(r=3, target_modules="all-linear", exclude_modules=r".*(out_proj|conv1d|router)")
        return adapted(model, chosen)
    return model


def randomize(model: nn.Module) -> None:
    """Weights as large as those of a trained model, so that no layer is without influence."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15 / max(1, parameter[0].numel() / 32) ** 0.5)


def adapted(model: Any, lora: LoraConfig) -> nn.Module:
    """With an adapter that is not zero, as a fresh one is."""
    wrapped: nn.Module = get_peft_model(model, lora).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def text_batch(lengths: tuple[int, ...] = (12, 5, 9), padded: int = 14) -> dict[str, Tensor]:
    ids = torch.randint(3, 64, (len(lengths), padded), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(padded) < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~mask, -100)
    labels[:, :3] = -100
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels}


def one_by_one(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """One `torch.autograd.grad` for each sample, alone and unpadded; float32."""
    rows = []
    for sample, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
        single = {name: value[sample : sample + 1, :length] for name, value in batch.items()}
        loss = sample_losses(model(**model_inputs(single), use_cache=False).logits, single["labels"]).sum()
        rows.append(row_of(model, loss))
    return torch.stack(rows)


def row_of(model: nn.Module, loss: Tensor) -> Tensor:
    """The loss's gradient, flat, in float32; zeros where a weight has no influence."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([gradient.flatten().float() for gradient in zeros])


def check(kind: str, train: str, dtype: torch.dtype) -> tuple[str, str]:
    """`right`, `warned`, `refused`, `wrong` or `cannot`, and what there is to say."""
    batch = text_batch()
    try:
        model = model_of(kind, train).to(dtype)
        plain, true = one_by_one(model, batch), one_by_one(model_of(kind, train).to(dtype).float(), batch)
    except Exception as error:
        return "cannot", f"{type(error).__name__}: {error}"
    return judged(model, batch, plain, true)


def judged(model: nn.Module, batch: Any, plain: Tensor, true: Tensor) -> tuple[str, str]:
    """The batch's rows beside the plain gradients in the model's precision, and those in float32."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = per_sample_gradients(model, batch)
        except Exception as error:
            return "refused", f"{type(error).__name__}: {error}"
    size = true.norm(dim=1).clamp(min=1e-7)
    error, usual = ((rows - true).norm(dim=1) / size for rows in (found, plain))
    allowed = torch.full_like(usual, 1e-4) if next(model.parameters()).dtype == torch.float32 else 2 * usual + 2e-3
    pairs = zip(error.tolist(), usual.tolist(), strict=True)
    figures = ", ".join(f"{one:.1e} (plain {two:.1e})" for one, two in pairs)
    said = [str(one.message) for one in caught if type(one.message).__module__.startswith("icons.")]
    if not bool((error <= allowed).all()):  # NaN is wrong too
        return "wrong", " ".join([figures, *said])
    return ("warned", " ".join(said)) if said else ("right", figures)


class Outcomes:
    """How many there were of each, printed line by line: those that are right only if asked for."""

    def __init__(self, verbose: bool) -> None:
        self.verbose, self.counts = verbose, Counter[str]()

    def add(self, outcome: str, text: str, kind: str, train: str, dtype: str) -> None:
        self.counts[outcome] += 1
        if outcome != "right" or self.verbose:
            print(f"{outcome:8} {kind:24} {train:5} {dtype:9} {on_a_line(text)}", flush=True)

    def ended(self) -> int:
        """Prints them; the exit status."""
        print(", ".join(f"{count} {outcome}" for outcome, count in sorted(self.counts.items())))
        return int(self.counts["wrong"] > 0)


def on_a_line(text: str) -> str:
    return " ".join(text.split())[:200]


def given_by(words: list[str] | None, about: str | None, kinds: list[str]) -> argparse.Namespace:
    """The command line: these kinds unless it names others."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=kinds)
    parser.add_argument("--train", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--verbose", action="store_true", help="a line for each that is right, too")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    given = given_by(words, __doc__, sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    logging.set_verbosity_error()
    outcomes = Outcomes(given.verbose)
    for kind in given.kinds:
        for train in given.train:
            for dtype in given.dtypes:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    outcomes.add(*check(kind, train, getattr(torch, dtype)), kind, train, dtype)
    return outcomes.ended()


if __name__ == "__main__":
    sys.exit(main())
