"""Templates: ids and labels are the original's, row by row, for all conversations that it was run on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from icons.batch import IGNORE_INDEX
from icons.datamodules.chat.skeleton import TemplateError
from icons.datamodules.chat.templates import IMAGE_PLACE, TEMPLATES, Turn, check_fits, put_image_first
from icons.datamodules.chat.tokenizer import SentencePieceTokenizer

DATA = Path(__file__).parents[2] / "data"
GOLDEN: dict[str, Any] = json.loads((DATA / "golden_llava_masks_tinysp.json").read_text())
NAMES = {"v1": "v1", "llava_llama_2": "llama_2", "plain": "plain"}
MPT: dict[str, Any] = json.loads((DATA / "golden_llava_mpt_masks_bytes.json").read_text())
ROWS = [(run, case) for run, found in GOLDEN.items() for case in found["cases"]]


def sentencepiece(legacy: bool = False) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(
        vocab_file=str(DATA / "original_llava" / "vicuna-tiny" / "tokenizer.model"),
        legacy=legacy,
        model_max_length=2048,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )


@pytest.fixture(scope="module")
def originals() -> dict[bool, SentencePieceTokenizer]:
    return {legacy: sentencepiece(legacy) for legacy in (False, True)}


def turns_of(conversations: Sequence[dict[str, str]], reorder: bool = False) -> list[Turn]:
    turns = [Turn(turn["from"] == "human", turn["value"]) for turn in conversations]
    return [Turn(turn.human, put_image_first(turn.text)) for turn in turns] if reorder else turns


@pytest.mark.parametrize(("run", "case"), ROWS, ids=[f"{run}-{case}" for run, case in ROWS])
def test_golden_row(run: str, case: str, originals: dict[bool, SentencePieceTokenizer]) -> None:
    made, row = GOLDEN[run], GOLDEN[run]["cases"][case]
    assert "reorder=True" in run
    turns = turns_of(row["conversations"], reorder=row["has_image"])
    template = TEMPLATES[NAMES[made["version"]]]
    if "error" in row:  # the original stops there; here the row fails
        with pytest.raises(TemplateError):
            template(originals[made["legacy"]], turns, row["has_image"], made["model_max_length"], None)
        return
    ids, labels = template(originals[made["legacy"]], turns, row["has_image"], made["model_max_length"], None)
    assert ids == row["input_ids"]
    assert labels == row["labels"]


def supervised(tokenizer: Any, ids: Sequence[int], labels: Sequence[int]) -> str:
    assert len(ids) == len(labels)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids, labels, strict=True))
    return str(tokenizer.decode([label for label in labels if label != IGNORE_INDEX]))


DIALOGUE = [Turn(True, "<image>\nWhat?"), Turn(False, "A dog."), Turn(True, "Sure?"), Turn(False, "Yes")]


def test_mpt_supervises_answer_and_end(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = TEMPLATES["mpt"](tokenizer, DIALOGUE, True, 2048, None)
    system = "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    system += "The assistant gives helpful and honest answers.<|im_end|>"
    assert supervised(tokenizer, ids, labels) == "A dog.<|im_end|>Yes<|im_end|>"
    assert tokenizer.decode(ids[: ids.index(IMAGE_PLACE)]) == system + "<|im_start|>user\n"
    assert labels[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("case", MPT)
def test_golden_row_of_mpt(case: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """What `preprocess_mpt` of LLaVA v1.1.3 (of its first version for rows without an image) gives for this tokenizer.

    Later versions supervise no token of any of these conversations.
    """
    row = GOLDEN["tinysp|v1|reorder=True|max2048"]["cases"][case]
    turns = turns_of(row["conversations"], reorder=row["has_image"])
    ids, labels = TEMPLATES["mpt"](tokenizer, turns, row["has_image"], 2048, None)
    assert len(ids) == MPT[case]["num_ids"]
    assert [place for place, token in enumerate(ids) if token == IMAGE_PLACE] == (
        [MPT[case]["image_place"]] if row["has_image"] else []
    )
    expected = [IGNORE_INDEX] * len(ids)
    for begin, end in MPT[case]["supervised"]:
        expected[begin:end] = ids[begin:end]
    assert labels == expected


def test_a_count_that_does_not_add_up_supervises_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    """LLaVA's "tokenization mismatch": here an <|im_end|> inside an answer."""
    turns = [Turn(True, "a"), Turn(False, "b<|im_end|>c")]
    assert set(TEMPLATES["mpt"](tokenizer, turns, False, 2048, None).labels) == {IGNORE_INDEX}


def test_llama_3_supervises_answer_and_eot(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = TEMPLATES["llama_3"](tokenizer, DIALOGUE, True, 2048, None)
    assert supervised(tokenizer, ids, labels) == "A dog.<|eot_id|>Yes<|eot_id|>"
    assert ids.count(IMAGE_PLACE) == 1
    assert ids.count(tokenizer.bos_token_id) == 1
    text = tokenizer.decode([token for token in ids if token != IMAGE_PLACE])
    assert text.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n\nWhat?<|eot_id|>")


def test_llama_3_joins_questions_and_drops_what_has_no_partner(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [Turn(False, "hello"), Turn(True, "a"), Turn(True, "b"), Turn(False, "c"), Turn(True, "d")]
    ids, labels = TEMPLATES["llama_3"](tokenizer, turns, False, 2048, None)
    assert supervised(tokenizer, ids, labels) == "c<|eot_id|>"
    assert "ab<|eot_id|>" in tokenizer.decode(ids)
    assert not tokenizer.decode(ids).endswith("d")


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        ("v1", [Turn(False, "a")], "no question"),
        ("v1", [Turn(True, "a"), Turn(True, "b")], "turn 2 is a second question in a row"),
        ("llama_3", [Turn(True, "a"), Turn(False, "b"), Turn(False, "c")], "turn 3 is a second answer in a row"),
        ("llama_3", [Turn(True, "<image><image>"), Turn(False, "b")], "turn 1 has more than one <image>"),
        ("plain", [Turn(True, "a"), Turn(False, "b")], "two turns, the first with <image>"),
    ],
)
def test_turns_without_a_form_are_refused(
    template: str, turns: list[Turn], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(TemplateError, match=message):
        TEMPLATES[template](tokenizer, turns, True, 2048, None)


@pytest.mark.parametrize(("name", "token"), [("v1", "</s>"), ("llama_2", "<s>"), ("llama_3", None)])
def test_a_template_whose_special_tokens_the_tokenizer_lacks_is_refused(
    name: str, token: str | None, tokenizer: PreTrainedTokenizerFast
) -> None:
    if token is None:
        check_fits(name, tokenizer, "M")
        tokenizer.bos_token = None
        with pytest.raises(ValueError, match="template llama_3: begins with BOS, and M has none"):
            check_fits(name, tokenizer, "M")
        return
    with pytest.raises(ValueError, match=rf"template {name}: writes {token}, which M has no token for .* name another"):
        check_fits(name, tokenizer, "M")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v1", "Be short. USER: What? ASSISTANT: A dog.</s>USER: Sure? ASSISTANT: Yes</s>"),
        (
            "llama_2",
            "[INST] <<SYS>>\nBe short.\n<</SYS>>\n\nWhat? [/INST] A dog. </s><s>[INST] Sure? [/INST] Yes </s>",
        ),
        (
            "mpt",
            "<|im_start|>system\nBe short.<|im_end|><|im_start|>user\nWhat?<|im_end|><|im_start|>assistant\nA dog."
            "<|im_end|><|im_start|>user\nSure?<|im_end|><|im_start|>assistant\nYes<|im_end|>",
        ),
        (
            "llama_3",
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA dog.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYes<|eot_id|>",
        ),
    ],
)
def test_a_system_text_stands_in_place_of_the_templates_own(
    name: str, text: str, tokenizer: PreTrainedTokenizerFast, originals: dict[bool, SentencePieceTokenizer]
) -> None:
    own: Any = tokenizer if name in ("mpt", "llama_3") else originals[True]
    turns = [Turn(True, "What?"), Turn(False, "A dog."), Turn(True, "Sure?"), Turn(False, "Yes")]
    ids, labels = TEMPLATES[name](own, turns, False, 2048, "Be short.")
    assert ids == own(text).input_ids
    assert supervised(own, ids, labels) == supervised(own, *TEMPLATES[name](own, turns, False, 2048, None))


def test_plain_has_no_place_for_a_system_text(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TemplateError, match="the plain template has no place for a system text"):
        TEMPLATES["plain"](tokenizer, DIALOGUE[:2], True, 2048, "Be short.")


def test_a_template_fits_the_tokenizer_it_was_made_for(
    tokenizer: PreTrainedTokenizerFast, originals: dict[bool, SentencePieceTokenizer]
) -> None:
    for name in ("v1", "llama_2", "plain"):
        for original in originals.values():
            check_fits(name, original, "Vicuna")
    check_fits("mpt", tokenizer, "MPT")


@pytest.mark.parametrize(
    ("text", "several", "expected"),
    [
        ("What?\n<image>", False, "<image>\nWhat?"),
        ("<image>a<image>", False, "<image>\na"),
        ("<image>a<image>", True, "<image>\n<image>\na"),
        ("<image>", False, "<image>"),
        (" no mark ", False, " no mark "),
    ],
)
def test_marks_move_to_the_front(text: str, several: bool, expected: str) -> None:
    assert put_image_first(text, several) == expected
