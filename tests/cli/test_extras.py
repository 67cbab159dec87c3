"""Every command runs without any extra, or names the extra it needs in one line."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from icons.cli.command_line import COMMANDS
from icons.cli.extras import EXTRAS, missing, require

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "original_llava"
RUN = """
import sys, warnings
from importlib.machinery import PathFinder
warnings.simplefilter("ignore")

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context=None):
        known = context and context.name and context.name.replace("-", "_") in ABSENT
        return [] if known else super().find_distributions(context)

ABSENT = set(sys.argv[1].split(","))
sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
import json
from icons.cli import main
for words in json.loads(sys.argv[2]):
    print("status", main(words), *words[:2], flush=True)
"""


def installed_by_extras_alone() -> set[str]:
    """Modules that tests use or extras bring, and that a bare installation lacks."""
    return {*EXTRAS, "pandas", "xarray", "tensorstore", "moto", "hypothesis", "beartype", "nbclient", "easy_vqa"}


def test_the_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for module, extra in EXTRAS.items():
        assert any(part.replace("-", "_").startswith(module) for part in extras[extra]), module


def test_what_no_extra_brings_is_no_extras_fault() -> None:
    assert missing("json") is None
    assert missing("matplotlib.figure") == (
        "needs matplotlib, which is not installed: pip install 'icons-lightning[report]'"
    )


def test_a_missing_extra_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"needs matplotlib, which is not installed: pip install 'icons-lightning"):
        require("json", "matplotlib")


@pytest.mark.slow
def test_every_command_runs_without_extras_or_names_them(tmp_path: Path) -> None:
    data, images = str(DATA / "data.json"), str(DATA)
    parts = ["--vision-tower", str(DATA / "clip"), "--mm-projector", str(DATA / "mm_projector.bin")]
    given = ["--data", data, "--images", images, "--quiet", "--trainer.accelerator", "cpu"]
    start, train, task, scores, selected = (tmp_path / name for name in ("w", "t.zarr", "v.zarr", "s.zarr", "sel.json"))
    model = ["--model", str(DATA / "vicuna-tiny"), *parts]
    plain = ["--preconditioner", "none", "--dim", "32"]
    tasks = ["--task", f"a={data}:{images}"]
    choose = ["select", "--scores", str(scores), "--data", data, "--fraction", "0.4", "--out", str(selected)]
    runs: list[list[str]] = [
        ["warmup", *model, *given, "--lora-rank", "2", "--held-out", "0", "--out", str(start)],
        ["gradients", "--checkpoint", str(start), *given, "--dim", "32", "--out", str(train)],
        ["gradients", "--checkpoint", str(start), *given, *plain, "--out", str(task)],
        ["factors", "--checkpoint", str(start), *given, "--out", str(tmp_path / "factors.safetensors")],
        ["influence", "--train", str(train), "--task", f"a={task}", "--accelerator", "cpu", "--out", str(scores)],
        ["score", "--checkpoint", str(start), *given, *tasks, "--out", str(tmp_path / "x.zarr")],
        choose,
        [*choose, "--table", str(tmp_path / "t.csv")],
        ["compare", str(selected), str(selected)],
        ["export", "--checkpoint", str(start), "--out", str(tmp_path / "merged")],
        ["validate", *model, *given, "--scores", f"s={scores}", *tasks, "--subsets", "3",
         "--counterfactual", "0", "--lora-rank", "2", "--out", str(tmp_path / "v")],
        ["tasks", "list"], ["status", str(scores)], ["verify", str(scores)], ["doctor"],
        ["report", "--scores", str(scores), "--selection", str(selected), "--data", data],
        ["demo", "--out", str(tmp_path / "demo")],
    ]  # fmt: skip
    absent = ",".join(sorted(installed_by_extras_alone()))
    words = [sys.executable, "-c", RUN, absent, json.dumps(runs)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    ended = [line.split()[1:3] for line in ran.stdout.splitlines() if line.startswith("status ")]
    expected = [["1" if words[0] in ("report", "demo") else "0", words[0]] for words in runs]
    assert ended == expected, ran.stdout + ran.stderr
    assert {words[0] for words in runs} >= set(COMMANDS) - {"inspect"}
    errors = [line for line in ran.stderr.splitlines() if "error:" in line]
    assert errors == [
        "icons report: error: needs matplotlib, which is not installed: pip install 'icons-lightning[report]'",
        "icons demo: error: needs easy_vqa, which is not installed: pip install 'icons-lightning[demo]'",
    ]
