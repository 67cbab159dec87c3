"""The tokenizer of a model folder, exact where transformers' own conversion of SentencePiece models is not."""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from icons.models.folder import own_code
from icons.models.tensor_files import readable

_WORD = "▁"


class SentencePieceTokenizer(SentencePieceBackend):
    """Llama's SentencePiece tokenizer as transformers 4 had it ("slow"), which LLaVA was trained with.

    transformers 5 converts `tokenizer.model` to merges and loses the pieces' scores: runs of spaces, for one, come out
    differently. Here SentencePiece itself does the work.
    """

    def tokenize(self, text: str, **options: Any) -> list[str]:  # type: ignore[override]
        """Pieces of `text`; with `legacy=False` the word mark is put before the text, not before every part of it."""
        if self.legacy or not text:
            return super().tokenize(text, **options)
        pieces = super().tokenize(_WORD + text.replace(_WORD, " "), **options)
        if len(pieces) > 1 and pieces[0] == _WORD and pieces[1] in self.all_special_tokens:
            return pieces[1:]
        return pieces

    def text_ids(self, text: str) -> list[int]:
        """`self(text).input_ids`, without the detour by pieces."""
        encode, added = self.sp_model.encode, self.added_tokens_encoder
        parts = self.added_pattern.split(text if self.legacy or not text else _WORD + text.replace(_WORD, " "))
        ids: list[int] = []
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(added[part])
            elif part and not self.legacy and part.startswith((_WORD, " ")):
                encoded = encode(self.unk_token + part)[self.unk_pieces :]
                ids += [] if index == 0 and len(parts) > 1 and encoded == [self.word_id] else encoded
            elif part:
                ids += encode(part)
        return self.build_inputs_with_special_tokens(ids)

    @cached_property
    def unk_pieces(self) -> int:
        return len(self.sp_model.encode(self.unk_token))

    @cached_property
    def word_id(self) -> int:
        return int(self.sp_model.piece_to_id(_WORD))

    @cached_property
    def added_pattern(self) -> re.Pattern[str]:
        tokens = sorted(self.added_tokens_encoder, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, tokens))})")

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """A BOS before the text, as Llama has it; no EOS."""
        begin = [] if self.bos_token_id is None else [self.bos_token_id]
        return begin + token_ids_0 + (begin + token_ids_1 if token_ids_1 else [])


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The folder's tokenizer: `tokenizer.model` by SentencePiece where there is no `tokenizer.json`, else its own.

    Raises:
        FileNotFoundError: the folder holds no tokenizer.
        ValueError: the tokenizer is code of the folder's own, which is not trusted.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")):
        raise FileNotFoundError(f"{folder}: no tokenizer there; expected tokenizer.model or tokenizer.json")
    if not (folder / "tokenizer.model").is_file() or _is_other(folder):
        with own_code(folder), readable(folder, "a tokenizer"):
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    settings = _read_settings(folder)
    tokens = {name: content(settings.get(name, default)) for name, default in _SPECIAL.items()}
    make: Any = SentencePieceTokenizer
    sampling = settings.get("sp_model_kwargs") or {}
    if strange := sorted(set(sampling) - _SAMPLING):  # SentencePiece would read another file of that name
        raise ValueError(
            f"{folder}: tokenizer_config.json sets {strange[0]} of SentencePiece; expected no more than "
            f"{', '.join(sorted(_SAMPLING))}: take it out of sp_model_kwargs"
        )
    with readable(folder / "tokenizer.model", "a SentencePiece model"):
        tokenizer: Any = make(
            vocab_file=str(folder / "tokenizer.model"),
            legacy=settings.get("legacy", True),
            model_max_length=settings.get("model_max_length", 2048),
            sp_model_kwargs=sampling,
            **{name: token for name, token in tokens.items() if token is not None},
        )
    # unk, as LLaVA pads; a pad token that was added for Hugging Face is no piece, and would get another token's id here
    pad = content(settings.get("pad_token"))
    known = pad is not None and tokenizer.sp_model.piece_to_id(pad) != tokenizer.sp_model.unk_id()
    tokenizer.pad_token = pad if known else tokenizer.unk_token
    return tokenizer


_SAMPLING = {"alpha", "enable_sampling", "nbest_size"}
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer")


def _is_other(folder: Path) -> bool:
    """Whether the folder's tokenizer is not Llama's SentencePiece one; `legacy` is what only that has."""
    settings = _read_settings(folder)
    kind = settings.get("tokenizer_class", _LLAMA[0])
    return kind not in _LLAMA and not (kind == "PreTrainedTokenizerFast" and "legacy" in settings)


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return settings


def content(token: Any) -> str | None:
    return token["content"] if isinstance(token, dict) else token
