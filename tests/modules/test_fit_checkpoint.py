"""A fit that was stopped and resumed ends where one ends that was left alone, bit for bit."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from torch import Tensor, nn

from icons.modules.fit import check_resumable
from icons.modules.fit_checkpoint import FitCheckpoint, Interrupted, checkpoint_of
from icons.modules.fit_lock import SameStart, alone_in

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning")


class Dropped(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.seen: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch[0, 0].item())
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches > 0  # makes the data loader early
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Batches:
    """Ten batches that remember their place, as a training data loader does."""

    def __init__(self) -> None:
        self.start = self.given = 0

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[Tensor]:
        self.given, self.start = self.start, 0
        while self.given < 10:
            self.given += 1
            yield torch.full((2, 4), float(self.given))

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given % 10}  # a finished epoch leaves nothing to skip

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["given"]


class Terminate(Callback):
    def __init__(self, epoch: int, batch: int) -> None:
        self.at = (epoch, batch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(
    folder: Path, *callbacks: Callback, minutes: float = 15.0, accumulate: int = 1, resume: bool = False
) -> Dropped:
    module = Dropped()
    trainer = Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        max_epochs=3,
        accumulate_grad_batches=accumulate,
        callbacks=[*callbacks, FitCheckpoint(folder, minutes, seed=3)],
    )
    try:
        trainer.fit(module, Batches(), ckpt_path=folder / "last.ckpt" if resume else None)
    except Interrupted:
        assert not resume
    return module


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("at", [(0, 0), (1, 4), (1, 9), (2, 8), (2, 9)])
def test_a_terminated_fit_resumes_bit_for_bit(tmp_path: Path, at: tuple[int, int], accumulate: int) -> None:
    whole = fit(tmp_path, accumulate=accumulate)
    assert not (tmp_path / "last.ckpt").exists()
    before = signal.getsignal(signal.SIGTERM)
    first = fit(tmp_path, Terminate(*at), accumulate=accumulate)
    assert signal.getsignal(signal.SIGTERM) == before
    rest = fit(tmp_path, accumulate=accumulate, resume=True)
    assert first.seen + rest.seen == whole.seen
    for name, value in rest.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_it_is_saved_every_so_many_minutes(tmp_path: Path) -> None:
    fit(tmp_path, minutes=60.0)
    assert not (tmp_path / "last.ckpt").exists()
    fit(tmp_path, minutes=0.0)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 30


def test_the_checkpoint_before_is_kept_and_taken_when_the_last_one_cannot_be_read(tmp_path: Path) -> None:
    fit(tmp_path, minutes=0.0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["before.ckpt", "last.ckpt"]
    said: list[str] = []
    assert checkpoint_of(tmp_path, said.append, check_resumable) == tmp_path / "last.ckpt" and not said
    last = tmp_path / "last.ckpt"
    for content in (b"", last.read_bytes()[:-100]):
        last.write_bytes(content)
        said.clear()
        assert checkpoint_of(tmp_path, said.append, check_resumable) == tmp_path / "before.ckpt"
        assert len(said) == 1 and said[0].startswith(f"{last}: cannot be read as the checkpoint of a fit (")
    (tmp_path / "before.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"last.ckpt: cannot be read as the checkpoint of a fit"):
        checkpoint_of(tmp_path, said.append, check_resumable)


@pytest.mark.parametrize("killed_at", ["saving", "flush_tree", "replace"])
def test_a_fit_that_is_killed_while_it_saves_keeps_a_checkpoint_that_can_be_read(
    tmp_path: Path, killed_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path, minutes=0.0)

    class Killed(Exception):
        pass

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    def half(self: Trainer, path: Path, *_: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise Killed

    if killed_at == "saving":
        monkeypatch.setattr(Trainer, "save_checkpoint", half)
    else:
        monkeypatch.setattr(
            "icons.modules.fit_checkpoint.flush_tree"
            if killed_at == "flush_tree"
            else "icons.modules.fit_checkpoint.Path.replace",
            kill,
        )
    with pytest.raises(Killed):
        fit(tmp_path, minutes=0.0)
    found = checkpoint_of(tmp_path, lambda said: None, check_resumable)
    assert found is not None and torch.load(found, weights_only=True)["global_step"] in (29, 30)


def test_sigusr1_stops_a_fit_as_sigterm_does_and_lightning_acts_on_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "icons"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    class Usr1(Terminate):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if (trainer.current_epoch, batch_idx) == self.at:
                os.kill(os.getpid(), signal.SIGUSR1)

    whole = fit(tmp_path / "whole")
    first = fit(tmp_path / "fit", Usr1(1, 4))
    rest = fit(tmp_path / "fit", resume=True)
    assert first.seen + rest.seen == whole.seen and not list(tmp_path.rglob("hpc_ckpt*"))
    for name, value in rest.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_a_second_fit_in_a_folder_waits_for_the_first_and_then_says_so(tmp_path: Path) -> None:
    said = "another run is training there; wait until it has ended and run the same line again, or give another folder"
    with alone_in(tmp_path) as first, alone_in(tmp_path, patience_s=0.0) as second:
        assert first is None and said in str(second)
    with alone_in(tmp_path, patience_s=0.0) as first, alone_in(tmp_path / "not there yet", patience_s=0.0) as second:
        assert first is second is None


def test_ranks_that_nothing_numbers_yet_do_not_keep_each_other_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MPIEnvironment, "detect", lambda: True)
    with alone_in(tmp_path) as first, alone_in(tmp_path, patience_s=0.0) as second:
        assert first is second is None


def test_ranks_begin_from_what_rank_0_has_found_or_end_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(refused: ValueError | None, last: Path | None) -> None:
        SameStart(refused, last).setup(trainer, Dropped(), "fit")

    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    monkeypatch.setattr(trainer.strategy, "broadcast", lambda found, src: (None, tmp_path / "last.ckpt"))
    begin(None, tmp_path / "last.ckpt")
    begin(ValueError("rank 0 alone has looked"), tmp_path / "last.ckpt")
    with pytest.raises(
        ValueError, match=r"has changed while the ranks began \(rank 0 goes on with .*last.ckpt, another "
    ):
        begin(None, None)
    refused = ValueError("another run is training there")
    monkeypatch.setattr(trainer.strategy, "broadcast", lambda found, src: (refused, None))
    with pytest.raises(ValueError, match=r"another run is training there"):
        begin(None, tmp_path / "last.ckpt")
