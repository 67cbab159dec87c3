"""A model folder's tokenizer as one `tokenizer.json`: what exported models bring, and any version of tokenizers reads.

transformers 5 converts a SentencePiece model without the scores of its pieces, so that runs of spaces, for one, are cut
differently from training; here merges are ranked by score.
"""

from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from icons.models.tensor_files import readable

_WORD = "▁"


def fast_tokenizer(folder: Path, legacy: bool) -> Tokenizer:
    """The folder's `tokenizer.json`, or its SentencePiece `tokenizer.model` converted.

    Args:
        folder: of a Llama or Vicuna.
        legacy: of SentencePiece models: a word mark is put before every part between special tokens, not before the
            whole text alone.

    Raises:
        FileNotFoundError: there is neither.
    """
    if (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder / "tokenizer.model", legacy)
    if (folder / "tokenizer.json").is_file():
        with readable(folder / "tokenizer.json", "a tokenizer"):
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
    raise FileNotFoundError(f"{folder}: no tokenizer there; expected tokenizer.model or tokenizer.json")


def _from_sentencepiece(file: Path, legacy: bool) -> Tokenizer:
    """A BPE tokenizer with the pieces of a SentencePiece model (Llama's kind: BPE, bytes for unknown characters)."""
    with readable(file, "a SentencePiece model"):
        pieces: Any = SentencePieceProcessor(model_file=str(file))
    vocabulary = {pieces.id_to_piece(number): number for number in range(pieces.get_piece_size())}
    scores = {piece: pieces.get_score(number) for piece, number in vocabulary.items()}
    unknown, begin, end = (pieces.id_to_piece(number) for number in (pieces.unk_id(), pieces.bos_id(), pieces.eos_id()))
    model = models.BPE(vocabulary, _merges(vocabulary, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_WORD), normalizers.Replace(" ", _WORD)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_WORD, prepend_scheme="first", split=False)
    space = [decoders.Replace(_WORD, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(space)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, vocabulary[begin])]
    )
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in (unknown, begin, end)])
    return tokenizer


def _merges(vocabulary: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, the piece with the highest score first, as SentencePiece joins them.

    >>> _merges({"a": 0, "b": 1, "ab": 2, "aab": 3}, {"a": -9.0, "b": -9.0, "ab": -2.0, "aab": -1.0})
    [('a', 'ab'), ('a', 'b')]
    """
    pairs = [
        (-scores[piece], number, piece[:cut], piece[cut:])
        for piece, number in vocabulary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]
