"""The SLURM files, run as they stand with a pretended srun: every option exists, and jobs queue themselves again."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icons.cli.command_line import options_of
from icons.cli.parser import parse
from icons.datamodules.benchmarks import BENCHMARKS

SLURM = Path(__file__).parent.parent.parent / "scripts" / "slurm"
FILES = sorted(SLURM.glob("*.sbatch"))
STAGES = ("warmup", "gradients", "tasks", "influence", "score", "select", "finetune", "export", "validate", "evaluate")
ARRAYS = ("gradients", "tasks", "score", "finetune", "validate", "evaluate")
SRUN = '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
SAY = f"""#!{sys.executable}
import json, os, sys
with open("said", "a") as file:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=file)
sys.exit(int(os.environ.get("STATUS", "0")) if "icons" in sys.argv[0] else 0)
"""
Submit = Callable[..., tuple[int, list[list[str]]]]


@pytest.fixture
def submit(tmp_path: Path) -> Submit:
    """Runs a file as task 3 of an array of job 17, on 2 nodes; the programs' words come back."""
    programs = {"bin/srun": SRUN, "bin/scontrol": SAY, ".venv/bin/icons": SAY, "lmms_eval/bin/python": SAY}
    for name, text in programs.items():
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    (tmp_path / "scripts").symlink_to(SLURM.parent)

    def run(name: str, *words: str, status: int = 0, **variables: str) -> tuple[int, list[list[str]]]:
        slurm = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_ID": "17"}
        slurm["SLURM_SUBMIT_DIR"] = str(tmp_path)
        if "array" in name:
            slurm |= {"SLURM_JOB_ID": "20", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "1"}
        environment = os.environ | slurm | variables
        environment |= {"STATUS": str(status), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", str(SLURM / name), *words], env=environment, check=False, cwd="/")
        said = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
        (tmp_path / "said").unlink()
        return done.returncode, said

    return run


def parsed(words: list[str]) -> dict[str, Any]:
    """The options of an `icons` line; fails on one that does not exist."""
    return vars(parse(words[1], options_of(words[1]), words[2:]))


def test_every_stage_has_a_job_and_where_rows_are_independent_an_array() -> None:
    names = {file.stem for file in FILES}
    assert {name.removesuffix("_array") for name in names} == set(STAGES)
    assert {name.removesuffix("_array") for name in names if name.endswith("_array")} == set(ARRAYS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_is_bash_with_an_account_and_variables_at_the_top(file: Path) -> None:
    assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0
    text = file.read_text()
    assert "#SBATCH --account=CHANGE_ME\n" in text
    assert f"#SBATCH --job-name=icons-{file.stem.removesuffix('_array').replace('_', '-')}" in text
    assert bool(re.search(r"^#SBATCH --array=0-\d+$", text, re.MULTILINE)) == file.stem.endswith("_array")
    code = [line for line in text.splitlines() if line and not line.startswith("#")]
    first = next(place for place, line in enumerate(code) if not re.match(r"(export )?[A-Z_]+=", line))
    variables = set(re.findall(r"[A-Z_]+(?==\$\{)", " ".join(code[:first])))
    assert {"OUT"} <= variables or file.stem in ("tasks_array", "finetune_array")
    assert variables & {"CHECKPOINT", "MODEL", "TRAIN", "SCORES"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_lines_are_commands_with_options_that_exist(file: Path, submit: Submit) -> None:
    status, said = submit(file.name)
    assert status == 0
    assert said
    for words in said:
        if words[0] == "icons":
            parsed(words)


@pytest.mark.parametrize("name", ["warmup.sbatch", "gradients.sbatch", "score.sbatch", "finetune.sbatch"])
def test_one_process_per_gpu_on_all_nodes(submit: Submit, name: str) -> None:
    _, [words] = submit(name)
    assert {
        name: int(value) for name, value in parsed(words)["trainer"].items() if name in ("num_nodes", "devices")
    } == {
        "num_nodes": 2,
        "devices": 8,
    }


def test_a_step_has_the_same_number_of_rows_on_any_number_of_gpus(submit: Submit) -> None:
    assert parsed(submit("warmup.sbatch")[1][0])["batch_size"] == 128 // 16
    assert parsed(submit("finetune.sbatch", SLURM_NNODES="1", SLURM_NTASKS_PER_NODE="4")[1][0])["batch_size"] == 32


def test_a_warm_up_and_a_fine_tune_are_their_recipes(submit: Submit) -> None:
    _, [words] = submit("warmup.sbatch", "--num-workers", "2", DATASET="cambrian-7m", OUT="there")
    options = parsed(words)
    assert str(options["data"]).endswith("Cambrian7M_withsystemprompt.jsonl")
    assert (options["fraction"], str(options["out"]), options["num_workers"]) == (0.05, "there", 2)
    options = parsed(submit("finetune.sbatch")[1][0])
    assert (str(options["data"]), str(options["images"]), str(options["out"])) == (
        "selected.json",
        "data/images",
        "final",
    )
    options = parsed(submit("finetune_array.sbatch")[1][0])
    assert (str(options["data"]), str(options["out"])) == ("random-0.json", "final-random-0")


def test_an_array_takes_one_share_of_the_units(submit: Submit) -> None:
    for name in ("gradients_array", "score_array", "validate_array"):
        assert parsed(submit(f"{name}.sbatch", SHARDS="7")[1][0])["shard"] == "1/7"


def test_the_tasks_are_the_papers_and_find_their_images(submit: Submit) -> None:
    assert "#SBATCH --array=0-21\n" in (SLURM / "tasks_array.sbatch").read_text()
    seen = []
    for number in range(22):
        options = parsed(submit("tasks_array.sbatch", SLURM_ARRAY_TASK_ID=str(number))[1][0])
        assert options["preconditioner"] == "none"
        seen.append((options["data"].stem, options["images"].name, options["out"]))
    single = ["vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mmbench", "mmbench_cn", "llava_bench"]
    subtasks = [f"mme_{name}" for name in BENCHMARKS["mme"].subtasks]
    assert [name for name, _, _ in seen] == [*single, *subtasks]
    assert [images for _, images, _ in seen] == [*single, *["mme"] * len(subtasks)]
    assert seen[1] == ("gqa", "gqa", "gqa.zarr")
    recipe = parsed(submit("influence.sbatch")[1][0])
    assert {task.partition("=")[0] for task in recipe["task"]} == {name for name, _, _ in seen}


def test_words_of_the_tasks_variable_become_options(submit: Submit) -> None:
    options = parsed(submit("influence.sbatch", TASKS="gqa=gqa.zarr pope=pope.zarr")[1][0])
    assert options["task"] == ["gqa=gqa.zarr", "pope=pope.zarr"]
    assert (options["num_nodes"], int(options["devices"])) == (2, 8)


def test_a_selection_comes_with_its_report(submit: Submit) -> None:
    _, said = submit("select.sbatch", FRACTION="0.1", OUT="few.json")
    assert [words[1] for words in said] == ["select", "report"]
    assert (parsed(said[0])["fraction"], str(parsed(said[1])["selection"])) == (0.1, "few.json")


def test_an_evaluation_is_one_benchmark(submit: Submit) -> None:
    _, [words] = submit("evaluate_array.sbatch")
    assert words[words.index("--tasks") + 1] == "gqa"
    assert words[words.index("--model_args") + 1] == "pretrained=merged"


@pytest.mark.parametrize("name", ["warmup", "gradients", "score", "finetune"])
@pytest.mark.parametrize(("status", "requeued"), [(75, [["scontrol", "requeue", "17"]]), (1, [])])
def test_an_interrupted_job_is_queued_again_and_a_failed_one_is_not(
    submit: Submit, name: str, status: int, requeued: list[list[str]]
) -> None:
    code, said = submit(f"{name}.sbatch", status=status)
    assert (code, said[1:]) == (status, requeued)


@pytest.mark.parametrize("name", ["gradients", "score", "finetune", "tasks"])
def test_an_interrupted_job_of_an_array_is_queued_again_alone(submit: Submit, name: str) -> None:
    code, said = submit(f"{name}_array.sbatch", status=75)
    assert (code, said[1:]) == (75, [["scontrol", "requeue", "17_1"]])
