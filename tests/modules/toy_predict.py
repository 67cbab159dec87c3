"""A tiny regression model whose rows are gradients, and a script that stores them with `Trainer.predict`.

Run as `python toy_predict.py STORE [--option value ...]`; the tests import it too.
"""

import argparse
import time
import warnings
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn

from icons.datamodules.sampler import UnitBatchSampler, unit_dataloader
from icons.modules.gradient_writer import GradientWriter
from icons.partition import UnitPlan

WIDTH = 24


class ToyData(LightningDataModule):
    """Rows of noise; every 7th row fails; lengths differ, so that batches are not in the order of rows."""

    def __init__(self, num_rows: int, batch_size: int = 4, broken: frozenset[int] | None = None, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed
        self.dataset = range(num_rows)
        self.broken = frozenset(range(0, num_rows, 7)) if broken is None else broken
        self.plan: UnitPlan | None = None

    def describe(self) -> dict[str, Any]:
        return {"data": {"fingerprint": f"toy-{self.seed}", "num_rows": len(self.dataset)}}

    def lengths(self, rows: Any) -> list[int]:
        return [1 + row * 37 % 11 for row in rows]

    def collate(self, rows: list[int]) -> dict[str, Tensor]:
        good = [row for row in rows if row not in self.broken]
        noise = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(self.seed * 1000 + row)) for row in good]
        return {
            "x": torch.stack(noise) if noise else torch.empty(0, WIDTH),
            "row": torch.tensor(good, dtype=torch.int64),
            "failed_row": torch.tensor([row for row in rows if row in self.broken], dtype=torch.int64),
        }

    def predict_dataloader(self) -> Any:
        assert self.plan is not None
        sampler = UnitBatchSampler(self.plan, self.lengths, self.batch_size)
        return unit_dataloader(self.dataset, sampler, self.collate)


class ToyExtractor(LightningModule):
    """The gradient of a tanh regression's loss, one row per sample, as the sum over the batch would mix it."""

    def __init__(self, pause_s: float = 0.0, slow_rank: int | None = None, failing_rank: int | None = None) -> None:
        super().__init__()
        self.slow_rank, self.failing_rank = slow_rank, failing_rank
        torch.manual_seed(3)
        self.model, self.pause_s = nn.Linear(WIDTH, WIDTH), pause_s

    def describe(self) -> dict[str, Any]:
        return {
            "model": {"fingerprint": "toy"},
            "adapter": {"fingerprint": "toy", "parameters": WIDTH},
            "projector": {"kind": "identity", "dim": WIDTH, "seed": 0},
        }

    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        time.sleep(self.pause_s * (10 if self.slow_rank == self.global_rank else 1))
        if self.failing_rank == self.global_rank and batch_idx == 2:
            raise RuntimeError("out of memory")
        x = batch["x"].clone().requires_grad_()
        loss = torch.tanh(self.model(x)).square().mean(dim=1)
        gradient = torch.autograd.grad(loss.sum(), x)[0] if len(x) else torch.empty(0, WIDTH)
        failed = len(batch["failed_row"])
        nan = torch.full((failed,), float("nan"))
        return {
            "row": torch.cat([batch["row"], batch["failed_row"]]),
            "status": torch.cat([torch.ones(len(x)), torch.full((failed,), 3.0)]).to(torch.uint8),
            "gradient": torch.cat([gradient, torch.zeros(failed, WIDTH)]),
            "norm": torch.cat([gradient.norm(dim=1), nan]),
            "loss": torch.cat([loss.detach(), nan]),
            "tokens": torch.cat([torch.full((len(x),), 5), torch.zeros(failed)]).to(torch.int32),
        }


def predict(
    path: str,
    *,
    rows: int,
    pause_s: float = 0.0,
    slow_rank: int | None = None,
    failing_rank: int | None = None,
    data: ToyData | None = None,
    **options: Any,
) -> GradientWriter:
    """Fills a store; options with the prefix `trainer_` go to the Trainer, all others to the writer."""
    flags = {name[8:]: options.pop(name) for name in list(options) if name.startswith("trainer_")}
    writer = GradientWriter(path, **options)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*srun.*")
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "inference_mode": False,
            "use_distributed_sampler": False,
            "callbacks": [writer],
        }
        | flags
    )
    extractor = ToyExtractor(pause_s, slow_rank, failing_rank)
    trainer.predict(extractor, datamodule=data or ToyData(rows), return_predictions=False)
    return writer


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--chunk-rows", type=int, default=8)
    parser.add_argument("--pause-s", type=float, default=0.0)
    parser.add_argument("--slow-rank", type=int, help="one whose batches take ten times as long")
    parser.add_argument("--failing-rank", type=int, help="one whose third batch fails")
    parser.add_argument("--shard")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=1)
    given = parser.parse_args()
    strategy = "ddp" if given.devices * given.nodes > 1 else "auto"
    predict(
        given.path,
        rows=given.rows,
        pause_s=given.pause_s,
        chunk_rows=given.chunk_rows,
        shard=given.shard,
        slow_rank=given.slow_rank,
        failing_rank=given.failing_rank,
        trainer_devices=given.devices,
        trainer_num_nodes=given.nodes,
        trainer_strategy=strategy,
    )


if __name__ == "__main__":
    main()
