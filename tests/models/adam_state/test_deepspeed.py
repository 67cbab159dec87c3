"""DeepSpeed checkpoints are put together exactly, whatever stage, ranks, groups and sub-groups wrote them."""

import math
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from icons.models.adam_state.deepspeed import is_deepspeed, join_group, join_parameters, read_deepspeed

DATA = Path(__file__).parents[2] / "data" / "deepspeed"
ODD = {"a.lora_A.weight": (3, 7), "a.lora_B.weight": (5, 3), "b.weight": (4, 9), "b.bias": (9,), "c": (1,)}
ONE, THREE = [list(ODD)], [list(ODD)[:2], list(ODD)[2:4], list(ODD)[4:]]
ALIGN = 2
"""DeepSpeed's nccl_start_alignment_factor: a flat vector has a multiple of this times the number of ranks."""
Table = dict[str, Tensor]


class Checkpoint:
    """Cuts whole tensors into the files that DeepSpeed writes (read from its stage_1_and_2, stage3, bf16_optimizer).

    The optimizer states are written by torch's own AdamW over the flat parts, as there.
    """

    def __init__(self, folder: Path, ranks: int, groups: list[list[str]], step: Any = 7) -> None:
        self.folder, self.ranks, self.groups, self.step = folder / "global_step7", ranks, groups, step
        self.folder.mkdir(parents=True)
        (folder / "latest").write_text("global_step7")
        generator = torch.Generator().manual_seed(0)
        names = [name for group in groups for name in group]
        self.tables: dict[str, Table] = {
            which: {name: torch.randn(ODD[name], generator=generator) for name in names}
            for which in ("exp_avg", "exp_avg_sq", "weights")
        }

    def write_stages_1_and_2(self, stage: int = 2, round_robin: bool = False) -> None:
        """`DeepSpeedZeroOptimizer`: the same for stages 1 and 2; weights lose their padding on every rank, moments keep
        it."""
        orders = [self.round_robin(group) if round_robin else group for group in self.groups]
        for rank in range(self.ranks):
            parts = [self.part_of(order, rank) for order in orders]
            lean = [self.padding(order, rank) for order in orders]
            weights = [part["weights"][: len(part["weights"]) - pad] for part, pad in zip(parts, lean, strict=True)]
            self.save(rank, orders, {
                "zero_stage": stage, "partition_count": [self.ranks] * len(orders), "group_paddings": lean,
                "base_optimizer_state": self.optimizer([[part] for part in parts]),
                "single_partition_of_fp32_groups": weights,
            }, "mp_rank_00_model_states.pt")  # fmt: skip

    def write_bf16_stage_1(self) -> None:
        """`BF16_Optimizer` (stage 1, bfloat16, gradients summed in float32): no stage is named, the weights keep their
        padding too, and all of it is counted at the last rank, however many ranks it lies on."""
        for rank in range(self.ranks):
            parts = [self.part_of(group, rank) for group in self.groups]
            total = [sum(self.padding(group, every) for every in range(self.ranks)) for group in self.groups]
            self.save(rank, self.groups, {
                "partition_count": [self.ranks] * len(self.groups),
                "group_paddings": total if rank == self.ranks - 1 else [0] * len(self.groups),
                "base_optimizer_state": self.optimizer([[part] for part in parts]),
                "single_partition_of_fp32_groups": [part["weights"] for part in parts],
            }, "mp_rank_00_model_states.pt", prefix="bf16_")  # fmt: skip

    def write_stage_3(self, sub_group_size: int = 10**12) -> None:
        """`DeepSpeedZeroOptimizer_Stage3`: `param_shapes` has a table per sub-group.

        Persistent parameters (below `stage3_param_persistence_threshold`) are cut like all others: only the copy that
        is computed with stays whole.
        """
        cuts = [self.sub_groups(group, sub_group_size) for group in self.groups]
        names = [sub_group for group in cuts for sub_group in group]
        for rank in range(self.ranks):
            parts = [[self.pieces_of(sub_group, rank) for sub_group in group] for group in cuts]
            self.save(rank, names, {
                "zero_stage": 3, "partition_count": self.ranks, "optimizer_state_dict": self.optimizer(parts),
                "fp32_flat_groups": [part["weights"] for group in parts for part in group],
            }, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", prefix="bf16_")  # fmt: skip

    def round_robin(self, group: list[str]) -> list[str]:
        return [name for first in range(self.ranks) for name in group[first :: self.ranks]]

    def sub_groups(self, group: list[str], size: int) -> list[list[str]]:
        """Parameters until a rank's parts of them reach `size` numbers."""
        found: list[list[str]] = [[]]
        for name in group:
            if sum(self.partition_numel(other) for other in found[-1]) >= size:
                found.append([])
            found[-1].append(name)
        return found

    def partition_numel(self, name: str) -> int:
        return math.ceil(math.prod(ODD[name]) / self.ranks)

    def aligned(self, names: list[str]) -> int:
        numel = sum(math.prod(ODD[name]) for name in names)
        return math.ceil(numel / (ALIGN * self.ranks)) * ALIGN * self.ranks

    def padding(self, names: list[str], rank: int) -> int:
        """How much of this rank's part is padding: all of it, where a group is small and ranks are many."""
        numel, size = sum(math.prod(ODD[name]) for name in names), self.aligned(names) // self.ranks
        return min(size, max(0, (rank + 1) * size - numel))

    def part_of(self, names: list[str], rank: int) -> Table:
        """A rank's share of the group's one vector."""
        found = {}
        for which, table in self.tables.items():
            whole = torch.cat([table[name].flatten() for name in names])
            padded = torch.nn.functional.pad(whole, (0, self.aligned(names) - len(whole)))
            found[which] = padded.chunk(self.ranks)[rank].clone()
        return found

    def pieces_of(self, names: list[str], rank: int) -> Table:
        """A rank's piece of each parameter, one after the other."""
        found = {}
        for which, table in self.tables.items():
            pieces = []
            for name in names:
                length = self.partition_numel(name)
                whole = torch.nn.functional.pad(table[name].flatten(), (0, length * self.ranks - table[name].numel()))
                pieces.append(whole[rank * length : (rank + 1) * length])
            found[which] = torch.cat(pieces)
        return found

    def optimizer(self, groups: list[list[Table]]) -> dict[str, Any]:
        """What `AdamW.state_dict()` gives; DeepSpeed's own Adam keeps `step` as a number, its older ones in the
        group."""
        parameters = [[torch.nn.Parameter(part["weights"]) for part in group] for group in groups]
        adam = torch.optim.AdamW([{"params": group} for group in parameters], betas=(0.9, 0.95), eps=1e-7)
        for group, parts in zip(parameters, groups, strict=True):
            for parameter, part in zip(group, parts, strict=True):
                moments = {which: part[which] for which in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = moments | ({} if self.step == "in group" else {"step": self.step})
        found = adam.state_dict()
        if self.step == "in group":
            found["param_groups"] = [group | {"step": 7} for group in found["param_groups"]]
        return found

    def save(self, rank: int, names: list[list[str]], state: dict[str, Any], model_file: str, prefix: str = "") -> None:
        wrong = [dict.fromkeys(group, "not to be read") for group in names]
        state |= {"param_slice_mappings": wrong}
        content = {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.0.0"}
        torch.save(content, self.folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        shapes = [OrderedDict((name, torch.Size(ODD[name])) for name in group) for group in names]
        torch.save({"param_shapes": shapes, "module": {}}, self.folder / model_file)

    def check(self) -> None:
        state = read_deepspeed(self.folder.parent)
        for which, table in self.tables.items():
            found = getattr(state, which)
            assert set(found) == set(table)
            assert all(torch.equal(found[name], value) for name, value in table.items())
        assert state.betas == (0.9, 0.95)
        assert state.eps == 1e-7
        assert state.step == dict.fromkeys(ODD, 7)


@pytest.mark.parametrize("groups", [ONE, THREE], ids=["one group", "three groups"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
class TestEveryLayout:
    """Sizes are odd, and with 12 ranks whole parts of the small groups are padding."""

    @pytest.mark.parametrize("stage", [1, 2])
    @pytest.mark.parametrize("round_robin", [False, True])
    def test_stages_1_and_2(
        self, tmp_path: Path, ranks: int, groups: list[list[str]], stage: int, round_robin: bool
    ) -> None:
        checkpoint = Checkpoint(tmp_path, ranks, groups)
        checkpoint.write_stages_1_and_2(stage, round_robin)
        checkpoint.check()

    def test_stage_1_in_bfloat16(self, tmp_path: Path, ranks: int, groups: list[list[str]]) -> None:
        checkpoint = Checkpoint(tmp_path, ranks, groups)
        checkpoint.write_bf16_stage_1()
        checkpoint.check()

    @pytest.mark.parametrize("sub_group_size", [1, 10, 10**12])
    def test_stage_3(self, tmp_path: Path, ranks: int, groups: list[list[str]], sub_group_size: int) -> None:
        checkpoint = Checkpoint(tmp_path, ranks, groups)
        checkpoint.write_stage_3(sub_group_size)
        checkpoint.check()


def test_round_robin_and_sub_groups_are_what_they_are_called(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, 2, ONE)
    assert checkpoint.round_robin(list("abcde")) == list("acebd")
    assert [len(group) for group in checkpoint.sub_groups(list(ODD), 10)] == [1, 2, 2]
    assert [checkpoint.padding(["c"], rank) for rank in (0, 1)] == [1, 2]


@pytest.mark.parametrize("step", [torch.tensor(7.0), "in group"], ids=["tensor", "in group"])
def test_step_in_all_its_forms(tmp_path: Path, step: Any) -> None:
    for stage in (2, 3):
        checkpoint = Checkpoint(tmp_path / str(stage), 2, THREE, step)
        checkpoint.write_stages_1_and_2() if stage == 2 else checkpoint.write_stage_3(10)
        checkpoint.check()


def test_padding_after_each_parameter(tmp_path: Path) -> None:
    """Newer versions name it (`param_alignment_paddings`)."""
    parts = [torch.tensor([1.0, 2.0, 9.0]), torch.tensor([9.0, 3.0, 9.0])]
    found = join_group(parts, {"a": torch.Size([2]), "b": torch.Size([1])}, [2, 1], 0, "here")
    assert {name: value.tolist() for name, value in found.items()} == {"a": [1.0, 2.0], "b": [3.0]}


@pytest.mark.parametrize("stage", ["zero2_world2", "zero3_world2"])
def test_reads_deepspeeds_own_files(stage: str) -> None:
    state = read_deepspeed(DATA / stage)
    wanted = torch.load(DATA / stage / "expected.pt", weights_only=True)["expected"]
    tables = {"fp32": state.weights, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    assert set(state.weights) == set(wanted)
    for name, values in wanted.items():
        for which, value in values.items():
            assert torch.equal(tables[which][name], value), (name, which)
        assert tables["exp_avg"][name].shape == tables["exp_avg_sq"][name].shape == values["fp32"].shape
    assert set(state.step.values()) == {3}
    assert (state.betas, state.eps) == ((0.9, 0.999), 1e-8)


def test_stages_agree_on_the_moments() -> None:
    """The same training under ZeRO-2 and ZeRO-3, in bfloat16: the directions agree, tensor by tensor."""
    two, three = (read_deepspeed(DATA / stage) for stage in ("zero2_world2", "zero3_world2"))
    for name, moment in two.exp_avg.items():
        assert torch.cosine_similarity(moment.flatten(), three.exp_avg[name].flatten(), dim=0) > 0.99, name


def test_finds_the_checkpoint_that_latest_names(tmp_path: Path) -> None:
    shutil.copytree(DATA / "zero3_world2", tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "global_step3", tmp_path / "run" / "global_step1")
    assert is_deepspeed(tmp_path / "run")
    assert is_deepspeed(tmp_path / "run" / "global_step3")
    assert not is_deepspeed(tmp_path)
    read_deepspeed(tmp_path / "run")
    (tmp_path / "run" / "latest").unlink()
    with pytest.raises(ValueError, match=r"holds 2 checkpoints \(global_step1, global_step3\) and no file `latest`"):
        read_deepspeed(tmp_path / "run")
    (tmp_path / "run" / "latest").write_text("global_step9")
    with pytest.raises(FileNotFoundError, match=r"global_step9: is named by .*latest"):
        read_deepspeed(tmp_path / "run")


def test_refuses_a_folder_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no DeepSpeed checkpoint here"):
        read_deepspeed(tmp_path)


@pytest.mark.parametrize("stage", ["zero2_world2", "zero3_world2"])
def test_refuses_a_missing_rank(tmp_path: Path, stage: str) -> None:
    shutil.copytree(DATA / stage, tmp_path / "run")
    next((tmp_path / "run").rglob("*rank_1_*optim_states.pt")).unlink()
    with pytest.raises(ValueError, match="optimizer states of 1 rank, expected 2"):
        read_deepspeed(tmp_path / "run")


def test_refuses_missing_or_nameless_model_states(tmp_path: Path) -> None:
    shutil.copytree(DATA / "zero2_world2", tmp_path / "run")
    file = next((tmp_path / "run").rglob("*model_states.pt"))
    torch.save({"module": {}}, file)
    with pytest.raises(ValueError, match=r"names no trained parameters \(param_shapes\)"):
        read_deepspeed(tmp_path / "run")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*_model_states.pt"):
        read_deepspeed(tmp_path / "run")


def test_refuses_an_unreadable_file(tmp_path: Path) -> None:
    shutil.copytree(DATA / "zero2_world2", tmp_path / "run")
    file = next((tmp_path / "run").rglob("*rank_0_*optim_states.pt"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"optim_states.pt: cannot be read"):
        read_deepspeed(tmp_path / "run")


def test_refuses_code_in_a_file(tmp_path: Path) -> None:
    shutil.copytree(DATA / "zero2_world2", tmp_path / "run")
    torch.save({"optimizer_state_dict": Checkpoint}, next((tmp_path / "run").rglob("*rank_0_*optim_states.pt")))
    with pytest.raises(ValueError, match="which is not data"):
        read_deepspeed(tmp_path / "run")


def test_refuses_other_forms_of_the_state(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, 1, ONE)
    checkpoint.write_stages_1_and_2()
    file = checkpoint.folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"

    def change(**changes: Any) -> None:
        content = torch.load(file, weights_only=True)
        content["optimizer_state_dict"].update(changes)
        torch.save(content, file)

    base = torch.load(file, weights_only=True)["optimizer_state_dict"]["base_optimizer_state"]
    for groups, text in (
        (base["param_groups"][:1] * 2, "has 2 optimizer groups and names for 1"),
        ([base["param_groups"][0], {"params": [], "betas": (0.8, 0.9), "eps": 1.0}], "betas and eps are"),
    ):
        change(base_optimizer_state=base | {"param_groups": groups})
        with pytest.raises(ValueError, match=text):
            read_deepspeed(tmp_path)
    stepless = {0: {name: value for name, value in base["state"][0].items() if name != "step"}}
    change(base_optimizer_state=base | {"state": stepless})
    with pytest.raises(ValueError, match="has no step"):
        read_deepspeed(tmp_path)
    change(base_optimizer_state=[base["state"][0]])
    with pytest.raises(ValueError, match="elastic form"):
        read_deepspeed(tmp_path)


def test_refuses_sizes_that_do_not_add_up() -> None:
    shapes = {"a": torch.Size([2]), "b": torch.Size([3])}
    with pytest.raises(ValueError, match=r"x: has 7 numbers, expected 5 for 2 parameters \(and 1 of padding\)"):
        join_group([torch.zeros(4), torch.zeros(3)], shapes, [0, 0], 1, "x")
    with pytest.raises(ValueError, match="x: rank 1 has 4 numbers, expected 3 for 2 parameters"):
        join_parameters([torch.zeros(3), torch.zeros(4)], shapes, "x")
