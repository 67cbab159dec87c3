"""The pages' promises: their Python runs as printed, their commands and options exist, and mkdocs builds them."""

import re
import shutil
from pathlib import Path

import pytest

from icons.cli import command_line

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "original_llava"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def icons_lines() -> list[tuple[str, str]]:
    """Every `icons ...` line of every page's shell blocks, continuation lines joined."""
    lines = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split("#")[0].split()
                if "icons" in words[:1] or "-m icons" in line:
                    lines.append((page.name, " ".join(words[words.index("icons") :])))
    return lines


def test_a_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert all(f": {page.name}" in navigation for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", ["stores", "choosing"])
def test_the_code_runs_as_printed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = next(file for file in PAGES if file.stem == page)
    code = "\n".join(blocks(file, "python"))
    assert code
    exec(compile(code, file.name, "exec"), {"__name__": page})


@pytest.mark.filterwarnings("ignore")
def test_the_library_example_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train.json", "gqa.json"):
        shutil.copy(DATA / "data.json", tmp_path / name)
    (tmp_path / "images").symlink_to(DATA)
    monkeypatch.chdir(tmp_path)
    model = ["--model", DATA / "vicuna-tiny", "--vision-tower", DATA / "clip"]
    words = [*model, "--mm-projector", DATA / "mm_projector.bin", "--data", "train.json", "--images", "images"]
    words += ["--lora-rank", 4, "--held-out", 0.0, "--out", "warmup"]
    assert command_line.main(["warmup", *map(str, words)]) == 0
    code = "\n".join(blocks(ROOT / "docs" / "get-started.md", "python"))
    assert blocks(ROOT / "README.md", "python")[0] in code, "the README shows the same example"
    capsys.readouterr()
    exec(compile(code, "get-started.md", "exec"), {})
    assert re.search(r"\[\d\]\n", capsys.readouterr().out)  # 40 % of three rows is one


def test_every_option_that_a_page_shows_exists(capsys: pytest.CaptureFixture[str]) -> None:
    helps: dict[str, str] = {}
    for page, line in icons_lines():
        _, command, *words = line.split()
        assert command in command_line.COMMANDS, f"{page}: {line}"
        if command not in helps:
            command_line.main([command, *(["build"] if command == "tasks" else []), "--help"])
            helps[command] = capsys.readouterr().out
        options = [word.split("=")[0] for word in words if word.startswith("--") and not word.startswith("--trainer.")]
        assert all(option in helps[command] for option in options), f"{page}: {line}"


def test_files_that_a_page_names_are_there() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:icons|scripts|tests|docs)/[\w./-]+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_readme_fits_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_every_command_has_its_section() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    assert re.findall(r"^## icons (\w+)$", text, re.MULTILINE) == list(command_line.COMMANDS)
