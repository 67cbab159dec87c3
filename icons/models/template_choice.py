"""What `--template auto` means for a LLaVA: told by its tokenizer and chat template, never by numbers that happen to
fit."""

import json
from pathlib import Path
from typing import Any

from icons.output import read_object

LLAMA_3 = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
_OTHER_CHATS = {"<|im_start|>", "<start_of_turn>"}
_VICUNA_ROLE = "ASSISTANT"  # in Vicuna's chat template as llava-hf and `icons export` write it
_VICUNA_SYSTEM = "A chat between a curious"  # how v1's system prompt begins
_UNKNOWN = ""


def template_of(text: dict[str, Any], model: Path, original: bool) -> str:
    """The conversation template that a LLaVA was trained with, as far as its files tell.

    In order: MPT is trained with `mpt`; a name with `llama-2` means `llama_2`, which is LLaVA's own rule; the special
    tokens of Llama 3 mean `llama_3`, as xtuner trains; Llama's SentencePiece tokenizer, or Vicuna's chat template,
    means `v1`; any other chat template is the model's own (`chat`), also one that has Vicuna's role names and ends
    answers itself but writes no system prompt. In LLaVA's original layout the chat template is only the base model's,
    and comes after the tokenizer.

    Args:
        text: the language model's config.
        model: its folder.
        original: whether the folder is in LLaVA's own layout.

    Returns:
        The template's name; empty if nothing tells.
    """
    settings = read_object(model / "tokenizer_config.json")
    known = _special_tokens(model, settings)
    if text.get("model_type") == "mpt":
        return "mpt"
    if "llama-2" in model.name.lower() or "llama2" in model.name.lower():
        return "llama_2"
    if known >= LLAMA_3:
        return "llama_3"
    written = chat_template(model, settings)
    sentencepiece = (model / "tokenizer.model").is_file() or str(settings.get("tokenizer_class")).startswith("Llama")
    vicuna = sentencepiece and not known & _OTHER_CHATS
    if written and not (original and vicuna):
        return "v1" if _is_vicuna(written) else "chat"
    return "v1" if vicuna else _UNKNOWN


def _is_vicuna(written: str) -> bool:
    """llava-hf's chat template leaves out both v1's system prompt and its end of answers: it is no model's own."""
    ends_answers = "eos_token" in written or "</s>" in written
    return _VICUNA_ROLE in written and (_VICUNA_SYSTEM in written or not ends_answers)


def _special_tokens(model: Path, settings: dict[str, Any]) -> set[str]:
    """The added tokens that a tokenizer's files name; the big `tokenizer.json` is read only where others name none."""
    tokens = {content(token) for token in (settings.get("added_tokens_decoder") or {}).values()}
    tokens |= set(read_object(model / "added_tokens.json"))
    for token in read_object(model / "special_tokens_map.json").values():
        tokens |= {content(part) for part in (token if isinstance(token, list) else [token])}
    if not tokens:
        tokens = {content(token) for token in read_object(model / "tokenizer.json").get("added_tokens") or []}
    return tokens


def chat_template(model: Path, settings: dict[str, Any]) -> str:
    """The text of the folder's chat template; empty without one."""
    if (model / "chat_template.jinja").is_file():
        return (model / "chat_template.jinja").read_text()
    template = settings.get("chat_template") or read_object(model / "chat_template.json").get("chat_template") or ""
    return template if isinstance(template, str) else json.dumps(template)


def content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
