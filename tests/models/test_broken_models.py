"""Model files that are broken, hostile, or of another size: one line each, whatever library reads them."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from icons.datamodules.chat.tokenizer import load_tokenizer
from icons.models.adam_state.checkpoints import load
from icons.models.export.tokenizer import fast_tokenizer
from icons.models.folder import ModelFolder
from icons.models.loading import load_model
from icons.models.tensor_files import read_tensors
from icons.modules.fit import check_resumable

DATA = Path(__file__).parents[1] / "data" / "original_llava"
RAN: list[str] = []


class Hostile:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return RAN.append, ("ran",)


CONTENTS = {
    "empty": b"",
    "a text": b"not a tensor",
    "a page": b"<html>" * 100,
    "half a zip": b"PK\x03\x04" + bytes(30),
    "a pickle that is cut": pickle.dumps({"a": 1})[:-2],
    "a pickle without its stack": b"\x80\x02.",
    "a pickle of a bad opcode": b"\x80\x02\xff\xff.",
    "a pickle of code": pickle.dumps({"a": Hostile()}),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_a_broken_pickle_is_one_line_wherever_it_is_read(content: bytes, tmp_path: Path) -> None:
    for name, read in (("pytorch_model.bin", read_tensors), ("last.ckpt", check_resumable), ("optimizer.pt", load)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as ") as caught:
            read(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
    assert RAN == []


@pytest.fixture
def vicuna(tmp_path: Path) -> Path:
    shutil.copytree(DATA / "vicuna-tiny", tmp_path / "vicuna")
    return tmp_path / "vicuna"


@pytest.mark.parametrize("content", [b"", b"junk" * 50, b"\x0a\x05\x0a\x03"], ids=["empty", "junk", "a bad message"])
def test_a_junk_tokenizer_is_one_line(content: bytes, vicuna: Path) -> None:
    (vicuna / "tokenizer.model").write_bytes(content)
    for read in (load_tokenizer, lambda folder: fast_tokenizer(folder, legacy=True)):
        with pytest.raises(ValueError, match=r"tokenizer.model: cannot be read as a SentencePiece model") as caught:
            read(vicuna)
        assert len(str(caught.value).splitlines()) == 1
    (vicuna / "tokenizer.model").unlink()
    (vicuna / "tokenizer.json").write_bytes(content)
    for read in (load_tokenizer, lambda folder: fast_tokenizer(folder, legacy=True)):
        with pytest.raises(ValueError, match="cannot be read as a tokenizer") as caught:
            read(vicuna)
        assert len(str(caught.value).splitlines()) == 1


def test_a_tokenizers_settings_do_not_lead_to_another_file(vicuna: Path) -> None:
    file = vicuna / "tokenizer_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(settings | {"sp_model_kwargs": {"model_file": "/etc/hostname"}}))
    with pytest.raises(ValueError, match=r"sets model_file of SentencePiece; expected no more than alpha"):
        load_tokenizer(vicuna)
    file.write_text(json.dumps(settings | {"sp_model_kwargs": {"enable_sampling": False}}))
    assert load_tokenizer(vicuna)("hi").input_ids


def test_weights_of_another_shape_are_one_line(vicuna: Path) -> None:
    file = next(iter(sorted(vicuna.glob("*.safetensors"))), None)
    tensors = load_file(file) if file else torch.load(next(vicuna.glob("*.bin")), weights_only=True)
    for old in [*vicuna.glob("*.safetensors"), *vicuna.glob("*.bin"), *vicuna.glob("*.index.json")]:
        old.unlink()
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(dict(tensors) | {name: torch.zeros(3, 5)}, vicuna / "model.safetensors", {"format": "pt"})
    folder = ModelFolder.open(vicuna, DATA / "clip", DATA / "mm_projector.bin")
    with pytest.raises(ValueError, match=r"vicuna: cannot be read as a model, or its weights do not fit") as caught:
        load_model(folder)
    assert len(str(caught.value).splitlines()) == 1
    (vicuna / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"vicuna: cannot be read as a model") as caught:
        load_model(folder)
    assert len(str(caught.value).splitlines()) == 1
