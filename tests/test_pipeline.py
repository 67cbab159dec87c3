"""The whole method on tiny data, by the command line and by the library: the same rows, bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
from lightning import Trainer

import icons
from icons.cli import command_line as cli
from icons.cli.model_source import ModelSource
from icons.cli.options.groups import CheckpointOptions
from icons.models.folder import ModelFolder

DATA = Path(__file__).parent / "data" / "original_llava"
ROWS, DIM = 6, 64
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def run(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0


def by_command_line(folder: Path, pool: Path) -> None:
    """Warm-up, gradients of pool and task, influence, selection, report, export."""
    task, cpu = DATA / "data.json", ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    parts = ["--vision-tower", DATA / "clip", "--mm-projector", DATA / "mm_projector.bin"]
    run(
        "warmup", "--model", DATA / "vicuna-tiny", *parts, "--data", pool, "--images", DATA, "--lora-rank", 2,
        "--min-rows", 1, "--batch-size", 2, "--task", f"tiny={task}:{DATA}", "--out", folder / "warmup", *cpu,
    )  # fmt: skip
    rows = ["--checkpoint", folder / "warmup", "--images", DATA, "--dim", DIM, "--batch-size", 2, "--chunk-rows", 4]
    run("gradients", *rows, "--data", pool, "--preconditioner", "adam", "--out", folder / "train.zarr", *cpu)
    run("gradients", *rows, "--data", task, "--preconditioner", "none", "--out", folder / "task.zarr", *cpu)
    stores = ["--train", folder / "train.zarr", "--task", f"tiny={folder / 'task.zarr'}"]
    run("influence", *stores, "--out", folder / "scores.zarr", "--accelerator", "cpu")
    scored = ["--scores", folder / "scores.zarr", "--data", pool]
    run("select", *scored, "--fraction", 0.5, "--out", folder / "selected.json")
    run("report", *scored, "--selection", folder / "selected.json", "--images", DATA, "--out", folder / "report.html")
    run("export", "--checkpoint", folder / "warmup", "--out", folder / "exported")


def test_command_line_and_library_agree_bit_for_bit(tmp_path: Path) -> None:
    pool = tmp_path / "pool.json"
    twice = json.loads((DATA / "data.json").read_text()) * 2
    pool.write_text(json.dumps([{**record, "id": str(row)} for row, record in enumerate(twice)]))
    by_command_line(tmp_path, pool)
    assert ModelFolder.open(tmp_path / "exported").layout == "huggingface"
    assert "<html" in (tmp_path / "report.html").read_text()

    source = ModelSource.resolve(CheckpointOptions(checkpoint=tmp_path / "warmup"))
    model = source.load(target="lora", dtype="auto", attention="sdpa", quantize=None)
    made = {}
    for name, file, form in (("train", pool, "adam"), ("task", DATA / "data.json", "none")):
        preconditioner = icons.load_adam_state(tmp_path / "warmup", model) if form == "adam" else None
        extractor = icons.GradientExtractor(model, icons.CountSketch(DIM, seed=0), preconditioner)
        data = icons.ConversationDataModule(
            file, DATA, model_folder=source.folder, preprocessing=source.preprocessing, batch_size=2
        )
        writer = icons.GradientWriter(tmp_path / f"library-{name}.zarr", chunk_rows=4)
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            inference_mode=False, use_distributed_sampler=False, callbacks=[writer],
        )  # fmt: skip
        trainer.predict(extractor, datamodule=data, return_predictions=False)
        made[name] = icons.GradientStore.open(tmp_path / f"library-{name}.zarr")
        told = icons.GradientStore.open(tmp_path / f"{name}.zarr")
        assert made[name].counts()["failed"] == made[name].counts()["missing"] == 0
        for field in ("gradients", "norm", "loss", "tokens", "status"):
            assert np.array_equal(getattr(made[name], field)[:], getattr(told, field)[:]), (name, field)
        for entry in ("data", "model", "adapter", "projector", "preconditioner", "preprocessing"):
            assert made[name].manifest[entry] == told.manifest[entry], (name, entry)
        assert told.manifest["target"] == "lora"
        assert "has hardly learned" in told.manifest["warnings"][0]  # one step on tiny data

    scores = icons.influence(made["train"], {"tiny": made["task"]})
    assert np.array_equal(scores.numpy(), icons.ScoreStore.open(tmp_path / "scores.zarr").influence[:])
    rows = icons.select(scores, fraction=0.5).rows
    assert len(rows) == ROWS // 2
    records = json.loads(pool.read_text())
    assert json.loads((tmp_path / "selected.json").read_text()) == [records[row] for row in rows]
