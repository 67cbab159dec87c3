"""A model shared by several ranks gives the rows of one process, whatever each rank has to do."""

import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import sharded_predict
import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from sharded_commands import factors, score, warm_up, write_data
from sharded_predict import BROKEN, CHUNK_ROWS, KINDS, ROWS, fit, model_of, predict, sample, vectors
from small_models import llama, one_by_one, with_lora
from torch import nn

from icons.batch import Status
from icons.cli.gradients import predict_flags
from icons.models.tensor_files import read_tensors
from icons.modules import sharding
from icons.modules.fit import trainer_flags
from icons.modules.named_strategy import named_strategy, predicting_strategy
from icons.modules.sharding import check_strategy, copies_of, shard, units
from icons.modules.shared_model_strategy import SharedModelStrategy
from icons.modules.warmup import WarmupModule
from icons.store import GradientStore, ScoreStore

SCRIPT = Path(sharded_predict.__file__)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ranks leave that share a model: one of two is killed, one of two fails, three go on; on two nodes one of
    four is killed, four go on, four train; two train by command, and four score and sum up factors."""
    folder = tmp_path_factory.mktemp("shared")
    write_data(folder)
    assert warm_up(folder, folder / "alone", ranks=1) == 0
    ended = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=600)
    expected = [[1, -9], [1, 1], [0] * 3, [1, -9, 1, 1], *[[0] * 4] * 2, *[[0] * 2] * 2, [0] * 4]
    assert [json.loads(line) for line in ended.stdout.splitlines()] == expected, ended.stderr[-3000:]
    assert "another rank of this run has died, and with it its part of the model" in ended.stderr
    assert "another rank of this run has ended with an error: the second rank has had enough" in ended.stderr
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ranks_that_share_a_model_store_the_rows_of_one_process_also_after_a_kill(shared: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    for kind in KINDS:
        predict(whole, kind)
    for kind in KINDS:
        store, other = GradientStore.open(shared / f"{kind}.zarr"), GradientStore.open(whole / f"{kind}.zarr")
        assert store.manifest["model"] == other.manifest["model"], "a store may be gone on with either way"
        expected = [Status.NON_FINITE if row in BROKEN else Status.DONE for row in range(ROWS)]
        assert store.status[:].tolist() == expected
        assert ROWS % CHUNK_ROWS and store.partition.num_units % 3 == 0
        np.testing.assert_array_equal(store.gradients[:], other.gradients[:])
        model = model_of(kind)
        for row in set(range(ROWS)) - set(BROKEN):
            alone = one_by_one(model, sample(row) | {"row": torch.tensor([row])})[0]
            error = np.linalg.norm(store.gradients[row] - alone.numpy()) / float(alone.norm())
            assert error < 1e-6, (kind, row, error)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_nodes_that_have_a_copy_each_store_the_same_rows_and_none_waits_for_another_s_layers(shared: Path) -> None:
    """The first node's ranks began when the second's had nothing left. When a rank of the first died, its neighbour
    ended, and the other node did its work."""
    whole, nodes = (GradientStore.open(folder / "language.zarr") for folder in (shared, shared / "nodes"))
    np.testing.assert_array_equal(nodes.gradients[:], whole.gradients[:])
    np.testing.assert_array_equal(nodes.status[:], whole.status[:])
    after_death = json.loads((shared / "nodes" / "after_death.json").read_text())
    ranks = [row // CHUNK_ROWS % 4 for row in range(ROWS)]
    assert all(status for status, rank in zip(after_death, ranks, strict=True) if rank >= 2)
    assert not all(status for status, rank in zip(after_death, ranks, strict=True) if rank == 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ranks_that_share_a_model_find_the_task_vectors_of_one_process(shared: Path) -> None:
    for task, total in vectors(model_of("language")).totals.items():
        for folder in (shared, shared / "nodes"):
            found = torch.load(folder / f"{task}.pt", weights_only=True)
            assert all(torch.equal(found[name], value) for name, value in total.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ranks_that_share_a_model_train_what_one_process_trains(shared: Path, tmp_path: Path) -> None:
    for resume in (False, True):  # from a checkpoint after the second step
        alone = fit(tmp_path, resume=resume)
        assert alone.outcome is not None and alone.outcome.step == 3
        expected = asdict(alone.outcome)
        found = torch.load(shared / f"resumed_{resume}.pt", weights_only=True)
        assert found["step"] == 3 and set(found["weights"]) == set(expected["weights"])
        for part in ("weights", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(found[part], expected[part], rtol=1e-5, atol=1e-7, msg=part)
        assert found["after"]["task"] == pytest.approx(alone.after["task"], rel=1e-5)


@pytest.mark.slow
def test_a_warm_up_by_command_on_ranks_that_share_a_model_is_that_of_ranks_that_do_not(shared: Path) -> None:
    """To the last bit; and one process's to rounding, which Adam makes large where a gradient is next to nothing."""
    for name in ("adapter_model.safetensors", "non_lora.safetensors", "adam.safetensors"):
        found, ddp, alone = (read_tensors(shared / folder / name) for folder in ("model_parallel", "ddp", "alone"))
        assert found and set(found) == set(ddp) == set(alone)
        for key, value in found.items():
            assert torch.equal(value, ddp[key]), key
            assert (value - alone[key]).norm() < (0.01 if name.startswith("adam") else 1e-3) * value.norm(), key
    manifests = [json.loads((shared / folder / "icons.json").read_text()) for folder in ("model_parallel", "alone")]
    assert manifests[0]["used"] == manifests[1]["used"] and manifests[0]["used"]["steps"] == 6
    for side in ("before", "after"):
        losses = [manifest["losses"][side]["held"] for manifest in manifests]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_exact_scores_by_command_on_nodes_that_have_a_copy_each_are_one_processs(shared: Path, tmp_path: Path) -> None:
    """Row by row, bit by bit; a row that cannot be read fails alone."""
    assert score(shared, tmp_path / "alone.zarr") == 0
    found, expected = (
        ScoreStore.open(folder / name) for folder, name in ((shared, "ranks.zarr"), (tmp_path, "alone.zarr"))
    )
    assert expected.status[:].tolist() == [1, 1, 1, 1, int(Status.BAD_RECORD), *[1] * 5]
    for name in ("status", "influence", "norm", "loss", "tokens"):
        np.testing.assert_array_equal(
            found.stored(name, slice(0, ROWS + 1)), expected.stored(name, slice(0, ROWS + 1)), err_msg=name
        )
    kept = (GradientStore.open(folder / f"{name}.kept") for folder, name in ((shared, "ranks"), (tmp_path, "alone")))
    np.testing.assert_array_equal(*(store.gradients[:] for store in kept))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_factors_by_command_on_nodes_that_have_a_copy_each_are_one_processs(shared: Path, tmp_path: Path) -> None:
    assert factors(shared, tmp_path / "alone.safetensors") == 0
    expected, found = (
        read_tensors(folder / name) for folder, name in ((tmp_path, "alone.safetensors"), (shared, "ranks.safetensors"))
    )
    assert set(found) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_flatten_weights_are_refused_before_anything_is_computed(strategy: type) -> None:
    with pytest.raises(ValueError, match=rf"strategy {strategy.__name__}: flattens .* --trainer\.strategy model_par"):
        check_strategy(object.__new__(strategy))


def test_packed_base_weights_and_models_without_frozen_ones_are_not_sharded() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"every weight of LlamaForCausalLM is trained.*use the strategy ddp"):
        shard(model, torch.device("cpu"), [[0, 1]])
    model.lm_head.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"base weights in 4 or 8 bits \(lm_head.weight\).*--quantize"):
        shard(model, torch.device("cpu"), [[0, 1]])


class OnNodes(SharedModelStrategy):
    """Of ranks on given nodes."""

    def __init__(self, nodes: list[int], ranks_per_copy: int | Literal["node"] | None) -> None:
        super().__init__(ranks_per_copy)
        self.nodes = nodes

    @property
    def world_size(self) -> int:
        return len(self.nodes)


def test_copies_are_shared_by_the_ranks_of_a_node_wherever_these_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler may number ranks across nodes."""

    def copies(nodes: list[int], ranks_per_copy: int | Literal["node"] | None) -> list[list[int]]:
        monkeypatch.setattr(dist, "all_gather_object", lambda found, _: found.__setitem__(slice(None), nodes))
        return OnNodes(nodes, ranks_per_copy).copies()

    assert copies([0, 0, 1, 1], "node") == [[0, 1], [2, 3]]
    assert copies([0, 1, 0, 1], "node") == [[0, 2], [1, 3]]
    assert copies([0, 0, 0, 0], 2) == [[0, 1], [2, 3]] and copies([0, 1], None) == [[0, 1]] == copies([0, 0], "node")
    assert copies([0], "node") == [[0]]
    with pytest.raises(ValueError, match=r"ranks_per_copy 'node': got nodes of 1 and of 3 ranks; expected as many"):
        copies([0, 0, 0, 1], "node")
    with pytest.raises(ValueError, match=r"got one rank for each copy .*\(2 ranks, 2 nodes\).*take model_parallel"):
        copies([0, 1], "node")
    with pytest.raises(ValueError, match=r"ranks_per_copy 3: got 4 ranks; expected a number of ranks that 3 divides"):
        copies([0, 0, 0, 0], 3)


def test_lightning_s_own_strategy_shards_over_all_ranks_or_is_refused() -> None:
    strategy: Any = ModelParallelStrategy()
    strategy.cluster_environment = SimpleNamespace(world_size=lambda: 4)
    strategy.parallel_devices = [torch.device("cpu")] * 4
    for sizes in ((1, 4), (4, 1)):
        strategy._device_mesh = SimpleNamespace(shape=sizes)
        assert copies_of(strategy) == [[0, 1, 2, 3]]
    strategy._device_mesh = SimpleNamespace(shape=(2, 2))
    with pytest.raises(
        ValueError, match=r"data_parallel_size=2, tensor_parallel_size=2\): .* all 4 ranks.*SharedModelStrategy\(ranks"
    ):
        copies_of(strategy)


def test_lightning_s_own_strategy_is_refused_for_a_fit() -> None:
    warmup: Any = WarmupModule(llama())
    warmup._trainer = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(ValueError, match=r"WarmupModule: got ModelParallelStrategy, whose checkpoints .*SharedModel"):
        warmup.configure_model()


def test_the_command_line_s_names_of_sharding_mean_one_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model_parallel", "fsdp", "model_parallel_hybrid"):
        flags: dict[str, Any] = predicting_strategy({"strategy": name, "accelerator": "cpu", "logger": False}, 1)
        strategy = Trainer(**flags).strategy
        assert isinstance(strategy, SharedModelStrategy)
        assert strategy.ranks_per_copy == ("node" if name == "model_parallel_hybrid" else None)
        assert ("fsdp: taken as model_parallel (FSDP2)" in capsys.readouterr().err) == (name == "fsdp")
    lone = {"strategy": "model_parallel_hybrid", "devices": 1, "num_nodes": 2}
    for check in (predict_flags, partial(trainer_flags, epochs=1, accumulate=1, dtype="float32")):
        with pytest.raises(ValueError, match="sharding: got one rank for each copy of the frozen weights"):
            check(lone)
    assert predicting_strategy({"strategy": "ddp"}, 1) == {"strategy": "ddp"}
    assert named_strategy({"strategy": "fsdp"}, 1) == {"strategy": "fsdp"}, "a fit knows it"


def test_layers_and_untied_ends_are_gathered_one_by_one() -> None:
    for tied in (False, True):
        model = with_lora(llama(tie_word_embeddings=tied))
        names = {name.rpartition("model.")[2] for name, part in model.named_modules() if part in units(model)}
        assert names == {"layers.0", "layers.1"} | (set() if tied else {"embed_tokens", "lm_head"})


def test_layers_that_nothing_marks_are_gathered_one_by_one_and_weights_that_two_share_are_not() -> None:
    plain = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(3))
    model = nn.Sequential(plain, nn.Linear(3, 3)).requires_grad_(False)
    assert units(model) == [*plain]
    plain[2][1].weight = plain[0][0].weight
    assert units(model) == [plain[1]]
    plain[1].requires_grad_(True)
    assert units(model) == []


def test_much_that_lies_in_no_layer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "DeviceMesh", lambda *_, **__: {"shards": None})
    monkeypatch.setattr(sharding, "fully_shard", lambda *_, **__: pytest.fail("sharded"))
    monkeypatch.setattr(sharding, "units", lambda _: [])
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    with pytest.raises(UserWarning, match=r"100% of the frozen weights of LlamaForCausalLM lie in no layer"):
        shard(llama().requires_grad_(False), torch.device("cpu"), [[0, 1]])
