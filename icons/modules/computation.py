"""Computation: what beside model and data decides about a row's last bits: flags, kernels, batches, threads."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule, Trainer

from icons.modules.sharding import check_strategy
from icons.store.row_store import RowStore

_MIXED = "mixed"


def check_trainer(trainer: Trainer, writer: str) -> None:
    """
    Raises:
        ValueError: flags under which the rows of `writer` would be wrong.
    """
    check_strategy(trainer.strategy)
    if trainer.predict_loop.inference_mode:
        raise ValueError(
            f"{writer}: got Trainer(inference_mode=True), under which every gradient is a silent zero; expected "
            "Trainer(inference_mode=False)"
        )
    if trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError(
            f"{writer}: got Trainer(use_distributed_sampler=True), under which ranks would share units; expected "
            "Trainer(use_distributed_sampler=False): the writer gives every rank its own units"
        )


def computation(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """The manifest's part on how numbers are computed, where neither model nor data say it."""
    # of every part: a LLaVA's own config says nothing of its parts' kernels
    configs = (getattr(module, "config", None) for module in pl_module.modules())
    kernels = {str(kernel) for config in configs if (kernel := getattr(config, "_attn_implementation", None))}
    return {"computation": {"precision": str(trainer.precision), "attention": ", ".join(sorted(kernels)) or None}}


def batches_of(datamodule: Any) -> dict[str, Any]:
    """What decides which rows stand in a batch together."""
    return {name: getattr(datamodule, name, None) for name in ("batch_size", "max_tokens")}


def check_batches(store: RowStore, own: Mapping[str, Any], mixed: bool) -> None:
    """Who stands beside a row in its batch changes the row's last bits. With `mixed` the store's manifest says so.

    Raises:
        ValueError: the store was begun with other batches, and `mixed` is not set.
    """
    begun = store.facts.batches
    if begun == own:
        return
    if not mixed:
        raise ValueError(
            f"batches: the store {store.path} has {begun!r}, this run has {own!r}; a row's last bits depend on its "
            "batch: give the same --batch-size and --max-tokens, or --mixed-batches to go on all the same"
        )
    store.amend(batches=_MIXED)


def adopt_threads(trainer: Trainer, store: RowStore) -> int | None:
    """On a CPU a sum's last bits depend on the number of threads that share it: this rank takes as many as the store
    was begun with, so that neither ranks nor a resume make a difference. How many it had, if it had others."""
    begun, own = store.facts.settings.threads, torch.get_num_threads()
    if not begun or begun == own or trainer.strategy.root_device.type != "cpu":
        return None
    if trainer.is_global_zero:
        print(f"{store.path}: {begun} threads a rank, with which it was begun ({own} otherwise)", file=sys.stderr)
    torch.set_num_threads(begun)
    return own
