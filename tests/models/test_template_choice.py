"""The template of a LLaVA follows from its tokenizer's files, whatever the size of its vocabulary."""

import json
from pathlib import Path
from typing import Any

import pytest

import icons
from icons.models.export.processor import CHAT_TEMPLATE
from icons.models.template_choice import template_of

LLAMA_3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = "<|im_start|>{{ role }}"
OWN = "USER: {{ q }} ASSISTANT: {{ a }}{{ eos_token }}"
VICUNA = "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"


def folder(tmp_path: Path, **files: Any) -> Path:
    """`sentencepiece`, `tokens` (in `place`), `template` (in `file`)."""
    found = tmp_path / files.get("name", "m")
    found.mkdir()
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if files.get("sentencepiece"):
        (found / "tokenizer.model").write_bytes(b"")
        settings["tokenizer_class"] = "LlamaTokenizer"
    tokens, place = files.get("tokens", []), files.get("place", "tokenizer_config.json")
    if place == "tokenizer_config.json":
        settings["added_tokens_decoder"] = {str(n): {"content": token} for n, token in enumerate(tokens)}
    elif place == "tokenizer.json":
        (found / place).write_text(json.dumps({"added_tokens": [{"content": token} for token in tokens]}))
    elif place == "added_tokens.json":
        (found / place).write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    else:
        (found / place).write_text(json.dumps({"additional_special_tokens": tokens, "bos_token": {"content": "<s>"}}))
    if "template" in files:
        file = files.get("file", "tokenizer_config.json")
        if file == "tokenizer_config.json":
            settings["chat_template"] = files["template"]
        else:
            text = files["template"] if file.endswith("jinja") else json.dumps({"chat_template": files["template"]})
            (found / file).write_text(text)
    (found / "tokenizer_config.json").write_text(json.dumps(settings))
    return found


@pytest.mark.parametrize(
    ("files", "original", "template"),
    [
        ({"sentencepiece": True}, True, "v1"),
        ({"sentencepiece": True}, False, "v1"),
        ({"sentencepiece": True, "template": VICUNA}, False, "v1"),
        ({"template": VICUNA, "file": "chat_template.jinja"}, False, "v1"),
        ({"template": VICUNA, "file": "chat_template.json"}, False, "v1"),
        ({"template": OWN, "file": "chat_template.jinja"}, False, "chat"),
        ({"template": "A chat between a curious user and ... " + OWN, "file": "chat_template.jinja"}, False, "v1"),
        ({"template": CHATML, "tokens": ["<|im_start|>"]}, False, "chat"),
        ({"template": CHATML, "tokens": ["<|im_start|>"], "sentencepiece": True}, True, "chat"),
        ({"template": [{"name": "default", "template": CHATML}]}, False, "chat"),
        ({"sentencepiece": True, "template": "[INST]"}, False, "chat"),
        ({"sentencepiece": True, "template": "[INST]"}, True, "v1"),
        ({"tokens": LLAMA_3}, True, "llama_3"),
        ({"tokens": LLAMA_3, "place": "tokenizer.json"}, True, "llama_3"),
        ({"tokens": LLAMA_3, "place": "added_tokens.json"}, True, "llama_3"),
        ({"tokens": LLAMA_3, "place": "special_tokens_map.json"}, False, "llama_3"),
        ({"tokens": LLAMA_3[:2]}, False, ""),
        ({"sentencepiece": True, "name": "llava-llama-2-7b"}, True, "llama_2"),
        ({}, True, ""),
        ({}, False, ""),
    ],
)
@pytest.mark.parametrize("vocabulary", [512, 32000, 128256, 152000])
def test_the_template_is_what_the_tokenizers_files_tell(
    tmp_path: Path, files: dict[str, Any], original: bool, template: str, vocabulary: int
) -> None:
    config = {"model_type": "llama", "vocab_size": vocabulary}
    assert template_of(config, folder(tmp_path, **files), original) == template


def test_mpt_has_its_own(tmp_path: Path) -> None:
    assert template_of({"model_type": "mpt"}, folder(tmp_path, template=CHATML), True) == "mpt"


def test_the_demos_start_model_keeps_its_own_template_and_what_export_writes_is_v1(tmp_path: Path) -> None:
    start = Path(icons.__file__).parent / "configs" / "demo_start"
    config = json.loads((start / "config.json").read_text())
    assert template_of(config["text_config"], start, False) == "chat"
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    assert template_of({}, tmp_path, False) == "v1"


def test_broken_files_tell_nothing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("[1")
    (tmp_path / "added_tokens.json").write_text("[]")
    assert template_of({}, tmp_path, False) == ""
