"""What reads a record for a model: fingerprints of tokenizer, chat template and image processor, for manifests.

A folder whose `preprocessor_config.json` was edited between two runs gives images of another resolution, and rows that
do not belong together; weights and data are the same all the while.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TOKENIZER = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt",
)  # fmt: skip
_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# what a file says about who wrote it, and what is fingerprinted by itself
_LEFT_OUT = ("transformers_version", "_name_or_path", "name_or_path", "chat_template", "tokenizer_file")


def describe_reader(tokenizer: Path, processor: Path | None, chat_template: str | None) -> dict[str, str | None]:
    """SHA-256 (16 hex digits) of each part; None where a model has none.

    Args:
        tokenizer: folder of the tokenizer's files.
        processor: folder of the image processor's settings.
        chat_template: the template in use, where it is the model's own.
    """
    return {
        "tokenizer": _fingerprint(tokenizer, _TOKENIZER),
        "processor": None if processor is None else _fingerprint(processor, _PROCESSOR),
        "chat_template": None if chat_template is None else _digest([chat_template.encode()]),
    }


def _fingerprint(folder: Path, names: Sequence[str]) -> str:
    parts: list[bytes] = []
    for name in names:
        if (folder / name).is_file():
            parts += [name.encode(), _meaning(folder / name)]
    return _digest(parts)


def _meaning(file: Path) -> bytes:
    """A settings file's values whatever their order and spacing; any other file's bytes."""
    content = file.read_bytes()
    if file.suffix != ".json":
        return content
    try:
        values: Any = json.loads(content)
    except ValueError:
        return content
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if name not in _LEFT_OUT}
    return json.dumps(values, sort_keys=True).encode()


def _digest(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
