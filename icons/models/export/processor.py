"""The processor of an exported LLaVA: tokenizer with `<image>` and `<pad>`, image processor, chat template.

Written as `llava-hf/*` have it, file by file, so that transformers 4 and 5, vLLM and lmms-eval read it alike.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, CLIPImageProcessorPil

from icons.models.base_weights import quiet
from icons.models.export.tokenizer import fast_tokenizer
from icons.models.folder import ModelFolder, own_code

_IMAGE, _PAD = "<image>", "<pad>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# LLaVA's v1 conversation; content as text, or as transformers' list of images and texts. MARK: what follows an image
CHAT_TEMPLATE = (
    "{% if not messages or messages[0]['role'] != 'system' %}" + SYSTEM + "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' USER: ' if loop.first or messages[loop.index0 - 1]['role'] == 'system' "
    "else 'USER: ' }}{% elif message['role'] == 'assistant' %}{{ ' ASSISTANT: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] | replace('<image>\n', '<image>MARK\n') }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>MARK\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def write_processor(folder: ModelFolder, config: Any, out: Path, trust_remote_code: bool) -> tuple[int, int]:
    """Writes the files of tokenizer and processor.

    Token ids are those of training: LLaVA tokenises the text after an image on its own, which puts a word mark before
    it. The exported tokenizer does so by itself where the model's is of the old kind (`legacy`), and by a space in the
    chat template where it is not.

    Args:
        folder: an original LLaVA.
        config: the exported model's.
        out: the folder.
        trust_remote_code: whether the tokenizer may be code of the model's folder.

    Returns:
        The ids of `<image>` and `<pad>`.
    """
    assert folder.vision_tower is not None
    settings_file = folder.model / "tokenizer_config.json"
    saved: dict[str, Any] = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
    sentencepiece, legacy = (folder.model / "tokenizer.model").is_file(), bool(saved.get("legacy", True))
    tokenizer = fast_tokenizer(folder.model, legacy)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (_IMAGE, _PAD)])
    tokenizer.save(str(out / "tokenizer.json"))
    with quiet(), own_code(folder.model):
        own: Any = AutoTokenizer.from_pretrained(folder.model, trust_remote_code=trust_remote_code)
    template = own.chat_template
    if folder.template == "v1":
        template = CHAT_TEMPLATE.replace("MARK", "" if legacy or not sentencepiece else " ")
    special = {"bos_token": own.bos_token, "eos_token": own.eos_token, "unk_token": own.unk_token, "pad_token": _PAD}
    special = {name: token for name, token in special.items() if token is not None}
    values = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "LlavaProcessor",
        "model_max_length": saved.get("model_max_length", folder.max_length),
        "padding_side": "left",  # for batches of prompts, as in llava-hf
        "clean_up_tokenization_spaces": False,
    }
    if sentencepiece:  # for whoever tokenises exactly as in training, this package first
        shutil.copyfile(folder.model / "tokenizer.model", out / "tokenizer.model")
        values["legacy"] = legacy
    write(out / "special_tokens_map.json", special)
    write(out / "tokenizer_config.json", values | ({"chat_template": template} if template else {}))
    if template:
        (out / "chat_template.jinja").write_text(template)
        write(out / "chat_template.json", {"chat_template": template})
    CLIPImageProcessorPil.from_pretrained(folder.vision_tower, trust_remote_code=False).save_pretrained(out)
    pixels = json.loads((out / "preprocessor_config.json").read_text())
    write(out / "preprocessor_config.json", pixels | {"processor_class": "LlavaProcessor"})
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": _IMAGE,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1,  # CLIP's class token: without, the processor counts one image token too few
    }
    write(out / "processor_config.json", processor)
    image, pad = tokenizer.token_to_id(_IMAGE), tokenizer.token_to_id(_PAD)
    assert image is not None and pad is not None
    return image, pad


def write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
