"""The template `chat`: ids are the tokenizer's own, labels are the answers with their end tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from icons.batch import IGNORE_INDEX
from icons.datamodules.chat.own_template import OwnTemplate
from icons.datamodules.chat.skeleton import TemplateError
from icons.datamodules.chat.templates import IMAGE_PLACE, Turn
from icons.datamodules.chat.tokenizer import SentencePieceTokenizer, load_tokenizer

VICUNA = Path(__file__).parents[2] / "data" / "original_llava" / "vicuna-tiny"
DIALOGUE = [Turn(True, "<image>\nWhat?"), Turn(False, "A dog."), Turn(True, "Sure?"), Turn(False, "Yes")]


def supervised(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> str:
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))
    return str(tokenizer.decode([label for label in labels if label != IGNORE_INDEX]))


def test_ids_are_those_of_apply_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [Turn(True, "What?"), Turn(False, "Ein Hund ü."), Turn(True, "Sure?"), Turn(False, " Yes ")]
    ids, labels = OwnTemplate(tokenizer, "M")(tokenizer, turns, False, 2048)
    messages = [{"role": "user" if turn.human else "assistant", "content": turn.text} for turn in turns]
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert supervised(tokenizer, ids, labels) == "Ein Hund ü.<|im_end|> Yes <|im_end|>"


def test_each_image_is_in_its_place(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [Turn(True, "<image>a<image>"), Turn(False, "b")]
    template = OwnTemplate(tokenizer, "M", "<image>")
    ids, labels = template(tokenizer, turns, True, 2048)
    assert ids.count(IMAGE_PLACE) == 2
    assert tokenizer.decode(ids[: ids.index(IMAGE_PLACE)]) == "<|im_start|>user\n"
    rest = [token for token in ids if token != IMAGE_PLACE]
    assert tokenizer.decode(rest) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert supervised(tokenizer, ids, labels) == "b<|im_end|>"


def test_without_an_image_the_mark_is_text(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [Turn(True, "<image>a"), Turn(False, "b")]
    ids = OwnTemplate(tokenizer, "M", "<image>")(tokenizer, turns, False, 2048).ids
    assert "<image>a" in tokenizer.decode(ids)


def test_an_image_for_a_text_model_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TemplateError, match="the record has an image and the model takes none"):
        OwnTemplate(tokenizer, "M")(tokenizer, DIALOGUE, True, 2048)


def test_a_tokenizer_without_offsets_supervises_the_same() -> None:
    slow = load_tokenizer(VICUNA)
    assert isinstance(slow, SentencePieceTokenizer)
    slow.chat_template = "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} ASSISTANT: {% else %}"
    slow.chat_template += "{{ m.content }}</s>{% endif %}{% endfor %}"
    ids, labels = OwnTemplate(slow, "M", "<image>")(slow, DIALOGUE, True, 2048)
    assert [label for label in labels if label != IGNORE_INDEX] == [
        *slow("A dog.</s>", add_special_tokens=False).input_ids,
        *slow("Yes</s>", add_special_tokens=False).input_ids,
    ]
    assert ids.count(IMAGE_PLACE) == 1


def test_a_system_text_goes_where_the_template_has_a_place(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [Turn(True, "a"), Turn(False, "b")]
    ids, labels = OwnTemplate(tokenizer, "M")(tokenizer, turns, False, 2048, "Be short.")
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\na")
    assert supervised(tokenizer, ids, labels) == "b<|im_end|>"
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(TemplateError, match=r"leaves out the text of message 1 \(system\)"):
        OwnTemplate(tokenizer, "M")(tokenizer, turns, False, 2048, "Be short.")


def test_turns_that_do_not_alternate_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [Turn(True, "a"), Turn(False, "b"), Turn(False, "c")]
    with pytest.raises(TemplateError, match="turn 3 is a second answer in a row"):
        OwnTemplate(tokenizer, "M")(tokenizer, turns, False, 2048)
