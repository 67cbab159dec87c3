"""The plan's arithmetic, against sizes that are known and sums done by hand."""

import json
import warnings
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from icons.cli.estimate import ModelSize, Plan, Workload, estimate_gradients, estimate_warmup
from icons.cli.estimate.probe import ATTENTION, Kind, dropout, image_operations, operations, peak_memory
from icons.cli.estimate.runs import split
from icons.cli.estimate.speed import device_speed
from icons.cli.estimate.workload import weights
from icons.cli.options.gradients import GradientsOptions
from icons.gradients import per_sample_gradients
from icons.models.loading import checkpoint_layers
from icons.modules.fit import ranks_of

TARGETS = r".*\.(q|k|v|o|gate|up|down)_proj"
VICUNA = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
SMALL = LlamaConfig(
    vocab_size=300, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=128,
)  # fmt: skip
CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2, "image_size": 56, "patch_size": 14}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers 5 in the words of 4


def with_lora(config: LlamaConfig, rank: int) -> nn.Module:
    lora = LoraConfig(r=rank, lora_dropout=0.05, target_modules=TARGETS)
    return get_peft_model(AutoModelForCausalLM.from_config(config), lora).eval()


@pytest.fixture(scope="module")
def vicuna() -> nn.Module:
    """Vicuna-7B with LLaVA's LoRA, without its weights."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return with_lora(VICUNA, 128)


def plan(model: nn.Module, *args: Any, **options: Any) -> Plan:
    return Plan(model, Workload(*args, **options), {}, 1)


def test_a_model_is_counted(vicuna: nn.Module) -> None:
    size = ModelSize.of(vicuna)
    assert (size.trainable, size.language, size.tower) == (319_815_680, 6_738_415_616, 0)
    assert (size.layers, size.dense) == (32, 2 * 32000 * 4096)
    assert size.outside == 4096 and size.largest_unit == 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096


def test_a_vision_tower_is_counted_apart() -> None:
    small = SMALL.to_dict() | {"num_hidden_layers": 1}
    config = LlavaConfig(text_config=small, vision_config=CLIP)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).requires_grad_(False)
    counted, tower = ModelSize.of(model), sum(value.numel() for value in model.model.vision_tower.parameters())
    assert counted.tower == tower and counted.trainable == 0
    assert counted.language == sum(value.numel() for value in model.parameters()) - tower


def test_the_papers_warmup(vicuna: nn.Module) -> None:
    load = plan(vicuna, [600, 1000], batch_size=16, gradient_checkpointing=True)
    run = estimate_warmup(load, num_rows=33_265, ranks=8, accumulate=1, epochs=1, settings={"dim": 1})
    assert run.rows_per_rank == [4159, *[4158] * 7]
    assert run.steps == 260  # 33,265 / 128, rounded up
    assert run.files == {
        "adapter": 4 * 319_815_680, "Adam's moments": 8 * 319_815_680, "last.ckpt": 12 * 319_815_680
    }  # fmt: skip
    assert run.memory["weights"] == 2 * 6_738_415_616 + 4 * 319_815_680
    assert run.memory["gradients and moments"] == 12 * 319_815_680
    assert 20e9 < sum(run.memory.values()) < 80e9  # it is known to fit an A100
    assert 600 < run.seconds < 3600 or torch.cuda.is_available()  # LLaVA's README: 10 hours for all of the data


def test_a_sharded_base_takes_its_share_and_two_whole_layers(vicuna: nn.Module) -> None:
    size = ModelSize.of(vicuna)
    whole, shared = (weights(size, Workload([8], 1, base_shards=ranks))["weights"] for ranks in (1, 8))
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    assert whole - shared == 2 * (6_738_415_616 - 4096) * 7 // 8 - 2 * 2 * layer  # but for the last norm


def test_accumulation_and_epochs_count_steps(vicuna: nn.Module) -> None:
    load = plan(vicuna, [10], batch_size=4)
    run = estimate_warmup(load, num_rows=50, ranks=2, accumulate=3, epochs=2, settings={})
    assert run.steps == 2 * 3  # 25 rows a rank: 7 batches, 3 steps an epoch


@pytest.mark.parametrize(("dtype", "bytes_per_row"), [("float16", 64 * 2 + 17), ("float32", 269), ("int8", 64 + 17)])
def test_a_gradient_store_is_sized(dtype: str, bytes_per_row: int) -> None:
    with torch.device("meta"):
        load = plan(with_lora(SMALL, 2), lengths=[100], batch_size=8)
    run = estimate_gradients(
        load, num_rows=1000, ranks=3, shards=1, chunk_rows=300, dim=64, store_dtype=dtype, moments=False, settings={}
    )
    assert sum(run.files.values()) == 1000 * bytes_per_row
    assert run.rows_per_rank == [600, 300, 300]  # whole units; the last one is shorter
    assert "moments" not in run.memory


def test_what_saves_memory_saves_memory() -> None:
    with torch.device("meta"):
        model = with_lora(SMALL, 2)

    def total(**options: Any) -> int:
        load = plan(model, lengths=[128], batch_size=8, **options)
        run = estimate_warmup(load, num_rows=8, ranks=1, accumulate=1, epochs=1, settings={})
        return sum(run.memory.values())

    plain = total()
    assert total(gradient_checkpointing=True) < plain
    assert total(max_tokens=128) < plain
    assert total(quantize="4bit") < total(quantize="8bit") < plain < total(attention="eager")
    assert plain < total(dtype="float32")


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        (None, max(1, torch.cuda.device_count())),
        ({"devices": 8, "num_nodes": 2}, 16),
        ({"devices": "4"}, 4),
        ({"devices": [0, 2]}, 2),
        ({"devices": "0,2,3"}, 3),
        ({"devices": "auto", "accelerator": "cpu"}, 1),
        ({"devices": -1, "accelerator": "cpu", "num_nodes": 3}, 3),
    ],
)
def test_ranks_are_devices_times_nodes(flags: dict[str, object] | None, ranks: int) -> None:
    assert ranks_of(flags) == ranks


def test_shares_differ_by_one_at_most() -> None:
    assert all(
        sum(split(n, k)) == n and max(split(n, k)) - min(split(n, k)) <= 1 for n in range(9) for k in range(1, 5)
    )


def test_the_time_says_what_it_is_based_on() -> None:
    speed, said = device_speed("float32")
    assert speed > 1e7 and "timed on this" in said


def test_a_plan_is_printed(vicuna: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    load = plan(vicuna, [600], batch_size=16)
    run = estimate_warmup(load, num_rows=100, ranks=8, accumulate=1, epochs=1, settings={"fraction": 0.05})
    run.show(Console(width=120))
    text = capsys.readouterr().out
    for part in (
        "resolved settings",
        "0.05",
        "12 to 13",
        "1.28 GB",
        "memory per GPU",
        "time, about",
        "nothing was written",
    ):
        assert part in text


@pytest.mark.parametrize(("checkpointing", "card"), [(False, 80e9), (True, 48e9)])
def test_the_default_batches_of_a_7b_model_fit_their_card(vicuna: nn.Module, checkpointing: bool, card: float) -> None:
    options = {option.name: option.default for option in fields(GradientsOptions)}
    load = plan(vicuna, [2048], options["batch_size"], options["max_tokens"], gradient_checkpointing=checkpointing)
    run = estimate_gradients(
        load, num_rows=100, ranks=1, shards=1, chunk_rows=100, dim=options["dim"], store_dtype="float16",
        moments=True, signs=1, settings={},
    )  # fmt: skip
    assert run.memory["signs of the projection"] == 4 * 319_815_680
    assert 0.3 * card < sum(run.memory.values()) < 0.9 * card


def allocated(act: Callable[[], Any], file: Path) -> int:
    """Bytes at the peak of a real run, from the allocator's own log."""
    act()  # what is made once is not this run's
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        act()
    log.export_chrome_trace(str(file))
    events = [event["args"] for event in json.loads(file.read_text())["traceEvents"] if event["name"] == "[memory]"]
    totals = [event["Total Allocated"] for event in events]
    return max(totals) - (totals[0] - events[0]["Bytes"])


@pytest.mark.filterwarnings("ignore::UserWarning")  # the profiler's own
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["per-sample", "training"])
def test_a_pass_without_contents_takes_what_a_real_one_takes(kind: Kind, checkpointing: bool, tmp_path: Path) -> None:
    model = with_lora(SMALL, 4)
    with torch.device("meta"):
        empty = with_lora(SMALL, 4)
    if checkpointing:
        checkpoint_layers(model)
    model.train(kind == "training")
    for module in model.modules() if kind == "training" else ():
        if isinstance(module, nn.Dropout):  # as on a GPU: on a CPU masks are floats
            module.forward = partial(dropout, module)
    ids = torch.arange(4 * 128).remainder(290).reshape(4, 128) + 3
    labels = ids.clone()
    labels[:, :64] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "row": torch.arange(4)}

    def training() -> None:
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits[:, 64:]
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 64:].flatten()).backward()
        model.zero_grad()

    act = training if kind == "training" else lambda: per_sample_gradients(model, batch)
    load = Workload([128], 4, dtype="float32", gradient_checkpointing=checkpointing)
    gradients = sum(value.numel() for value in model.parameters() if value.requires_grad) * 4
    real = allocated(act, tmp_path / "log.json") - gradients * (4 if kind == "per-sample" else 1)
    assert peak_memory(empty, kind, 4, 128, load) == pytest.approx(real, rel=0.16)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        act()  # a model with the counter's hooks is proven anew
        before = counter.get_total_flops()
        act()
    assert 4 * operations(empty, kind, 128, load) == pytest.approx(counter.get_total_flops() - before, rel=0.1)
    assert model.training == (kind == "training") and all(value.is_meta for value in empty.parameters())


def test_layers_that_are_not_run_count_like_those_that_are() -> None:
    with torch.device("meta"):
        deep, shallow = (with_lora(replaced(SMALL, num_hidden_layers=layers), 4) for layers in (6, 2))
    load = Workload([128], 4)
    grown = operations(deep, "per-sample", 128, load) - operations(shallow, "per-sample", 128, load)
    whole = sum(value.numel() for value in deep.parameters()) - sum(value.numel() for value in shallow.parameters())
    assert grown > 4 * whole * 128 * 0.9  # forwards, and backwards towards the adapter


def replaced(config: LlamaConfig, **values: Any) -> LlamaConfig:
    return LlamaConfig(**config.to_dict() | values)


def test_the_towers_work_is_counted_from_the_images() -> None:
    """Against two operations per weight and patch, which leaves the attention out."""
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(LlavaConfig(text_config=SMALL.to_dict(), vision_config=CLIP))
    layers = llava.model.vision_tower.encoder.layers
    least = 2 * 17 * sum(value.numel() for value in layers.parameters())
    assert 0.8 * least < image_operations(llava, {"pixel_values": torch.zeros(1, 3, 56, 56)}) < 3 * least


def test_images_of_any_size_are_counted_by_their_patches() -> None:
    vision = {"embed_dim": 32, "depth": 2, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}
    text = {name: value for name, value in SMALL.to_dict().items() if name in ("vocab_size", "hidden_size",
            "intermediate_size", "num_hidden_layers", "num_attention_heads")}  # fmt: skip
    text |= {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))

    def of(height: int) -> float:
        grid = torch.tensor([[1, height, 4]])
        return image_operations(model, {"pixel_values": torch.zeros(4 * height, 1176), "image_grid_thw": grid})

    assert of(8) > 1.9 * of(4) > 0
    assert operations(model.requires_grad_(True), "training", 32, Workload([32], 1)) > 0
