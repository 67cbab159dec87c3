"""What a fit leaves behind is the same under every strategy that can run here: one process, DDP, FSDP."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from icons.modules.warmup import WarmupModule

SCRIPT = Path(__file__).with_name("fit_on_ranks.py")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*treespec.*:FutureWarning", "ignore:You defined a `validation_step` but", "ignore:.*does not have many"
)


def fit_on_ranks(strategy: str, devices: int, out: Path) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, str(SCRIPT), strategy, str(devices), str(out)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
def test_one_process_ddp_and_fsdp_leave_the_same(tmp_path: Path) -> None:
    alone = fit_on_ranks("auto", 1, tmp_path / "alone.pt")
    assert alone["step"] == 6 and alone["betas"] == (0.9, 0.999) and alone["eps"] == 1e-8
    assert "model.layers.1.mlp.up_proj.weight" in alone["weights"]
    assert not any("layers.0" in name for name in alone["weights"])  # frozen
    for strategy in ("ddp", "fsdp"):
        ranks = fit_on_ranks(strategy, 2, tmp_path / "ranks.pt")
        assert (ranks["step"], ranks["betas"], ranks["eps"]) == (6, (0.9, 0.999), 1e-8)
        for part in ("weights", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ranks[part], alone[part], rtol=1e-4, atol=1e-7, msg=f"{strategy} {part}")
        for part in ("before", "after"):
            assert ranks[part]["task"]["loss"] == pytest.approx(alone[part]["task"]["loss"], rel=1e-5)
            assert ranks[part]["task"]["rows"] == 4  # both ranks have given their two


class Half(nn.Module):
    """Uses one of its two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.used.expand(*input_ids.shape, 5))


def test_a_parameter_without_a_gradient_has_zero_moments(tmp_path: Path) -> None:
    module = WarmupModule(Half(), tasks=())
    batch: Any = {"input_ids": torch.ones(1, 3).long(), "labels": torch.ones(1, 3).long(), "row": torch.zeros(1).long()}
    trainer = Trainer(
        default_root_dir=tmp_path,
        logger=False,
        max_epochs=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch], batch_size=None))
    outcome = module.outcome
    assert outcome is not None and outcome.step == 1
    assert torch.equal(outcome.exp_avg["unused"], torch.zeros(2, 3))  # float32 whatever the weight is
    assert outcome.exp_avg["used"].abs().sum() > 0 and outcome.exp_avg_sq["used"].abs().sum() > 0
    assert not outcome.weights["used"].requires_grad
