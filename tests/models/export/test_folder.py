"""What is exported gives the same logits as model plus adapter, in transformers and in LLaVA's layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from icons.batch import model_inputs
from icons.choices import Layout
from icons.datamodules.chat.templates import IMAGE_PLACE, token_ids
from icons.datamodules.chat.tokenizer import load_tokenizer
from icons.datamodules.dataset import ConversationDataset
from icons.datamodules.preprocessing import Preprocessing
from icons.datamodules.records import RecordIndex
from icons.models.export.folder import export_model, with_mean_rows
from icons.models.export.processor import SYSTEM
from icons.models.folder import ModelFolder
from icons.models.loading import load_model
from icons.models.lora import LoraSettings

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
    assert prompt.endswith("questions. USER: <image> \nWhat is it? ASSISTANT:")
    inputs = processor(images=Image.new("RGB", (70, 50)), text=prompt, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_index).sum()) == 16
    assert model(**inputs).logits.isfinite().all()
    told = processor.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    )
    assert told.endswith(" USER: a ASSISTANT: b</s>USER: c")


@pytest.mark.parametrize("legacy", [False, True])
def test_exported_processor_gives_the_ids_of_training(llava: ModelFolder, tmp_path: Path, legacy: bool) -> None:
    """By the tokenizer's own chat template and a text with `<image>`, as lmms-eval does, and by the list of parts."""
    shutil.copytree(llava.model, tmp_path / "vicuna")
    settings = json.loads((llava.model / "tokenizer_config.json").read_text()) | {"legacy": legacy}
    (tmp_path / "vicuna" / "tokenizer_config.json").write_text(json.dumps(settings))
    folder = ModelFolder.open(tmp_path / "vicuna", llava.vision_tower, llava.mm_projector)
    export_model(folder, None, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    asked, answer, more = "What  is\n it?", "A bus.", "Sure?"
    turns = [asked, answer, more]
    as_text = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    as_text[0]["content"] = f"<image>\n{asked}"
    as_parts = [
        {**turn, "content": [{"type": "text", "text": text}]} for turn, text in zip(as_text, turns, strict=True)
    ]
    as_parts[0]["content"].insert(0, {"type": "image"})
    prompts = [
        processor.tokenizer.apply_chat_template(as_text, tokenize=False, add_generation_prompt=True),
        processor.apply_chat_template(as_parts, add_generation_prompt=True),
    ]
    original = f"{SYSTEM} USER: <image>\n{asked} ASSISTANT: {answer}</s>USER: {more} ASSISTANT:"
    wanted = [
        place for token in token_ids(load_tokenizer(folder.model), original, True)
        for place in ([VOCABULARY] * 16 if token == IMAGE_PLACE else [token])
    ]  # fmt: skip
    for prompt in prompts:
        inputs = processor(images=Image.new("RGB", (70, 50)), text=prompt, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == wanted


def test_exported_folder_has_what_transformers_4_vllm_and_lmms_eval_read(
    llava: ModelFolder, adapter: Path, tmp_path: Path
) -> None:
    """As in llava-hf/llava-1.5-7b-hf; read from vllm/model_executor/models/llava.py and clip.py (prefixes
    `language_model.`, `vision_tower.vision_model.`, `multi_modal_projector.`), transformers 4's LlavaConfig and
    processors, and lmms_eval's llava_hf, which takes the tokenizer's chat template."""
    out = tmp_path / "out"
    export_model(llava, adapter, out, dtype="bfloat16")
    with safe_open(out / "model.safetensors", framework="pt") as stored:
        names = set(stored.keys())
        assert stored.metadata() == {"format": "pt"}
    tower = "vision_tower.vision_model."
    some = {
        "language_model.lm_head.weight", "language_model.model.embed_tokens.weight", "language_model.model.norm.weight",
        "language_model.model.layers.1.self_attn.q_proj.weight", "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias", f"{tower}embeddings.class_embedding", f"{tower}pre_layrnorm.weight",
        f"{tower}encoder.layers.2.mlp.fc1.weight",
    }  # fmt: skip
    assert some <= names
    prefixes = ("language_model.lm_head.", "language_model.model.", "multi_modal_projector.", tower)
    assert all(name.startswith(prefixes) for name in names)
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llava", ["LlavaForConditionalGeneration"])
    assert config["image_token_index"] == VOCABULARY and config["image_seq_length"] == 16
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-2, "default")
    assert (config["projector_hidden_act"], config["multimodal_projector_bias"]) == ("gelu", True)
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "bfloat16"
    text = config["text_config"]
    assert (text["model_type"], text["vocab_size"], text["rope_theta"]) == ("llama", 640, 10000.0)
    assert (text["rope_scaling"], config["vision_config"]["model_type"]) == (None, "clip_vision_model")
    assert str(tmp_path) not in json.dumps(config) and "_name_or_path" not in json.dumps(config)
    pixels = json.loads((out / "preprocessor_config.json").read_text())
    assert pixels["image_processor_type"] == "CLIPImageProcessor" and pixels["crop_size"] == {"height": 56, "width": 56}
    processor = json.loads((out / "processor_config.json").read_text())
    assert processor["processor_class"] == "LlavaProcessor" and "image_processor" not in processor
    assert (processor["patch_size"], processor["num_additional_image_tokens"]) == (14, 1)
    tokens = json.loads((out / "tokenizer_config.json").read_text())
    assert tokens["tokenizer_class"] == "PreTrainedTokenizerFast" and tokens["pad_token"] == "<pad>"
    template = (out / "chat_template.jinja").read_text()
    assert template == tokens["chat_template"] == json.loads((out / "chat_template.json").read_text())["chat_template"]
    fast = json.loads((out / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in fast["added_tokens"]}
    assert (added["<image>"], added["<pad>"]) == (VOCABULARY, VOCABULARY + 1)


def test_a_rope_of_its_own_is_written_as_transformers_4_reads_it(llava: ModelFolder, tmp_path: Path) -> None:
    """Llama-3's, which an older reader would otherwise take for 10,000."""
    shutil.copytree(llava.model, tmp_path / "model")
    config = json.loads((llava.model / "config.json").read_text()) | {"rope_theta": 500000.0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    folder = ModelFolder.open(tmp_path / "model", llava.vision_tower, llava.mm_projector)
    export_model(folder, None, tmp_path / "out")
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 500000.0
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").config.text_config
    assert again.rope_parameters["rope_theta"] == 500000.0


def test_an_exported_model_is_trained_on_as_the_original(llava: ModelFolder, original: Path, tmp_path: Path) -> None:
    export_model(llava, None, tmp_path / "out")
    found = ModelFolder.open(tmp_path / "out")
    assert load_tokenizer(found.model).pad_token_id != found.image_token_id  # padding is no image
    sets = [
        ConversationDataset(RecordIndex(original / "data.json"), original, folder, Preprocessing("v1"))
        for folder in (llava, found)
    ]
    for row in range(3):
        first, second = (dataset[row] for dataset in sets)
        assert first["input_ids"].masked_fill(first["input_ids"] == -200, VOCABULARY).tolist() == (
            second["input_ids"].tolist()
        )
        assert torch.equal(first["labels"], second["labels"])


def test_llavas_layout_has_what_its_loader_reads(llava: ModelFolder, adapter: Path, tmp_path: Path) -> None:
    """Read from llava/model/builder.py, llava_arch.py, clip_encoder.py, on transformers 4.37."""
    out = tmp_path / "llava-merged"
    export_model(llava, adapter, out, layout="llava", dtype="float16")
    config = json.loads((out / "config.json").read_text())
    wanted = {
        "model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 16,
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "image_aspect_ratio": "pad", "mm_vision_tower": str(out / "vision_tower"),
        "torch_dtype": "float16",
    }  # fmt: skip
    assert {name: config[name] for name in wanted} == wanted
    assert "rope_parameters" not in config and "dtype" not in config
    with safe_open(out / "model.safetensors", framework="pt") as stored:
        names = set(stored.keys())
    assert {f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")} <= names
    assert all(name.startswith(("model.layers.", "model.mm_projector.")) or name in {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    } for name in names)  # fmt: skip
    with safe_open(out / "vision_tower" / "model.safetensors", framework="pt") as stored:
        assert all(name.startswith("vision_model.") for name in stored.keys())  # noqa: SIM118
    tower = json.loads((out / "vision_tower" / "config.json").read_text())
    assert (tower["model_type"], tower["architectures"]) == ("clip_vision_model", ["CLIPVisionModel"])
    pixels = json.loads((out / "vision_tower" / "preprocessor_config.json").read_text())
    assert pixels["image_processor_type"] == "CLIPImageProcessor"
    assert (out / "tokenizer.model").is_file()  # its tokenizer is the slow one


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
    with pytest.raises(ValueError, match=r"full: holds file, and is no former output of this command"):
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


def test_an_export_leaves_nothing_of_a_former_one_in_another_layout_and_what_is_the_users(
    llava: ModelFolder, tmp_path: Path
) -> None:
    def files(folder: Path) -> set[str]:
        return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}

    both, layouts = tmp_path / "both", get_args(Layout)
    fresh: dict[str, set[str]] = {}
    for layout in (*layouts, layouts[0]):
        export_model(llava, None, both, layout)
        if layout not in fresh:
            export_model(llava, None, tmp_path / layout, layout)
            fresh[layout] = files(tmp_path / layout)
            (both / "notes.txt").write_text("mine")
        assert files(both) == fresh[layout] | {"notes.txt"}
    assert fresh["llava"] - fresh["huggingface"] and fresh["huggingface"] - fresh["llava"]


def test_mean_rows_are_never_the_most_likely() -> None:
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    scores = torch.randn(50, 8, generator=torch.Generator().manual_seed(1)) @ with_mean_rows(weight, 32).T
    assert int(scores.argmax(dim=1).max()) < 20
