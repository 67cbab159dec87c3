"""Other image-text models through the whole data path: folder, own processor, batches, per-sample gradients, store."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from transformers.utils import logging

from icons.batch import IGNORE_INDEX, model_inputs, sample_losses
from icons.cli import main
from icons.datamodules.chat.processor import load_processor
from icons.datamodules.datamodule import ConversationDataModule
from icons.datamodules.preprocessing import Preprocessing
from icons.gradients import per_sample_gradients
from icons.models.folder import ModelFolder
from icons.models.loading import load_model
from icons.models.lora import LoraSettings
from icons.modules.extractor import GradientExtractor
from icons.modules.gradient_writer import GradientWriter
from icons.projection import Identity
from icons.store import GradientStore

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
    "image_size": 16,
}  # fmt: skip
ANSWERS = ("A red bus.", "there", "Yes", "No, it is ü.", "Both")


def chatml(mark: str) -> str:
    """The chat template of these models' kind, with their own mark for an image."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        f"{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{mark}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def tokenizer_of(template: str, special: Any, **options: Any) -> PreTrainedTokenizerFast:
    """One token per byte, after the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={sign: place for place, sign in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>", extra_special_tokens=special, **options
    )
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def save_parts(folder: Path, tokenizer: Any, images: Any, processor: str, **settings: Any) -> None:
    """As the models' own folders are: the processor's class is named beside the image processor's settings."""
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processor_class": processor}))
    if settings:
        (folder / "processor_config.json").write_text(json.dumps(settings | {"processor_class": processor}))


def qwen_tokenizer(folder: Path, processor: str) -> dict[str, Any]:
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = tokenizer_of(chatml("<|vision_start|><|image_pad|><|vision_end|>"), marks)
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    save_parts(folder, tokenizer, images, processor)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(marks), strict=True))
    return {"text_config": TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope}, **ids}


def qwen2_vl(folder: Path) -> Any:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    common = qwen_tokenizer(folder, "Qwen2VLProcessor")
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(**common, vision_config=vision | {"spatial_merge_size": 2}))


def qwen2_5_vl(folder: Path) -> Any:
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 24}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "window_size": 16}
    common = qwen_tokenizer(folder, "Qwen2_5_VLProcessor")
    config = Qwen2_5_VLConfig(**common, vision_config=vision | {"fullatt_block_indexes": [1]})
    return Qwen2_5_VLForConditionalGeneration(config)


def idefics3(folder: Path) -> Any:
    places = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places]
    tokenizer = tokenizer_of(chatml("<image>"), marks)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    save_parts(folder, tokenizer, images, "Idefics3Processor", image_seq_len=4)
    text = TEXT | {"model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = Idefics3Config(text_config=text, vision_config=VISION, image_token_id=image, scale_factor=2)
    return Idefics3ForConditionalGeneration(config)


def gemma3(folder: Path) -> Any:
    marks = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = tokenizer_of("{{ bos_token }}" + chatml("<start_of_image>"), marks, bos_token="<bos>")
    images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template).save_pretrained(
        folder
    )
    image, begin, end = tokenizer.convert_tokens_to_ids(list(marks.values()))
    text = TEXT | {"vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 16, "pad_token_id": 256}
    config = Gemma3Config(
        text_config=text,
        vision_config=VISION | {"vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=image,
        boi_token_index=begin,
        eoi_token_index=end,
    )
    return Gemma3ForConditionalGeneration(config)


MODELS: list[Callable[[Path], Any]] = [qwen2_vl, qwen2_5_vl, idefics3, gemma3]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity_warning()
    logging.enable_progress_bar()


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> ModelFolder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        request.param(tmp_path / "model").save_pretrained(tmp_path / "model")
    return ModelFolder.open(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An image, none, two of other sizes in two turns, a missing one, and one mark for two images' record."""
    generator = torch.Generator().manual_seed(0)
    for number, size in enumerate([(40, 20), (16, 16), (20, 40)]):
        pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    turns = [["<image>\nWhat?", ANSWERS[0]], ["Hi", ANSWERS[1]], ["<image>\nSame?", ANSWERS[2], "<image>\nNow?"]]
    turns += [["<image>\nGone?", "x"], ["<image>\n<image>\nWhich?", ANSWERS[4]]]
    turns[2].append(ANSWERS[3])
    images: list[Any] = ["0.png", None, ["1.png", "2.png"], "gone.png", ["2.png", "0.png"]]
    records = [
        {"conversations": [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]}
        | ({"image": image} if image else {})
        for texts, image in zip(turns, images, strict=True)
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def test_the_answers_are_supervised_and_nothing_else(folder: ModelFolder, data: Path) -> None:
    datamodule = ConversationDataModule(data, data.parent, model_folder=folder)
    for row, answers in ((0, ANSWERS[:1]), (1, ANSWERS[1:2]), (2, ANSWERS[2:4]), (4, ANSWERS[4:])):
        sample = datamodule.dataset[row]
        kept = sample["labels"] != IGNORE_INDEX
        assert torch.equal(sample["labels"][kept], sample["input_ids"][kept])
        said = datamodule.dataset.tokenizer.decode(sample["labels"][kept])
        assert said == "".join(f"{answer}<|im_end|>" for answer in answers)


@pytest.mark.filterwarnings("error::icons.gradients.capture.SlowerPathWarning")
@pytest.mark.parametrize(
    "targets", [None, r".*((q|v)_proj|qkv|fc1|mlp\.0|mlp\.(gate|up)_proj)"], ids=["text", "tower too"]
)
def test_gradients_through_the_whole_path_are_those_of_each_sample_alone(
    folder: ModelFolder, data: Path, tmp_path: Path, targets: str | None
) -> None:
    model = load_model(folder, lora=LoraSettings(rank=2, alpha=4.0, targets=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert any("lora_" in name for name, _ in model.named_parameters() if "vis" in name) == (targets is not None)
    datamodule = ConversationDataModule(data, data.parent, model_folder=folder, batch_size=4)
    trainer = Trainer(
        callbacks=[GradientWriter(tmp_path / "a.zarr", dtype="float32")],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        inference_mode=False,
        use_distributed_sampler=False,
    )
    trainer.predict(GradientExtractor(model, Identity()), datamodule=datamodule, return_predictions=False)
    store = GradientStore.open(tmp_path / "a.zarr")
    assert store.status[:].tolist() == [1, 1, 1, 3, 1]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch = datamodule.dataset.collate([datamodule.dataset[row] for row in range(5)])
    together = per_sample_gradients(model, batch)
    for place, row in enumerate(batch["row"].tolist()):
        alone = datamodule.dataset.collate([datamodule.dataset[row]])
        logits = model(**model_inputs(alone), use_cache=False).logits
        loss = sample_losses(logits, alone["labels"]).sum()
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        expected = torch.cat([part.flatten() for part in gradient])
        assert (together[place] - expected).norm() < 2e-5 * expected.norm()
        stored = torch.from_numpy(store.gradients[:][row])
        assert (stored - expected).norm() < 2e-5 * expected.norm()


def test_warm_up_takes_every_kind_of_row_and_is_exported(folder: ModelFolder, data: Path, tmp_path: Path) -> None:
    """Batches with images, without, and mixed; the exit status tells that the fit went to its end."""
    few = [
        "--lora-rank",
        "2",
        "--lora-alpha",
        "4",
        "--min-rows",
        "1",
        "--held-out",
        "0",
        "--seed",
        "1",
        "--max-failed",
        "1",
    ]
    words = ["--model", folder.model, "--data", data, "--images", tmp_path, "--out", tmp_path / "warmup"]
    for batch_size in (1, 4):
        out = tmp_path / f"warmup-{batch_size}"
        words[-1] = out
        more = ["--batch-size", str(batch_size), "--trainer.accelerator", "cpu"]
        assert main(["warmup", *map(str, words), *few, *more, "--trainer.enable_progress_bar", "false"]) == 0
        assert (out / "icons.json").is_file()
    assert main(["export", "--checkpoint", str(out), "--out", str(tmp_path / "merged")]) == 0
    merged = ModelFolder.open(tmp_path / "merged")
    dataset = ConversationDataModule(data, data.parent, model_folder=merged).dataset
    batch = model_inputs(dataset.collate([dataset[row] for row in range(5)]))
    logits = [model(**batch).logits for model in (load_model(merged), load_model(folder, adapter=out))]
    assert torch.allclose(*logits, atol=1e-5)


def test_a_processor_for_videos_too_says_that_torchvision_is_missing(tmp_path: Path) -> None:
    qwen2_vl(tmp_path / "model").save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"Qwen2VLProcessor works without its part for videos, .* torchvision"):
            load_processor(tmp_path / "model")


def test_a_processor_that_needs_a_package_names_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(chatml("<image>"), ["<image>"])
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    save_parts(tmp_path, tokenizer, images, "SmolVLMProcessor")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "smolvlm"}))
    with pytest.raises(ValueError, match=r"needs a package that is not installed .*(num2words|torchvision)"):
        load_processor(tmp_path)


def test_processor_options_set_the_resolution_and_are_recorded(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "qwen"
    qwen2_vl(folder).save_pretrained(folder)
    line = ["inspect", str(data), "--images", str(data.parent), "--model", str(folder), "--row", "0"]
    assert main(line) == 0
    wide = pixels_shown(capsys.readouterr().out)
    for asked in (["--processor.max_pixels", "64"], ["--processor", "{max_pixels: 64}"]):
        assert main([*line, *asked]) == 0
        assert pixels_shown(capsys.readouterr().out) < wide
    assert main([*line, "--processor.max_pixel", "64"]) == 1
    error = capsys.readouterr().err
    assert "--processor.max_pixel: Qwen2VLImageProcessor" in error and "has no such setting; expected one of" in error
    assert main([*line, "--processor.size", "[1, 2]"]) == 1
    assert "does not take size [1, 2]" in capsys.readouterr().err

    settings = Preprocessing(processor={"max_pixels": 64})
    module = ConversationDataModule(data, data.parent, model_folder=ModelFolder.open(folder), preprocessing=settings)
    assert module.describe()["preprocessing"]["processor"] == {"max_pixels": 64}
    assert Preprocessing.from_dict(settings.as_dict()) == settings
    assert "processor" not in Preprocessing().as_dict()
    images = Qwen2VLImageProcessorPil.from_pretrained(folder, max_pixels=64)
    record = module.dataset.conversation(0)
    oracle = images([module.dataset.images.open(image) for image in record.images], return_tensors="pt")
    assert torch.equal(module.dataset[0]["pixel_values"], oracle["pixel_values"])

    text = LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=300))
    tokenizer_of(chatml(""), []).save_pretrained(tmp_path / "text")
    text.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=r"--processor .*: .*text is a text model"):
        ConversationDataModule(data, None, model_folder=ModelFolder.open(tmp_path / "text"), preprocessing=settings)


def test_a_row_whose_image_is_cut_names_the_options_that_help(data: Path, tmp_path: Path) -> None:
    qwen2_vl(tmp_path / "qwen").save_pretrained(tmp_path / "qwen")
    short = Preprocessing(max_length=12)
    module = ConversationDataModule(
        data, data.parent, model_folder=ModelFolder.open(tmp_path / "qwen"), preprocessing=short
    )
    reason = module.dataset[0]["reason"]
    assert "cuts an image: raise --max-length" in reason and "(--processor.max_pixels)" in reason


def pixels_shown(said: str) -> int:
    """Rows of `pixel_values` that `icons inspect` names."""
    return int(said.partition("pixel_values [")[2].partition(",")[0])
