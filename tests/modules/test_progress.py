"""Predict shows rows with their total, in place of Lightning's bar of batches, which has none."""

from pathlib import Path
from typing import Any

import pytest
import toy_predict as toy
from lightning import Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

from icons.modules.gradient_writer import GradientWriter
from icons.modules.progress import ProgressLines, RowProgress

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]
FLAGS: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
FLAGS |= {"enable_model_summary": False, "inference_mode": False, "use_distributed_sampler": False}


def predict(path: Path, bars: list[Any], **options: Any) -> GradientWriter:
    writer = GradientWriter(str(path), chunk_rows=8, **options)
    trainer = Trainer(callbacks=[*bars, writer], enable_progress_bar=bool(bars), **FLAGS)
    trainer.predict(toy.ToyExtractor(), datamodule=toy.ToyData(100), return_predictions=False)
    return writer


def counted(writer: GradientWriter) -> list[tuple[float | None, float]]:
    assert writer.progress is not None
    return [(task.total, task.completed) for task in writer.progress.bar.tasks]


@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])
def test_the_rows_of_the_units_still_to_do_are_the_total(
    tmp_path: Path, kind: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = kind()
    assert counted(predict(tmp_path / "s", [bar], shard="0/3")) == [(36.0, 36.0)], "units 0, 3, 6, 9 and 12"
    assert counted(predict(tmp_path / "s", [kind()])) == [(64.0, 64.0)], "what the shard has left"
    shown = capsys.readouterr()
    assert "36/36" in shown.err and "64/64" in shown.err and "Predicting" not in shown.out + shown.err
    assert bar.is_enabled, "for what the Trainer does next"


def test_a_bar_of_the_users_own_is_left_alone_and_none_stays_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Mine(ProgressBar):
        pass

    predict(tmp_path / "a", [Mine()])
    predict(tmp_path / "b", [])
    assert "100/100" not in capsys.readouterr().err


def test_a_second_writer_shows_no_second_bar() -> None:
    bar = TQDMProgressBar()
    trainer = Trainer(callbacks=[bar], **FLAGS)
    first, second = RowProgress(trainer), RowProgress(trainer)
    assert (first.as_lines, second.as_lines) == (True, False)
    second.advance(3)
    second.stop()
    assert bar.is_disabled
    first.stop()
    first.stop()
    assert bar.is_enabled


def test_a_log_gets_a_line_a_minute_with_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    lines = ProgressLines("rows", 1200, clock=lambda: now[0])
    for _ in range(12):
        now[0] += 10
        lines.advance(50, "loss 1")
    assert capsys.readouterr().err.splitlines() == [
        "300/1,200 rows, 5 a second, 0:01:00 so far, 0:03:00 left, loss 1",
        "600/1,200 rows, 5 a second, 0:02:00 so far, 0:02:00 left, loss 1",
    ]
    unknown = ProgressLines("steps", 0, every_s=0.0, clock=lambda: now[0])
    unknown.advance(3)
    assert capsys.readouterr().err.startswith("3 steps, ")


def test_without_a_terminal_a_prediction_ends_with_its_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(tmp_path / "s", [TQDMProgressBar()])
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("100/100 rows, ")]
