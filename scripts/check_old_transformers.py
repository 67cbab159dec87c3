"""Exports of seven families, read by the transformers 4 of another environment: are the logits the same?

    python -m venv old && old/bin/pip install torch "transformers==4.57.*" safetensors
    python scripts/check_old_transformers.py old/bin/python

A tiny random model of each family with a rotary embedding of its own, exported with a merged adapter; the other
environment loads it by transformers' auto classes. Exit status 1 where logits differ by more than 1e-4.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from icons.models.export.folder import export_model
from icons.models.folder import ModelFolder
from icons.models.loading import load_model

READ = """
import sys, torch, transformers
kind = "AutoModelForCausalLM" if sys.argv[2] == "text" else "AutoModelForImageTextToText"
model = getattr(transformers, kind).from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(3, 63)[None]).logits, sys.argv[3])
print(transformers.__version__)
"""
SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
THETA = {"rope_theta": 1e6, "rope_type": "default"}
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MROPE = {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [1, 1, 2]}
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip


def families() -> dict[str, Any]:
    """Name -> tiny random model."""
    qwen_vl = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32, "num_heads": 2}
    gemma = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
    gemma |= {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    return {
        "llama": tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, rope_parameters=THETA)),
        "llama3": tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, rope_parameters=LLAMA_3)),
        "qwen2": tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, rope_parameters=THETA)),
        "qwen3": tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZES, head_dim=8, rope_parameters=THETA)),
        "gemma3": tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(
                **SIZES, head_dim=8, sliding_window=16, rope_parameters=gemma,
                layer_types=["sliding_attention", "full_attention"],
            )
        ),
        "qwen2_5_vl": tf.Qwen2_5_VLForConditionalGeneration(
            tf.Qwen2_5_VLConfig(text_config=SIZES | {"rope_parameters": MROPE}, vision_config=vision, **qwen_vl)
        ),
        "llava": tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                text_config=tf.LlamaConfig(**SIZES, rope_parameters=THETA), vision_config=CLIP, image_token_index=99
            )
        ),
    }  # fmt: skip


def main(python: str) -> int:
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        (place := Path(name)).joinpath("read.py").write_text(READ)
        torch.manual_seed(0)
        for family, model in families().items():
            base, out = place / family, place / f"{family}-out"
            model.save_pretrained(base)
            folder = ModelFolder.open(base)
            export_model(folder, None, out)
            with torch.no_grad():
                wanted = load_model(folder)(input_ids=torch.arange(3, 63)[None]).logits
            command = [python, str(place / "read.py"), str(out), folder.kind, str(place / "logits")]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{family:12} {done.stderr.strip().splitlines()[-1]}")
                worst = float("inf")
                continue
            found = torch.load(place / "logits", weights_only=True)
            difference = float((found - wanted).abs().max())
            worst = max(worst, difference)
            print(f"{family:12} transformers {done.stdout.strip()}: logits differ by {difference:.1e} at most")
    return int(not worst < 1e-4)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
