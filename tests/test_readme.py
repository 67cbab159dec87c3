"""The README's promises: its code runs as printed, and its command table is the command's own help."""

import re
import shutil
from pathlib import Path

import pytest

from icons.cli import command_line as cli

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data" / "original_llava"
README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_library_example_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train.json", "gqa.json"):
        shutil.copy(DATA / "data.json", tmp_path / name)
    (tmp_path / "images").symlink_to(DATA)
    monkeypatch.chdir(tmp_path)
    words = [
        "--model",
        DATA / "vicuna-tiny",
        "--vision-tower",
        DATA / "clip",
        "--mm-projector",
        DATA / "mm_projector.bin",
    ]
    words += ["--data", "train.json", "--images", "images", "--lora-rank", 4, "--held-out", 0.0, "--out", "warmup"]
    assert cli.main(["warmup", *map(str, words)]) == 0
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    assert re.search(r"\[\d\]\n", capsys.readouterr().out)  # 40 % of three rows is one


def test_the_command_table_is_the_help() -> None:
    rows = dict(re.findall(r"^\| `icons (\w+)` \| (.*?) \|$", README, re.MULTILINE))
    assert rows == {name: does.replace("|", r"\|") for name, does in cli.COMMANDS.items()}


def test_every_option_of_the_real_run_exists(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```bash\n(icons warmup.*?)```", README, re.DOTALL)
    for line in block.strip().splitlines():
        _, command, *words = line.split()
        assert cli.main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words if word.startswith("--")), line


def test_files_that_the_readme_names_are_there() -> None:
    for name in re.findall(r"`((?:icons|scripts)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name
