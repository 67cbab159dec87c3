"""Tokenizers and model folders for the tests of data."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"]


def byte_tokenizer(image: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """One token per byte, after the special tokens: no vocabulary to learn, any text has ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={sign: place for place, sign in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|begin_of_text|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens=[*SPECIAL, *(["<image>"] if image else [])],
        model_max_length=2048,
        **options,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A text model's folder, as far as data are concerned."""
    folder = tmp_path / "text-model"
    byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300, "hidden_size": 32}))
    return folder


@pytest.fixture
def image_text_folder(tmp_path: Path) -> Path:
    """An image-text model's folder, as far as data are concerned: LLaVA-NeXT, whose images vary in tokens."""
    folder = tmp_path / "image-text-model"
    tokenizer = byte_tokenizer(image=True)
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML,
        image_token="<image>",
    ).save_pretrained(folder)
    token = tokenizer.convert_tokens_to_ids("<image>")
    config = {"model_type": "llava_next", "vision_config": {}, "text_config": {}, "image_token_index": token}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
