"""Code that comes with a model folder runs when the user says so, and nobody is asked at a prompt."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import icons

DATA = Path(__file__).parents[1] / "data" / "original_llava"
CODE = "import pathlib\npathlib.Path({ran!r}).touch()\nclass Own:\n    pass\n"


def test_every_from_pretrained_says_whether_code_may_run() -> None:
    silent = []
    for file in Path(icons.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            called = getattr(node.func, "attr", "") if isinstance(node, ast.Call) else ""
            if called not in ("from_pretrained", "from_config"):
                continue
            assert isinstance(node, ast.Call)
            if "trust_remote_code" not in [keyword.arg for keyword in node.keywords]:
                silent.append(f"{file.name}, line {node.lineno}")
    assert silent == []


def own(folder: Path, settings: str, auto: dict[str, str], ran: Path) -> None:
    """Makes a folder ask for code of its own."""
    file = folder / settings
    found = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**found, "auto_map": auto}))
    (folder / "own.py").write_text(CODE.format(ran=str(ran)))


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    for name in ("vicuna-tiny", "clip", "llava-tiny-lora"):
        shutil.copytree(DATA / name, tmp_path / name)
    return tmp_path


def run(*words: object) -> subprocess.CompletedProcess[str]:
    """The command with `yes` on its stdin."""
    line = [sys.executable, "-m", "icons", *map(str, words)]
    return subprocess.run(line, input="y\n" * 50, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_code_of_a_vision_tower_is_not_run_at_a_prompt(parts: Path) -> None:
    ran = parts / "ran"
    own(parts / "clip", "preprocessor_config.json", {"AutoImageProcessor": "own.Own"}, ran)
    settings = json.loads((parts / "clip" / "preprocessor_config.json").read_text())
    settings |= {"image_processor_type": "Own", "feature_extractor_type": "Own"}
    (parts / "clip" / "preprocessor_config.json").write_text(json.dumps(settings))
    model = ["--model", parts / "vicuna-tiny", "--vision-tower", parts / "clip"]
    model += ["--mm-projector", DATA / "mm_projector.bin", "--adapter", parts / "llava-tiny-lora"]
    data = ["--data", DATA / "data.json", "--images", DATA, "--preconditioner", "none", "--dim", 8]
    found = run("gradients", *model, *data, "--out", parts / "out.zarr", "--trainer.accelerator", "cpu")
    assert found.returncode == 1 and not ran.exists()
    assert "[y/N]" not in found.stdout + found.stderr
    assert "needs code that comes with it" in found.stderr and "--trust-remote-code" in found.stderr


@pytest.mark.slow
def test_code_of_a_tokenizer_is_not_run_by_an_export(parts: Path) -> None:
    ran = parts / "ran"
    own(parts / "vicuna-tiny", "tokenizer_config.json", {"AutoTokenizer": ["own.Own", None]}, ran)
    settings = json.loads((parts / "vicuna-tiny" / "tokenizer_config.json").read_text()) | {"tokenizer_class": "Own"}
    (parts / "vicuna-tiny" / "tokenizer_config.json").write_text(json.dumps(settings))
    model = ["--model", parts / "vicuna-tiny", "--vision-tower", parts / "clip"]
    found = run("export", *model, "--mm-projector", DATA / "mm_projector.bin", "--out", parts / "out")
    assert found.returncode == 1 and not ran.exists()
    assert "[y/N]" not in found.stdout + found.stderr
    assert "needs code that comes with it" in found.stderr and len(found.stderr.strip().splitlines()) == 1
    assert not (parts / "out").exists()
