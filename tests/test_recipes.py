"""Every recipe as it stands, with --dry-run: real model sizes without weights, data files of a few rows."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from icons.cli import main
from icons.cli.estimate import estimate_gradients_run
from icons.cli.options.gradients import GradientsOptions
from icons.cli.options.influence import InfluenceOptions
from icons.cli.options.select import SelectOptions
from icons.cli.parser import parse
from icons.datamodules.benchmarks import BENCHMARKS
from icons.models.folder import ModelFolder

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "icons" / "configs"
LLAVA = Path(__file__).parent / "data" / "original_llava"
VICUNA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
VICUNA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
LLAMA_3 = VICUNA_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
MODELS = {  # text configuration, parameters of the adapter and the projector
    "llava-1.5-7b": (VICUNA_7B, 319_815_680 + 20_979_712),
    "llava-1.5-13b": (VICUNA_13B, 500_695_040 + 31_467_520),
    "llava-llama-3-8b": (LLAMA_3, 335_544_320 + 20_979_712),
}
PROJECTORS = {"llava-1.5-7b": 20_979_712, "llava-1.5-13b": 31_467_520, "llava-llama-3-8b": 20_979_712}
EACH_MODEL = pytest.mark.parametrize(
    "model", ["llava-1.5-7b", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[1:])]
)
DATA = ("llava-665k", "cambrian-7m", "vision-flan-186k")


def read(name: str) -> dict[str, str]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def bytewise() -> PreTrainedTokenizerFast:
    """A token per byte, and those that Llama 3's template writes."""
    alphabet = {sign: place for place, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "extra_special_tokens": special}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=4096, **names)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all that the recipes name exists, but for the weights."""
    root = tmp_path_factory.mktemp("workplace")
    for name, (text, _) in MODELS.items():
        recipe = read(name)
        model, tower, projector = (root / recipe[part] for part in ("model", "vision_tower", "mm_projector"))
        shutil.copytree(LLAVA / "vicuna-tiny", model, ignore=shutil.ignore_patterns("*.bin", "*.safetensors*"))
        config = json.loads((model / "config.json").read_text()) | {"num_key_value_heads": None} | text
        config["num_key_value_heads"] = config["num_key_value_heads"] or config["num_attention_heads"]
        config = {"vocab_size": 32000} | config if "vocab_size" in text else config | {"vocab_size": 32000}
        config.pop("head_dim", None)
        if recipe.get("template") == "llama_3":
            (model / "tokenizer.model").unlink()
            bytewise().save_pretrained(model)
        (model / "config.json").write_text(json.dumps(config))
        shutil.copytree(LLAVA / "clip", tower, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.bin"))
        vision = json.loads((tower / "config.json").read_text()) | {"image_size": 336, "patch_size": 14} | CLIP
        (tower / "config.json").write_text(json.dumps(vision))
        pixels = json.loads((tower / "preprocessor_config.json").read_text())
        sizes = {"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}}
        (tower / "preprocessor_config.json").write_text(json.dumps(pixels | sizes))
        if projector.suffix:
            projector.parent.mkdir(parents=True)
            shutil.copy(LLAVA / "mm_projector.bin", projector)
        else:
            projector.mkdir(parents=True)
            (projector / "model.safetensors").write_bytes(b"")
    records = json.loads((LLAVA / "data.json").read_text()) * 100
    for name in DATA:
        file, images = (root / read(name)[part] for part in ("data", "images"))
        file.parent.mkdir(exist_ok=True)
        lines = [json.dumps(record) for record in records]
        file.write_text("\n".join(lines) if file.suffix == ".jsonl" else json.dumps(records))
        if not images.suffix:
            images.mkdir(exist_ok=True)
        else:
            shutil.make_archive(str(images.with_suffix("")), "zip", LLAVA, "img0.png")
    (root / "selected.json").write_text(json.dumps(records))
    return root


def configs(*names: str) -> list[str]:
    return [word for name in names for word in ("--config", str(CONFIGS / f"{name}.yaml"))]


@pytest.mark.parametrize("data", DATA)
@EACH_MODEL
def test_warmup(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str, data: str
) -> None:
    monkeypatch.chdir(workplace)
    assert main(["warmup", *configs("warmup", model, data), "--dry-run", "--min-rows=1"]) == 0
    text = capsys.readouterr().out
    trainable = MODELS[model][1]
    assert f"{4 * trainable / 1e9:.3g} GB" in text and "rows per rank" in text
    for part in ("0.05", "rank=128, alpha=256", "0.0002", "2e-05", "0.03", "2048", "bfloat16", "memory per GPU"):
        assert part in text, part
    assert not (workplace / "warmup").exists()


@EACH_MODEL
def test_finetune(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    monkeypatch.chdir(workplace)
    assert main(["warmup", *configs("llava-665k", model, "finetune"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "selected.json" in text and "37 to 38" in text  # 300 rows on 8 devices: nothing is held out
    assert not (workplace / "final").exists()


@pytest.mark.parametrize("recipe", ["gradients", "tasks"])
@EACH_MODEL
def test_gradients(workplace: Path, recipe: str, model: str) -> None:
    """The plan that `icons gradients --dry-run` prints, with the recipe's options."""
    options = parse("gradients", GradientsOptions, ["--data", "d", "--out", "o", *configs(recipe)])
    assert str(options.checkpoint) == "warmup" and options.trainer == {"devices": 8}
    assert options.preconditioner == {"gradients": "adam", "tasks": "none"}[recipe]
    parts = {name: workplace / place for name, place in read(model).items() if name != "template"}
    adapter = workplace / f"adapter-{model}-{recipe}"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 128, "target_modules": ["q_proj", "v_proj"]}))
    folder, preconditioner = ModelFolder.open(**parts), options.preconditioner
    plan = estimate_gradients_run(
        options, folder, adapter, FewRows(), [options.dim], preconditioner=preconditioner, settings=vars(options)
    )
    assert plan.files["gradients"] == 665_298 * 5120 * 2  # the paper's data and dimension: 6.8 GB
    assert len(plan.rows_per_rank) == 8 and sum(plan.rows_per_rank) >= 665_298
    moments = 8 * (MODELS[model][1] - PROJECTORS[model])
    assert plan.memory.get("moments", 0) == (moments if recipe == "gradients" else 0)


class FewRows:
    """LLaVA-665K's number of rows; the lengths of a few."""

    def __len__(self) -> int:
        return 665_298

    def lengths(self, rows: list[int]) -> list[int]:
        assert len(rows) <= 256
        return [600 + row % 300 for row in rows]

    def __getitem__(self, row: int) -> int:
        return row

    def collate(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(len(rows), 1), "pixel_values": torch.zeros(len(rows), 3, 336, 336)}


def test_influence_and_selection() -> None:
    options = vars(parse("influence", InfluenceOptions, configs("influence")))
    names = [task.partition("=")[0] for task in options["task"]]
    subtasks = [f"mme_{name}" for name in BENCHMARKS["mme"].subtasks]
    assert options["train"] == ["train.zarr"] and options["group"] == ["mme=" + ",".join(subtasks)]
    assert set(names) == {name for name in BENCHMARKS if name in names} | set(subtasks)
    assert len(names) - len(subtasks) + 1 == 10  # the paper's ten
    options = vars(parse("select", SelectOptions, [*configs("select"), "--data", "d"]))
    assert (options["fraction"], options["method"], str(options["out"])) == (0.2, "vote", "selected.json")
