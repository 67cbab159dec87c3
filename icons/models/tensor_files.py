"""Tensor files: weights read by name from safetensors and PyTorch files, whole or only what is asked for."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from icons.output import whole_file

SHOWN = 3
_AGAIN = "copy or download it again"


@contextmanager
def readable(what: Path, expected: str, remedy: str = _AGAIN) -> Iterator[None]:
    """Around what reads a file or folder: whatever a library makes of a broken one is a single line.

    Raises:
        ValueError: in place of any error that is not about this machine (files that are not there, memory, packages).
    """
    try:
        yield
    except (OSError, MemoryError, ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # pickle, safetensors, tokenizers and SentencePiece each have their own
        said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        reason = ", ".join(_foreign_objects(what)[:SHOWN]) or said
        raise ValueError(f"{what}: cannot be read as {expected} ({reason}); {remedy}") from error


def _foreign_objects(file: Path) -> list[str]:
    """The kinds of Python objects in a PyTorch file for which it is not read."""
    with suppress(Exception):  # whatever is wrong with the file: it cannot be read, which is said already
        return [f"it holds a {name}" for name in torch.serialization.get_unsafe_globals_in_checkpoint(file)]
    return []


def load_data(file: Path, expected: str, remedy: str = _AGAIN, mapped: bool = True) -> Any:
    """What a PyTorch file holds, read as data alone.

    Args:
        file: to be read.
        expected: what it should be, for the message.
        remedy: what to do if it is not.
        mapped: into memory, so that what is not looked at costs nothing; False: read whole, so that whoever writes to
            the file afterwards changes nothing of what was read.

    Raises:
        ValueError: it is broken, or holds Python objects, which are named.
    """
    with readable(file, expected, remedy):
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except RuntimeError:  # written by torch < 1.6: not mappable
            return torch.load(file, map_location="cpu", weights_only=True)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, whole or not at all: the same tensors and metadata are the same bytes. (safetensors
    writes the entries of metadata in an order of chance.)"""
    with whole_file(file) as partial:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial, dict(metadata))
        if len(metadata) > 1:
            with partial.open("r+b") as written:
                _order_metadata(written)


def _order_metadata(file: BinaryIO) -> None:
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    assert len(ordered) == size, "the same entries, spelled alike"
    file.seek(8)
    file.write(ordered)


def read_tensors(file: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of one file whose name is `wanted`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a file of tensors.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected weights")
    if file.suffix == ".safetensors":
        with readable(file, "weights"), safe_open(str(file), framework="pt") as stored:
            return {name: stored.get_tensor(name) for name in stored.keys() if wanted(name)}  # noqa: SIM118
    content = load_data(file, "weights")
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {name: value for name, value in content.items() if isinstance(value, Tensor) and wanted(name)}


def find_tensors(folder: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The wanted tensors among all weight files of a model folder; safetensors first, else PyTorch files."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file, wanted)
    return tensors
