"""Run by test_moments.py in processes of its own: a fit under a strategy; rank 0 saves what it leaves behind."""

import sys
from dataclasses import asdict
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from icons.modules.warmup import WarmupModule


class FsdpOnCpu(FSDPStrategy):
    """Lightning's strategy but for the device, which it takes to be a GPU."""

    def _setup_model(self, model: nn.Module) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def batch(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 24, (2, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "row": torch.arange(2)}


def main(strategy: Any, devices: int, out: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.model.layers[0].requires_grad_(False)
    module = WarmupModule(model, learning_rate=1e-2, tasks=["task"])
    trainer = Trainer(
        strategy=FsdpOnCpu(process_group_backend="gloo") if strategy == "fsdp" else strategy,
        devices=devices,
        accelerator="cpu",
        max_epochs=2,
        num_sanity_val_steps=-1,
        use_distributed_sampler=False,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches: Any = [batch(seed) for seed in range(3)]
    trainer.fit(module, DataLoader(batches, batch_size=None), [DataLoader([batch(9)], batch_size=None)])  # type: ignore[arg-type]
    if trainer.is_global_zero:
        assert module.outcome is not None
        torch.save(asdict(module.outcome) | {"before": module.before, "after": module.after}, out)
    else:
        assert module.outcome is None


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
