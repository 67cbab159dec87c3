"""`icons demo`: its checks, the lines it prints, its start model; and the whole of it at a small setting (slow)."""

import json
import re
import shlex
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaForConditionalGeneration

from icons.cli import call, main
from icons.cli.demo import QUICK, DemoSettings, StageFailed, claim_demo, command_line, named
from icons.datamodules.easy_vqa import questions

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*srun.*"),
]
START = resources.files("icons") / "configs" / "demo_start"


def test_a_folder_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "is no former output of this command; expected a new or empty place" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_demo_of_other_settings_is_refused_with_both_values(tmp_path: Path) -> None:
    claim_demo(tmp_path, QUICK)
    claim_demo(tmp_path, QUICK)
    with pytest.raises(ValueError, match=f"num_pool {QUICK.num_pool}, now it is {DemoSettings().num_pool}"):
        claim_demo(tmp_path, DemoSettings())


def test_no_random_subset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--seeds 0: expected at least 1 random subset"):
        call("demo", out=tmp_path / "out", seeds=0)
    assert not (tmp_path / "out").exists()


def test_a_missing_easy_vqa_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'icons-lightning[demo]'" in capsys.readouterr().err


def test_a_command_line_gives_back_its_options() -> None:
    options = {"out": Path("my folder"), "task": ["a=1", "b=2"], "num_rows": None, "strict": False, "batch_size": 8}
    words = ["icons", "warmup", "--out", "my folder", "--task", "a=1", "--task", "b=2"]
    assert shlex.split(command_line("warmup", options)) == [*words, "--strict", "false", "--batch-size", "8"]


def test_tasks_are_named_with_their_images() -> None:
    assert named({"a": Path("a.json")}, Path("images")) == ["a=a.json:images"]
    assert named({"a": Path("a.zarr")}) == ["a=a.zarr"]


def test_a_failed_stage_ends_the_demo_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("icons.cli.warmup.warmup", lambda _: 75)
    assert call("demo", out=tmp_path / "out", quick=True) == 75
    assert "Warm-up ended with exit status 75" in capsys.readouterr().out
    assert StageFailed("Warm-up", 75).status == 75


def test_start_is_small_and_answers_plain_questions() -> None:
    """The shipped weights are those that the script made: able on images that alignment has not seen."""
    with resources.as_file(START) as folder:
        assert sum(path.stat().st_size for path in folder.iterdir()) < 4e6
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer, processor = AutoTokenizer.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)
    assert 7e5 < sum(parameter.numel() for parameter in model.parameters()) < 1.2e6
    asked = questions("development")[:60]
    right = 0
    for question in asked:
        with Image.open(question.image) as image:
            pixels = processor(image.convert("RGB"), return_tensors="pt").pixel_values
        image_ids = [model.config.image_token_id] * 16
        text = tokenizer("\n" + question.text, add_special_tokens=False).input_ids
        ids = torch.tensor([[tokenizer.bos_token_id, *image_ids, *text]])
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
        right += tokenizer.decode([int(logits[0, -1].argmax())]).strip() == question.answer
    assert right / len(asked) > 0.8


@pytest.mark.slow
def test_the_whole_demo_at_a_small_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--quick", "true", "--seeds", "1"]) == 0
    said = capsys.readouterr().out
    found = json.loads((out / "comparison.json").read_text())
    assert [(method["name"], method["rows"]) for method in found["methods"]] == [
        ("selected", 32), ("vote", 32), ("random", 32), ("full", 160)
    ]  # fmt: skip
    assert sum(found["votes"]) == 160
    assert sum(share["selection"] for share in found["shares"]) == pytest.approx(1)
    assert len(json.loads((out / "selected.json").read_text())) == 32
    assert "Rel. (%)" in said and "wrong" in said
    page = (out / "report.html").read_text()
    assert "Rel. (%)" in page and "provenance" in page

    # each stage was printed as the line that repeats it: finished stages then have nothing to do
    line = next(line for line in said.splitlines() if line.startswith("icons select") and "random" not in line)
    before = (out / "selected.json").read_bytes()
    assert main(shlex.split(line)[1:]) == 0
    assert (out / "selected.json").read_bytes() == before
    line = next(line for line in said.splitlines() if re.match("icons warmup.*tuned-full", line))
    assert main(shlex.split(line)[1:]) == 0
    assert "nothing to do" in capsys.readouterr().out
