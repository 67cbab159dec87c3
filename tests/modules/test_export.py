"""What is exported gives the same logits as model plus adapter, in transformers and in LLaVA's layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from icons.batch import model_inputs
from icons.model_folder import ModelFolder
from icons.modules.export import export_model, with_mean_rows
from icons.modules.lora import LoraSettings
from icons.modules.model import load_model

Batches = Callable[..., dict[str, Any]]
VOCABULARY = 620


def logits(folder: ModelFolder, batch: dict[str, Any], adapter: Path | None = None) -> Tensor:
    with torch.no_grad():
        return load_model(folder, adapter=adapter)(**model_inputs(batch)).logits


def same(got: Tensor, wanted: Tensor) -> None:
    """W + BA in one product or in two: equal up to float32's rounding."""
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


def test_original_model_to_huggingface(llava: ModelFolder, adapter: Path, tmp_path: Path, make_batch: Batches) -> None:
    export_model(llava, adapter, tmp_path / "merged")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    batch = make_batch([0, 1, 2], image_token=theirs.config.image_token_index)
    with torch.no_grad():
        found = theirs(**model_inputs(batch)).logits
    same(found[..., :VOCABULARY], logits(llava, make_batch([0, 1, 2]), adapter))
    assert found.shape[-1] == theirs.config.text_config.vocab_size == 640
    assert int(found.argmax(dim=-1).max()) < VOCABULARY  # what was added is never the most likely
    assert not list((tmp_path / "merged").glob("adapter*"))
    ours = ModelFolder.open(tmp_path / "merged")
    assert torch.equal(logits(ours, batch), found)


def test_exported_processor_counts_image_tokens_as_the_model(llava: ModelFolder, tmp_path: Path) -> None:
    export_model(llava, None, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt.endswith("questions. USER: <image>\nWhat is it? ASSISTANT:")
    inputs = processor(images=Image.new("RGB", (70, 50)), text=prompt, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == 16
    assert model(**inputs).logits.isfinite().all()
    told = processor.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    )
    assert told.endswith(" USER: a ASSISTANT: b</s>USER: c")


def test_original_model_to_llava(llava: ModelFolder, adapter: Path, tmp_path: Path, make_batch: Batches) -> None:
    export_model(llava, adapter, tmp_path / "llava-merged", layout="llava")
    found = ModelFolder.open(tmp_path / "llava-merged")
    assert (found.layout, found.vision_tower, found.image_token_id) == (
        "original",
        tmp_path / "llava-merged" / "vision_tower",
        -200,
    )
    batch = make_batch([0, 1, 2])
    same(logits(found, batch), logits(llava, batch, adapter))
    config = json.loads((tmp_path / "llava-merged" / "config.json").read_text())
    assert config["model_type"] == "llava_llama"
    assert config["vocab_size"] == VOCABULARY
    assert (tmp_path / "llava-merged" / "tokenizer.model").is_file()


def test_there_and_back_again(llava: ModelFolder, adapter: Path, tmp_path: Path, make_batch: Batches) -> None:
    """To Hugging Face, whose vocabulary is longer, and back to LLaVA's: the very same weights."""
    export_model(llava, adapter, tmp_path / "hf")
    export_model(ModelFolder.open(tmp_path / "hf"), None, tmp_path / "back", layout="llava")
    export_model(llava, adapter, tmp_path / "straight", layout="llava")
    models = [load_model(ModelFolder.open(tmp_path / name)).state_dict() for name in ("back", "straight")]
    assert all(torch.equal(models[0][name], value) for name, value in models[1].items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"], config["pad_token_id"]) == (10000.0, None, 0)


def test_huggingface_model_keeps_its_files_and_vocabulary(huggingface_llava: Path, tmp_path: Path) -> None:
    (huggingface_llava / "tokenizer.json").write_text("{}")
    (huggingface_llava / "optimizer.pt").write_bytes(b"")
    folder = ModelFolder.open(huggingface_llava)
    model = load_model(folder, lora=LoraSettings(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "adapter")  # type: ignore[operator]
    export_model(folder, tmp_path / "adapter", tmp_path / "merged")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[1, 99, 99, 99, 99, 5, 6]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same(theirs(input_ids=ids, pixel_values=pixels).logits, model(input_ids=ids, pixel_values=pixels).logits)
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "merged" / "optimizer.pt").exists()
    with pytest.raises(ValueError, match=r"is merged into .* already"):
        load_model(ModelFolder.open(tmp_path / "merged"), adapter=tmp_path / "adapter")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_of_the_export(llava: ModelFolder, adapter: Path, tmp_path: Path, dtype: Any) -> None:
    export_model(llava, adapter, tmp_path / "out", dtype=dtype)
    model = load_model(ModelFolder.open(tmp_path / "out"), dtype="stored")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_sampling_settings_that_transformers_would_refuse(llava: ModelFolder, tmp_path: Path) -> None:
    """Vicuna's own generation_config.json has a temperature and does not sample."""
    shutil.copytree(llava.model, tmp_path / "vicuna")
    (tmp_path / "vicuna" / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    folder = ModelFolder.open(tmp_path / "vicuna", llava.vision_tower, llava.mm_projector)
    export_model(folder, None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["do_sample"] is True


def test_refuses_a_full_folder_and_llavas_layout_for_other_models(llava: ModelFolder, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="full: is not empty; expected a new folder"):
        export_model(llava, None, tmp_path / "full")
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "text")
    text = ModelFolder.open(tmp_path / "text")
    with pytest.raises(ValueError, match=r"is no LLaVA \(text model\); expected --format huggingface"):
        export_model(text, None, tmp_path / "out", layout="llava")
    export_model(text, None, tmp_path / "copy")
    assert torch.equal(
        *(load_model(ModelFolder.open(tmp_path / name))(torch.tensor([[1, 2]])).logits for name in ("text", "copy"))
    )


def test_mean_rows_are_never_the_most_likely() -> None:
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    scores = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) @ with_mean_rows(weight, 32).T
    assert int(scores.argmax(dim=1).max()) < 20
