"""`icons warmup` on a tiny LLaVA: what is drawn, trained, measured, written, resumed and refused."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from safetensors.torch import load_file

from icons.cli import call, main
from icons.cli.console import listen
from icons.cli.warmup import draw
from icons.models.adam_state import load_adam_state
from icons.models.loading import load_model
from icons.models.warmup_folder import open_warmup
from icons.modules.fit import trainer_flags

LLAVA = Path(__file__).parents[1] / "data" / "original_llava"
MODEL = {"model": LLAVA / "vicuna-tiny", "vision_tower": LLAVA / "clip", "mm_projector": LLAVA / "mm_projector.bin"}
NUM_ROWS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows: of each three one with an image, one without, one that cannot be read."""
    records = []
    for row in range(NUM_ROWS):
        question, answer = f"What is number {row % 4}?", ("A red bus.", "hi", "Three")[row % 3]
        image = {"image": "img0.png"} if row % 3 == 0 else {"image": "gone.png"} if row % 3 == 2 else {}
        question = f"<image>\n{question}" if image else question
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({"id": row, **image, "conversations": turns})
    file = tmp_path_factory.mktemp("data") / "train.json"
    file.write_text(json.dumps(records))
    return file


def options(data: Path, out: Path, **more: Any) -> dict[str, Any]:
    few = {"lora_rank": 2, "lora_alpha": 4.0, "batch_size": 4, "learning_rate": 1e-2, "min_rows": 1}
    few |= {"max_failed": 1.0}
    flags = {"accelerator": "cpu", "enable_progress_bar": False} | more.pop("trainer", {})
    return MODEL | {"data": data, "out": out, "images": LLAVA, "trainer": flags} | few | more


def words(data: Path, out: Path, *more: str) -> list[str]:
    """The same, as one types it."""
    given = options(data, out)
    given |= {f"trainer.{name}": value for name, value in given.pop("trainer").items()}
    return ["warmup", *[f"--{name}={value}" for name, value in given.items()], *more]


def test_the_warmup_folder_holds_what_later_stages_need(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "out", LLAVA / "data.json"
    task = ["--task", f"a={file}:{LLAVA}", "--task", f"b={data}:{LLAVA}"]
    assert main(words(data, out, "--fraction=0.5", "--epochs=6", *task)) == 0
    text = capsys.readouterr().out
    assert "training on 12 of 24 rows (50.0%), 6 epochs" in text and "18 steps" in text
    opened = open_warmup(out)
    manifest = opened.manifest
    assert manifest["used"] == {"rows": 12, "fraction": 0.5, "steps": 18}
    assert manifest["data"]["num_rows"] == NUM_ROWS and manifest["preprocessing"]["template"] == "v1"
    assert manifest["lora"]["rank"] == 2 and manifest["settings"]["seed"] == 0 and manifest["versions"]["torch"]
    for task_name in ("a", "b"):
        before, after = (manifest["losses"][side][task_name] for side in ("before", "after"))
        assert 0 < after < before
        assert set(manifest["accuracy"]["after"]) == {"a", "b"}
    assert not (out / "last.ckpt").exists()
    network = load_model(opened.model_folder, adapter=opened.adapter, target="trainable")
    trained = {name for name, value in network.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * 2 * 7 + 4  # A and B on 7 layers of 2 blocks; the projector's two layers
    adam = load_adam_state(out, network)
    assert set(adam.exp_avg) == trained and adam.step == 18 and adam.betas == (0.9, 0.999)
    assert all(value.abs().sum() > 0 for name, value in adam.exp_avg_sq.items())
    assert main(words(data, out, "--fraction=0.5", "--epochs=6", *task)) == 0
    assert "nothing to do" in capsys.readouterr().out.replace("\n", " ")


def test_a_finished_fit_of_other_settings_is_not_overwritten(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(words(data, out)) == 0
    assert main(words(data, out, "--seed=3")) == 1
    assert "holds a finished fit with lora {" in capsys.readouterr().err
    assert main(words(data, out, "--seed=3", "--resume=false")) == 0
    assert json.loads((out / "icons.json").read_text())["settings"]["seed"] == 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_fit_that_another_run_has_finished_while_this_one_waited_is_not_done_again(
    data: Path, tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks = iter([False, True])
    monkeypatch.setattr("icons.cli.warmup.already_done", lambda *_: next(looks))
    assert main(words(data, tmp_path / "out", f"--trainer.devices={ranks}")) == 0
    assert "finished by another run: nothing to do" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_ranks_that_were_started_beside_each_other_end_together_when_rank_0_may_not_begin(
    data: Path, tmp_path: Path
) -> None:
    code = """import sys
from contextlib import nullcontext
import icons.cli.warmup as command
from icons.cli import main
refused = ValueError("two at once") if sys.argv.pop(1) == "0" else None
command.alone_in = lambda folder: nullcontext(refused)
sys.exit(main())"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    where |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}
    line = words(data, tmp_path, "--trainer.devices=2")
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", code, rank, *line],
            env=os.environ | where | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for rank in begun:
            text, _ = rank.communicate(timeout=60)
            assert rank.returncode == 1 and "error: two at once" in text and "Traceback" not in text, text
    finally:
        for rank in begun:
            rank.kill()
            rank.communicate()


def test_failed_rows_are_counted_shown_and_kept_and_too_many_end_the_fit(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(data, tmp_path / "a", "--held-out=0")) == 0
    assert "failed 8 rows: image_missing" in capsys.readouterr().out
    failed = json.loads((tmp_path / "a" / "icons.json").read_text())["failed"]
    assert failed["rows"] == 8 and failed["kinds"][0]["examples"][0].startswith("row 2 (id 2): image gone.png is not")
    assert main(words(data, tmp_path / "b", "--held-out=0", "--max-failed=0.3")) == 1
    said = capsys.readouterr().err
    assert f"8 of {NUM_ROWS} rows could not be read, more than --max-failed 0.3 of them; the first, row 2" in said
    assert main(words(data, tmp_path / "b", "--max-failed=2")) == 1
    assert "--max-failed 2.0: expected a share of the rows" in capsys.readouterr().err


def test_a_wrong_image_folder_is_said_before_a_model_is_loaded(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icons.cli.warmup.load_model", lambda *_, **__: pytest.fail("loaded"))
    none = tmp_path / "none.json"
    none.write_text(json.dumps([one | {"image": "none.png"} for one in json.loads(data.read_text())]))
    assert main(words(none, tmp_path / "a")) == 1
    said = capsys.readouterr().err
    assert "fails; the first, row " in said and "image none.png is not in" in said


def test_without_tasks_rows_are_held_out(data: Path, tmp_path: Path) -> None:
    assert call("warmup", **options(data, tmp_path, held_out=0.2)) == 0
    manifest = json.loads((tmp_path / "icons.json").read_text())
    assert manifest["used"]["rows"] == NUM_ROWS - 5 and manifest["settings"]["held_out"] == 5
    assert list(manifest["losses"]["before"]) == list(manifest["losses"]["after"]) == ["held-out"]
    assert call("warmup", **options(data, tmp_path / "all", held_out=0.0)) == 0
    manifest = json.loads((tmp_path / "all" / "icons.json").read_text())
    assert manifest["used"]["rows"] == NUM_ROWS and manifest["losses"] == {"before": {}, "after": {}}


def test_a_warmup_that_learns_nothing_says_so(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = {"learning_rate": 1e-9, "projector_learning_rate": 1e-9, "fraction": 0.5}
    assert call("warmup", **options(data, tmp_path, **slow)) == 0
    assert "warning: the warm-up has hardly learned" in capsys.readouterr().out


def test_a_small_share_is_raised_and_said(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listen()
    assert call("warmup", **options(data, tmp_path, fraction=0.05, min_rows=8, dry_run=True)) == 0
    text = capsys.readouterr().out.replace("\n", " ")
    assert "5.0% of 24 rows is little to learn from: taking 8 of 24 rows (33.3%)" in text
    assert not list(tmp_path.iterdir())


class Terminate(Callback):
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_terminated_fit_goes_on_to_the_same_adapter(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit: dict[str, Any] = {"epochs": 3, "lora_dropout": 0.3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    listen()
    assert call("warmup", **options(data, whole, **fit)) == 0
    callbacks: dict[str, Any] = {"callbacks": [Terminate()]}
    assert call("warmup", **options(data, parts, **fit, trainer=callbacks)) == 75
    assert "run the same line again to go on" in capsys.readouterr().out.replace("\n", " ")
    assert (parts / "last.ckpt").exists() and not (parts / "icons.json").exists()
    with pytest.raises(ValueError, match=r"epochs: the interrupted fit had 3, now it is 4"):
        call("warmup", **options(data, parts, **fit | {"epochs": 4}, trainer={"callbacks": []}))
    assert call("warmup", **options(data, parts, **fit, trainer={"callbacks": []})) == 0
    assert "going on with the interrupted fit" in capsys.readouterr().out.replace("\n", " ")
    for name in ("adapter_model.safetensors", "non_lora.safetensors", "adam.safetensors"):
        first, second = load_file(whole / name), load_file(parts / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name
    manifests = [json.loads((folder / "icons.json").read_text()) for folder in (whole, parts)]
    for part in ("losses", "accuracy", "used"):
        assert manifests[0][part] == manifests[1][part]


def test_a_fit_goes_on_only_with_the_tasks_that_it_measured_before(data: Path, tmp_path: Path) -> None:
    images, task, out = tmp_path / "images", tmp_path / "task.json", tmp_path / "out"
    images.mkdir()
    picture, replaced = (LLAVA / "img0.png").read_bytes(), (LLAVA / "img1.png").read_bytes()
    (images / "img0.png").write_bytes(picture)
    records = json.loads(data.read_text())[:3]
    task.write_text(json.dumps(records))
    fit: dict[str, Any] = {"epochs": 2, "task": [f"a={task}:{images}"]}

    def again(*callbacks: Callback) -> int:
        return call("warmup", **options(data, out, **fit, trainer={"callbacks": list(callbacks)}))

    def check_refused(what: str) -> None:
        records[1]["conversations"][1]["value"] = "ho"
        task.write_text(json.dumps(records))
        with pytest.raises(ValueError, match=rf"data\.fingerprint: task a of {what} has '\w+', its file has '\w+'; "):
            again()
        records[1]["conversations"][1]["value"] = "hi"
        task.write_text(json.dumps(records))
        (images / "img0.png").write_bytes(replaced)
        with pytest.raises(ValueError, match=rf"img0\.png of row 0: .* than when task a of {what} was begun \("):
            again()
        (images / "img0.png").write_bytes(picture)

    assert again(Terminate()) == 75
    check_refused("the interrupted fit")
    assert again() == 0
    check_refused(f"the fit in {out}")
    assert again() == 0


@pytest.mark.slow
def test_two_ranks_train_are_stopped_and_go_on(data: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "icons", *words(data, tmp_path, "--epochs=12", "--checkpoint-minutes=0.001")]
    line += ["--trainer.devices=2", "--batch-size=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    begun = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 120
    while not (tmp_path / "last.ckpt").exists() and begun.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    begun.terminate()
    text, _ = begun.communicate(timeout=60)
    assert begun.returncode == 75, text
    step = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 72
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "icons.json").read_text())
    assert manifest["used"] == {"rows": 23, "fraction": 23 / 24, "steps": 72}
    assert manifest["losses"]["after"]["held-out"] < manifest["losses"]["before"]["held-out"]


def test_rows_are_drawn_from_one_order() -> None:
    rows, held = draw(1000, 0.05, 1, 0.02, seed=7)
    assert (len(rows), len(held)) == (50, 20) and not set(rows) & set(held)
    assert rows == sorted(rows) and set(rows) < set(draw(1000, 0.2, 1, 0.02, seed=7)[0])
    assert draw(1000, 0.05, 1, 0.02, seed=8)[0] != rows
    assert [len(part) for part in draw(1000, 0.05, 300, 0.0, seed=7)] == [300, 0]
    assert [len(part) for part in draw(10, 0.05, 300, 0.1, seed=7)] == [9, 1]
    assert [len(part) for part in draw(10**6, 1.0, 1, 0.02, seed=7)] == [10**6 - 256, 256]
    assert [len(part) for part in draw(1, 1.0, 1, 0.02, seed=7)] == [1, 0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"fraction": 0.0}, r"--fraction 0\.0: expected a share of the rows, above 0"),
        ({"fraction": 1.5}, r"--fraction 1\.5: expected a share"),
        ({"held_out": 1.0}, r"--held-out 1\.0: expected a share of the rows, from 0 to below 1"),
    ],
)
def test_shares_out_of_range_are_refused(given: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        draw(10, **{"fraction": 0.5, "min_rows": 1, "held_out": 0.0, "seed": 0} | given)  # type: ignore[arg-type]


def test_trainer_flags_that_contradict_options_are_refused() -> None:
    for flag, option in (("max_epochs", "--epochs"), ("precision", "--dtype"), ("accumulate_grad_batches", "--acc")):
        with pytest.raises(ValueError, match=rf"--trainer\.{flag} 2: use {option}"):
            trainer_flags({flag: 2}, 1, 1, "float32")
    with pytest.raises(ValueError, match=r"--trainer\.use_distributed_sampler True: expected False"):
        trainer_flags({"use_distributed_sampler": True}, 1, 1, "float32")


def test_trainer_flags_are_passed_on() -> None:
    flags = trainer_flags({"devices": 2, "gradient_clip_val": 0.3}, epochs=4, accumulate=5, dtype="bfloat16")
    assert flags["strategy"] == "ddp_find_unused_parameters_true"  # a batch without images leaves the projector unused
    assert (flags["max_epochs"], flags["accumulate_grad_batches"], flags["precision"]) == (4, 5, "bf16-mixed")
    assert flags["gradient_clip_val"] == 0.3
    for strategy in ("fsdp", "deepspeed_stage_2"):
        assert trainer_flags({"devices": 2, "strategy": strategy}, 1, 1, "float32")["strategy"] == strategy
    assert "strategy" not in trainer_flags({"devices": 1}, 1, 1, "float32")


@pytest.mark.filterwarnings("ignore")
def test_a_logger_holds_every_step_with_rate_task_losses_and_settings(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'log'}", "--fraction=0.5"]
    more += ["--epochs=2", "--task", f"a={LLAVA / 'data.json'}:{LLAVA}", "--trainer.val_check_interval=2"]
    assert main(words(data, out, *more)) == 0
    (metrics,) = (tmp_path / "log").rglob("metrics.csv")
    with metrics.open(newline="") as file:
        lines = list(csv.DictReader(file))
    losses = {int(line["step"]): float(line["loss"]) for line in lines if line["loss"]}
    assert sorted(losses) == list(range(6)), "from the first step on"
    assert len([line for line in lines if any(name.startswith("lr-") and line[name] for name in line)]) == 6
    measured = [float(line["loss/a"]) for line in lines if line["loss/a"]]
    assert len(measured) == 1 + 3 + 1, "before, after every second step, and at the end"
    manifest = open_warmup(out).manifest
    assert measured[0] == pytest.approx(manifest["losses"]["before"]["a"])
    assert measured[-1] == pytest.approx(manifest["losses"]["after"]["a"])
    (settings,) = (tmp_path / "log").rglob("hparams.yaml")
    assert "learning_rate: 0.01" in settings.read_text()


@pytest.mark.filterwarnings("ignore")
def test_callbacks_of_the_command_line_stop_a_fit_early(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--fraction=0.5", "--epochs=9", "--task", f"a={LLAVA / 'data.json'}:{LLAVA}"]
    more += [
        "--trainer.val_check_interval=1",
        "--trainer.callbacks=EarlyStopping",
        "--trainer.callbacks.monitor=loss/a",
    ]
    more += ["--trainer.callbacks.stopping_threshold=100"]  # any loss is good enough
    assert main(words(data, out, *more)) == 0
    assert open_warmup(out).manifest["used"]["steps"] == 1


def test_a_fit_without_a_terminal_reports_in_lines(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--fraction=0.5", "--held-out=0", "--trainer.enable_progress_bar=true"]
    assert main(words(data, tmp_path / "out", *more)) == 0
    assert "3/3 steps, " in capsys.readouterr().err


def test_the_final_fine_tune_is_not_told_that_it_has_hardly_learned(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(data, tmp_path / "out", "--learning-rate=1e-9", "--held-out=0.2")) == 0
    assert "hardly" not in capsys.readouterr().out


def test_one_callback_or_several_and_a_checkpoint_of_the_users_own() -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    one = ModelCheckpoint()
    assert trainer_flags({"callbacks": one}, 1, 1, "float32")["callbacks"] == [one]
    assert trainer_flags({"callbacks": [one]}, 1, 1, "float32")["enable_checkpointing"] is True
    assert trainer_flags({}, 1, 1, "float32")["callbacks"] == []
    assert trainer_flags({"val_check_interval": 0.5}, 1, 1, "float32")["check_val_every_n_epoch"] == 1
