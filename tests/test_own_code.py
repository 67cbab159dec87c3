"""Code that comes with a model folder is run when asked for, by every command; else it is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, dynamic_module_utils

from icons.cli import main
from icons.models.folder import own_code

pytestmark = pytest.mark.filterwarnings("ignore")
CODE = "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
CPU = ["--trainer.accelerator", "cpu"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny text model whose tokenizer is a class that only a file in the folder defines."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    out = tmp_path / "model"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={sign: place for place, sign in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    (out / "own_tokenizer.py").write_text(CODE)
    width = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **width)).save_pretrained(out)
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "there"}]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns}] * 4))
    return out


def commands(folder: Path) -> dict[str, list[Any]]:
    here = folder.parent
    data = ["--data", here / "data.json"]
    few = ["--lora-rank", 1, "--min-rows", 1, "--batch-size", 2]
    warmup, kept = here / "warmup", ["--checkpoint", here / "warmup", "--dim", 8]
    return {
        "warmup --dry-run": ["warmup", "--model", folder, *data, *few, "--out", warmup, "--dry-run"],
        "warmup": ["warmup", "--model", folder, *data, *few, "--out", warmup, *CPU],
        "gradients --dry-run": ["gradients", *kept, *data, "--out", here / "a.zarr", "--dry-run"],
        "gradients": ["gradients", *kept, *data, "--out", here / "a.zarr", *CPU],
        "score": ["score", *kept, *data, "--task", f"t={here / 'data.json'}", "--out", here / "s.zarr", *CPU],
    }


def test_every_command_runs_it_when_asked_for(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, words in commands(folder).items():
        assert main([str(word) for word in words]) == 1, name
        said = " ".join(capfd.readouterr().err.split())
        if "warmup" in name:  # the others have no warm-up folder yet
            assert "needs code that comes with it, which is run only when asked for" in said, name
        assert main([*map(str, words), "--trust-remote-code", "true"]) == 0, name
        capfd.readouterr()
    for name, words in commands(folder).items():
        if "warmup" not in name:
            out = folder.parent / f"again-{words[0]}.zarr"
            words[words.index("--out") + 1] = out
            assert main([str(word) for word in words]) == 1, name
            assert "give --trust-remote-code" in " ".join(capfd.readouterr().err.split()), name


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another reason"), own_code(tmp_path):
        raise ValueError("another reason")
    with (
        pytest.raises(ValueError, match=r"needs code that comes with it.* give --trust-remote-code"),
        own_code(tmp_path),
    ):
        raise ValueError("Please pass the argument `trust_remote_code=True`")
