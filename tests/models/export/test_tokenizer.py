"""The exported tokenizer cuts text as SentencePiece does, scores and all."""

from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from icons.models.export.tokenizer import fast_tokenizer

VICUNA = Path(__file__).parents[2] / "data" / "original_llava" / "vicuna-tiny"
SPACED = [" two  spaces   in a row ", "    x", " ", "▁mark"]
TEXTS = ["Hi there", "two  spaces   in a row ", "\n", "a\n\n   b", "ümläut 漢字 🙂", "1234 5", "\t tab", "A bus?\nYes."]
TEXTS += [line for line in Path(__file__).read_text().splitlines() if line and "</s>" not in line]


def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(VICUNA / "tokenizer.model"))


@pytest.mark.parametrize("legacy", [False, True])
def test_ids_are_sentencepieces(legacy: bool) -> None:
    tokenizer, oracle = fast_tokenizer(VICUNA, legacy), pieces()
    for text in TEXTS:
        if legacy or not text.startswith((" ", "▁")):  # which only the old kind puts a mark before
            assert tokenizer.encode(text).ids == [1, *oracle.encode(text)], text
    if legacy:
        assert all(tokenizer.encode(text).ids == [1, *oracle.encode(text)] for text in SPACED)


def test_after_a_special_token_only_the_old_kind_starts_a_new_word() -> None:
    new, old = (fast_tokenizer(VICUNA, legacy).encode("a</s>b").tokens for legacy in (False, True))
    assert "▁" not in new[-1]
    assert any("▁" in token for token in old[old.index("</s>") :])


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_encoded_is_decoded(legacy: bool) -> None:
    tokenizer = fast_tokenizer(VICUNA, legacy)
    for text in TEXTS:
        if "▁" not in text and not text.startswith(" "):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_tokenizer_json_is_taken_as_it_is(tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(VICUNA).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert fast_tokenizer(tmp_path, legacy=True).get_vocab_size() == pieces().get_piece_size()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer there; expected tokenizer.model or tokenizer.json"):
        fast_tokenizer(tmp_path / "nowhere", legacy=True)
