"""Rows of tiny LLaVAs through `Trainer.predict`, the model shared by the ranks; one has rows that are not finite.

Run as `python sharded_predict.py FOLDER`: two ranks of which one dies, two of which one fails, three that go on; two
nodes of two ranks and a copy each, of which one rank dies, and that go on, train and score; and two ranks that train by
command (`sharded_commands.py`), sharing the model and, for comparison, not.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

sys.path.insert(0, str(Path(__file__).parents[1] / "gradients"))
import sharded_commands
from small_models import IMAGE, llama, llava, text_batch, with_lora

from icons.datamodules.sampler import UnitBatchSampler, unit_dataloader
from icons.gradients import per_sample_gradients
from icons.models.loading import checkpoint_layers
from icons.modules.extractor import GradientExtractor
from icons.modules.gradient_writer import GradientWriter
from icons.modules.sharding import frozen_in, shard, units
from icons.modules.shared_model_strategy import SharedModelStrategy
from icons.modules.task_vectorizer import TaskVectorizer
from icons.modules.warmup import WarmupModule
from icons.partition import UnitPlan
from icons.projection import Identity
from icons.store import GradientStore

ROWS, CHUNK_ROWS, BROKEN = 17, 3, (4, 9)
KINDS = ("language", "tower")
FLAGS: dict[str, Any] = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "inference_mode": False, "use_distributed_sampler": False,
}  # fmt: skip


def ranks(strategy: type[ModelParallelStrategy] = ModelParallelStrategy) -> dict[str, Any]:
    """The Trainer's flags for this process, which may be one of several ranks, and these on several nodes."""
    count, each = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if count == 1:
        return {"accelerator": "cpu", "devices": 1}
    chosen = SharedModelStrategy("node") if count > each else strategy()
    return {"accelerator": "cpu", "devices": each, "num_nodes": count // each, "strategy": chosen}


def model_of(kind: str) -> nn.Module:
    """LoRA on the language model; or on the vision tower too, which takes a backward pass per sample, checkpointed."""
    torch.manual_seed(5)
    targets = r".*language_model.*(q|up)_proj$" if kind == "language" else r".*(language_model|vision_tower).*q_proj$"
    model = with_lora(llava(), targets)
    if kind == "tower":
        checkpoint_layers(model)
        model.eval()
    return model


def sample(row: int) -> dict[str, Tensor]:
    """Two rows of three have an image; those of `BROKEN` one that is not finite."""
    generator = torch.Generator().manual_seed(row)
    ids = torch.randint(3, 60, (1, 6 + row * 7 % 9), generator=generator)
    labels = ids.clone()
    labels[:, : 3 + row % 3] = -100
    found = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if row % 3 != 2:
        ids[:, 1:5] = IMAGE
        labels[:, 1:5] = -100
        pixels = torch.randn(1, 3, 8, 8, generator=generator)
        found["pixel_values"] = pixels * (torch.inf if row in BROKEN else 1)
    return found


def collate(rows: list[int]) -> dict[str, Tensor]:
    samples = [sample(row) for row in rows]
    longest = max(each["labels"].shape[1] for each in samples)
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}

    def padded(name: str) -> Tensor:
        pads = [(0, longest - each[name].shape[1]) for each in samples]
        values = [
            nn.functional.pad(each[name], pad, value=fills[name]) for each, pad in zip(samples, pads, strict=True)
        ]
        return torch.cat(values)

    found = {name: padded(name) for name in fills} | {"row": torch.tensor(rows)}
    images = [each["pixel_values"] for each in samples if "pixel_values" in each]
    return found | ({"pixel_values": torch.cat(images)} if images else {})


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.dataset, self.plan = range(ROWS), None

    def describe(self) -> dict[str, Any]:
        return {"data": {"fingerprint": "rows", "num_rows": ROWS}}

    def predict_dataloader(self) -> Any:
        plan: UnitPlan | None = self.plan
        assert plan is not None
        sampler = UnitBatchSampler(plan, lambda rows: [sample(row)["labels"].shape[1] for row in rows], 2)
        return unit_dataloader(self.dataset, sampler, collate)


class Dies(Callback):
    """Ends the second rank at a batch, as a machine ends that loses its power."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, _: int = 0) -> None:
        if trainer.global_rank == 1 and batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


class Waits(Callback):
    """Has the first node's ranks begin when the second node's have nothing left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        while trainer.node_rank == 0 and len([*self.folder.glob("*.ended")]) < 2:
            time.sleep(0.01)

    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        (self.folder / f"{trainer.global_rank}.ended").touch()


class Batches(IterableDataset[Any]):
    """Without a length, since a rank may have none."""

    def __init__(self, batches: list[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return map(collate, self.batches)


def vectors(model: nn.Module) -> TaskVectorizer:
    """Two tasks' vectors, the second task being longer; each is one rank's, and a third rank has none."""
    vectorizer = TaskVectorizer(model, ["first", "second"])
    place, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rows = [[[0, 1]], [[2, 3], [5, 6], [4]]]
    own = [task if number % count == place else [] for number, task in enumerate(rows)]
    loaders = [DataLoader(Batches(task), batch_size=None) for task in own]
    Trainer(**ranks(), **FLAGS).predict(vectorizer, loaders, return_predictions=False)
    return vectorizer


def predict(folder: Path, kind: str, ends: Callback | None = None, model: nn.Module | None = None) -> GradientExtractor:
    trainer = Trainer(
        **ranks(),
        callbacks=[
            *([] if ends is None else [ends]),
            GradientWriter(folder / f"{kind}.zarr", dtype="float32", chunk_rows=CHUNK_ROWS),
        ],
        **FLAGS,
    )
    extractor = GradientExtractor(model or model_of(kind), Identity())
    trainer.predict(extractor, datamodule=Data(), return_predictions=False)
    return extractor


class Fails(Dies):
    """Ends the second rank's work at a batch with an error."""

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, _: int = 0) -> None:
        if trainer.global_rank == 1 and batch_idx == self.batch:
            raise ValueError("the second rank has had enough")


class Saves(Callback):
    """Saves a checkpoint after the second step."""

    def __init__(self, path: Path) -> None:
        self.path, self.done = path, False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2 and not self.done:
            self.done = True
            trainer.save_checkpoint(self.path)


def fit(folder: Path, resume: bool = False) -> WarmupModule:
    """Trains on batches of two rows: on each rank its own, or, which is the same, accumulated by one."""
    place, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    model = model_of("language")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    warmup = WarmupModule(model, learning_rate=1e-2, tasks=["task"])
    checkpoint = folder / f"fit{count}.ckpt"
    trainer = Trainer(
        **ranks(SharedModelStrategy),
        accumulate_grad_batches=4 // count,
        callbacks=[] if resume else [Saves(checkpoint)],
        **(FLAGS | {"max_epochs": 1, "num_sanity_val_steps": -1, "gradient_clip_val": 0.5}),
    )
    batches: Any = [collate([row, row + 1]) for row in (0, 5, 2, 7, 10, 13, 1, 6, 11, 12, 14, 15)]
    held: Any = [collate([row, row + 1]) for row in (11, 12, 14, 15)]
    loaders = [DataLoader(part[place::count], batch_size=None) for part in (batches, held)]
    trainer.fit(warmup, loaders[0], [loaders[1]], ckpt_path=checkpoint if resume else None)
    return warmup


def fit_rank(folder: Path) -> None:
    """Trains twice, the second time from the checkpoint; the first rank keeps what both leave."""
    for resume in (False, True):
        warmup = fit(folder, resume)
        assert (warmup.outcome is None) == (os.environ["RANK"] != "0")
        if warmup.outcome is not None:
            torch.save(asdict(warmup.outcome) | {"after": warmup.after}, folder / f"resumed_{resume}.pt")
    assert (folder / "fit4.ckpt").stat().st_size < 200_000, "nothing of the base model"


def rank(folder: Path, ends: Callback | None, kinds: Sequence[str] = KINDS) -> None:
    for kind in kinds:
        model = model_of(kind)
        if kind == "language":
            for task, total in vectors(model).totals.items():
                torch.save(total, folder / f"{task}.pt")
        extractor = predict(folder, kind, ends, model)
        held = sum(value.to_local().numel() for value in extractor.parameters() if not value.requires_grad)
        whole = sum(value.numel() for value in model_of(kind).parameters() if not value.requires_grad)
        assert held < whole / int(os.environ["LOCAL_WORLD_SIZE"]) * 1.2, (
            "each rank holds its part of the frozen weights"
        )


def odd() -> nn.Module:
    """Has frozen weights in two precisions, of one row or none, of no dimension; tied ones, and a trained copy."""
    model: Any = llama(num_hidden_layers=6, hidden_size=20, num_attention_heads=2, tie_word_embeddings=True).bfloat16()
    model.model.layers[0].few = nn.ParameterList([torch.ones(1, 5), torch.ones(0, 3), torch.tensor(1.0)])
    return with_lora(model, r".*(q|down)_proj", modules_to_save=["embed_tokens"])


def compute_odd() -> None:
    """Rows are those of the whole model, of which no more than two layers, and what is in none, are there at a time."""
    expected, model, count = per_sample_gradients(odd(), text_batch()), odd(), int(os.environ["LOCAL_WORLD_SIZE"])
    layers = units(model)
    assert len(layers) == 6, "tied weights are in no layer"
    apart = [sum(weight.numel() for weight in frozen_in(layer)) for layer in layers]
    total = sum(weight.numel() for weight in frozen_in(model))
    lockstep = shard(model, torch.device("cpu"), [[0, 1], [2, 3]])
    assert torch.equal(per_sample_gradients(model, text_batch()), expected)
    whole: list[int] = []

    def look(*_: Any) -> None:
        whole.append(sum(weight.numel() for weight in frozen_in(model) if not isinstance(weight, DTensor)))

    def follow(_: nn.Module, __: Any, output: Tensor) -> None:
        look()
        output.register_hook(look)

    for layer in layers:
        layer.register_forward_hook(follow)
    model(text_batch()["input_ids"]).logits.float().sum().backward()
    lockstep.end()
    assert len(whole) == 12 and total - sum(apart) < max(whole) <= total - sum(apart) + 2 * max(apart)
    held: Any = [weight.to_local().numel() for weight in frozen_in(model) if weight.dim()]  # type: ignore[operator]
    assert abs(sum(held) * count - total) < 0.1 * total, "each rank holds its part of what is frozen"


def forked(count: int, run: Callable[[], None], nodes: int = 1) -> list[int]:
    """Runs ranks, as torchrun sets them up, and waits; how each ended. Forked: to import everything takes seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    each = count // nodes
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": each}
    places |= {"TORCHELASTIC_RUN_ID": "tests"}
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            own = places | {"RANK": number, "LOCAL_RANK": number % each, "GROUP_RANK": number // each}
            os.environ |= {name: str(value) for name, value in own.items()}
            rank_zero_only.rank = number  # as it is where ranks import Lightning on their own
            status = 1
            try:
                run()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def go_on(folder: Path) -> None:
    rank(folder, Waits(folder), KINDS[:1])
    compute_odd()


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    nodes = folder / "nodes"
    nodes.mkdir()
    for count, ends in ((2, Dies(3)), (2, Fails(1)), (3, None)):
        print(json.dumps(forked(count, partial(rank, folder, ends))), flush=True)
    print(json.dumps(forked(4, partial(rank, nodes, Dies(1), KINDS[:1]), nodes=2)), flush=True)
    (nodes / "after_death.json").write_text(json.dumps(GradientStore.open(nodes / "language.zarr").status[:].tolist()))
    print(json.dumps(forked(4, partial(go_on, nodes), nodes=2)), flush=True)
    print(json.dumps(forked(4, partial(fit_rank, folder), nodes=2)), flush=True)
    for strategy in ("model_parallel", "ddp"):
        print(json.dumps(forked(2, partial(sharded_commands.warm_up_rank, folder, 2, strategy))), flush=True)
    print(json.dumps(forked(4, partial(sharded_commands.on_two_nodes, folder), nodes=2)), flush=True)


if __name__ == "__main__":
    main()
