"""Signals to a command as a batch system sends them: to the whole group of processes, and at any moment."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from icons.cli import main
from icons.store import GradientStore
from icons.store.verify import verify

DATA = Path(__file__).parents[1] / "data" / "original_llava"
MODEL = ["--model", DATA / "vicuna-tiny", "--vision-tower", DATA / "clip", "--mm-projector", DATA / "mm_projector.bin"]
ON_CPU = ["--images", DATA, "--trainer.accelerator", "cpu"]
GRADIENTS = [*MODEL, "--adapter", DATA / "llava-tiny-lora", "--preconditioner", "none", "--dim", 64, *ON_CPU]
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


def start(*words: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "icons", *map(str, words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def terminate_when(process: "subprocess.Popen[str]", ready: Callable[[], bool]) -> str:
    """What the process said, after SIGTERM to all of its group at the moment that is asked for."""
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    return process.communicate(timeout=240)[0]


def takes_signals(process: "subprocess.Popen[str]") -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """60 good records."""
    (tmp_path / "data.json").write_text(json.dumps(json.loads((DATA / "data.json").read_text()) * 20))
    return tmp_path / "data.json"


@pytest.mark.parametrize("command", ["warmup", "factors", "gradients", "influence", "score"])
def test_a_signal_before_there_is_anything_to_save_is_status_75(command: str) -> None:
    process = start(command, "--model", "nowhere", "--out", "unused")
    said = terminate_when(process, lambda: takes_signals(process))
    assert process.returncode == 75, said
    assert said == f"icons {command}: interrupted by SIGTERM; run the same line again to go on\n"


@pytest.mark.slow
def test_a_signal_to_all_processes_of_gradients_with_workers_is_75_and_gone_on_from(data: Path, tmp_path: Path) -> None:
    words = [
        "gradients",
        *GRADIENTS,
        "--data",
        data,
        "--chunk-rows",
        2,
        "--batch-size",
        1,
        "--out",
        tmp_path / "a.zarr",
    ]
    process = start(*words, "--num-workers", 2)
    said = terminate_when(process, lambda: (tmp_path / "a.zarr/status/c/1").exists())
    assert process.returncode == 75 and "Traceback" not in said and "Error" not in said, said
    store = GradientStore.open(tmp_path / "a.zarr")
    assert store.missing() and list(verify(store)) == [] and store.storage.list("status/lease") == []
    assert main([*map(str, words)]) == 0
    store = GradientStore.open(tmp_path / "a.zarr")
    assert store.missing() == [] and store.counts()["done"] == 60
    assert (store.gradients[:3] == store.gradients[57:]).all(), "the same records"


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_warmup_with_workers_is_75_and_it_goes_on_to_the_same_adapter(
    data: Path, tmp_path: Path
) -> None:
    words = ["warmup", *MODEL, *ON_CPU, "--data", data, "--fraction", 1, "--epochs", 3, "--lora-dropout", 0.3]
    words += ["--num-workers", 2, "--batch-size", 4, "--checkpoint-minutes", 0.001]
    process = start(*words, "--out", tmp_path / "warm")
    said = terminate_when(process, lambda: (tmp_path / "warm/last.ckpt").exists())
    assert process.returncode == 75 and "Traceback" not in said, said
    assert (tmp_path / "warm/last.ckpt").stat().st_size > 0 and not (tmp_path / "warm/new.ckpt").exists()
    for name in ("warm", "undisturbed"):
        assert main([*map(str, words), "--out", str(tmp_path / name)]) == 0
    for name in ("adapter_model.safetensors", "adam.safetensors", "non_lora.safetensors"):
        assert (tmp_path / "warm" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name


@pytest.mark.parametrize("words", [["--trainer.precision", "bf16-true"], ["--attention", "eager"]])
def test_what_the_numbers_are_computed_with_does_not_change_on_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    line = [*GRADIENTS, "--data", DATA / "data.json", "--chunk-rows", 2, "--out", tmp_path / "a.zarr"]
    assert main(["gradients", *map(str, line), "--shard", "0/2"]) == 0
    before = GradientStore.open(tmp_path / "a.zarr")
    rows, missing = before.gradients[:], before.missing()
    assert main(["gradients", *map(str, line), "--shard", "1/2", *words]) == 1
    assert "computation." in capsys.readouterr().err
    after = GradientStore.open(tmp_path / "a.zarr")
    assert after.missing() == missing != [] and (after.gradients[:] == rows).all()
