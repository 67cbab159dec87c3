"""The tokenizer is SentencePiece's own, where transformers' conversion is not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import PreTrainedTokenizerFast

from icons.datamodules.chat.tokenizer import SentencePieceTokenizer, load_tokenizer

VICUNA = Path(__file__).parents[2] / "data" / "original_llava" / "vicuna-tiny"
TEXTS = ["Hi there", " two  spaces   in a row ", "", "\n", "a\n\nb", "ümläut 漢字 🙂", "1234 5", "▁mark", "\t tab"]


def folder_with(tmp_path: Path, **changes: Any) -> Path:
    shutil.copy(VICUNA / "tokenizer.model", tmp_path)
    settings = json.loads((VICUNA / "tokenizer_config.json").read_text()) | changes
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_legacy_ids_are_sentencepieces(text: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, legacy=True))
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(VICUNA / "tokenizer.model"))
    assert tokenizer(text).input_ids == [1, *oracle.encode(text)]


@pytest.mark.parametrize("text", ["Hi there", " two  spaces   in a row ", "a\n\nb", "1234 5"])
def test_new_ids_are_sentencepieces_where_no_special_token_comes_before(text: str) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(VICUNA / "tokenizer.model"))
    assert load_tokenizer(VICUNA)(text).input_ids == [1, *oracle.encode(text)]


def test_after_a_special_token_only_the_old_way_starts_a_new_word(tmp_path: Path) -> None:
    new, old = load_tokenizer(VICUNA), load_tokenizer(folder_with(tmp_path, legacy=True))
    assert "▁" not in new.convert_ids_to_tokens(new("a</s>b").input_ids)[-1]
    assert new.legacy is False
    assert old.legacy is True
    assert old.convert_ids_to_tokens(old("a</s>b").input_ids)[3].startswith("▁")


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        *TEXTS,
        "a</s>b",
        "<unk>",
        "<s> x",
        " ",
        "a </s> b</s></s>",
        "</s>",
        " </s>a",
        "▁ ▁a",
        "ASSISTANT: Yes",
        " <",
        "unk>",
    ],
)
def test_the_short_way_to_ids_gives_the_same(text: str, legacy: bool, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, legacy=legacy))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.text_ids(text) == tokenizer(text).input_ids


def test_without_a_pad_token_it_is_unk_as_in_llava(tmp_path: Path) -> None:
    assert load_tokenizer(folder_with(tmp_path, pad_token=None)).pad_token_id == 0


def test_special_tokens_may_be_written_as_objects(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_with(tmp_path, bos_token={"content": "<s>", "lstrip": False}))
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.bos_token_id == 1


def test_text_is_cut_at_the_models_length(tmp_path: Path) -> None:
    assert load_tokenizer(folder_with(tmp_path, model_max_length=7)).model_max_length == 7


def test_a_folder_with_its_own_tokenizer_keeps_it(text_folder: Path) -> None:
    tokenizer = load_tokenizer(text_folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.decode(tokenizer("Hi <|im_end|>").input_ids) == "Hi <|im_end|>"


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer there; expected tokenizer\.model or tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_padding_that_was_added_for_hugging_face_is_unk_as_in_training(tmp_path: Path) -> None:
    """llava-hf folders name `<pad>`, which is no piece: it must not take the id of `<image>`."""
    tokenizer = load_tokenizer(folder_with(tmp_path, pad_token="<pad>"))
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 0
    assert len(tokenizer) == 620
