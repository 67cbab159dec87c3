"""DeepSpeed checkpoints are put together exactly, whatever stage, ranks, groups and sub-groups wrote them."""

import math
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from icons.deepspeed_state import is_deepspeed, join_group, join_parameters, read_deepspeed

DATA = Path(__file__).parent / "data" / "deepspeed"
ODD = {"a.lora_A.weight": (3, 7), "a.lora_B.weight": (5, 3), "b.weight": (4, 9), "b.bias": (9,), "c": (1,)}
Table = dict[str, Tensor]


class Checkpoint:
    """Writes what DeepSpeed writes, by cutting whole tensors the other way round than they are read."""

    def __init__(self, folder: Path, ranks: int, groups: list[list[str]]) -> None:
        self.folder, self.ranks, self.groups = folder / "global_step7", ranks, groups
        self.folder.mkdir(parents=True)
        (folder / "latest").write_text("global_step7")
        generator = torch.Generator().manual_seed(0)
        names = [name for group in groups for name in group]
        self.tables: dict[str, Table] = {
            which: {name: torch.randn(ODD[name], generator=generator) for name in names}
            for which in ("exp_avg", "exp_avg_sq", "weights")
        }

    def write_stage_2(self, padding: int = 0, step_in_group: bool = False) -> None:
        for rank in range(self.ranks):
            state: dict[int, Any] = {}
            flat, pads = [], []
            for number, group in enumerate(self.groups):
                entry: dict[str, Any] = {} if step_in_group else {"step": 7}
                for which, table in self.tables.items():
                    whole = torch.cat([torch.nn.functional.pad(table[name].flatten(), (0, padding)) for name in group])
                    extra = -len(whole) % (2 * self.ranks)
                    part = torch.nn.functional.pad(whole, (0, extra)).chunk(self.ranks)[rank]
                    if which == "weights":
                        last = rank == self.ranks - 1
                        flat.append(part[: max(0, len(part) - extra)] if last and extra else part)
                        pads.append(extra if last else 0)
                    else:
                        entry[which] = part
                state[number] = entry
            self.save(rank, {
                "zero_stage": 2, "partition_count": [self.ranks] * len(self.groups), "group_paddings": pads,
                "base_optimizer_state": {"state": state, "param_groups": self.param_groups(1, step_in_group)},
                "single_partition_of_fp32_groups": flat,
                "param_alignment_paddings": [[padding] * len(group) for group in self.groups],
            }, "mp_rank_00_model_states.pt")  # fmt: skip

    def write_stage_3(self, sub_groups: int = 1) -> None:
        for rank in range(self.ranks):
            state: dict[int, Any] = {}
            flat: list[Tensor] = []
            for group in self.groups:
                streams: dict[str, Tensor] = {}
                for which, table in self.tables.items():
                    parts = []
                    for name in group:
                        length = math.ceil(table[name].numel() / self.ranks)
                        whole = torch.nn.functional.pad(
                            table[name].flatten(), (0, length * self.ranks - table[name].numel())
                        )
                        parts.append(whole[rank * length : (rank + 1) * length])
                    streams[which] = torch.cat(parts)
                cuts = {which: stream.tensor_split(sub_groups) for which, stream in streams.items()}
                for piece in range(sub_groups):
                    moments = {which: cuts[which][piece] for which in ("exp_avg", "exp_avg_sq")}
                    state[len(state)] = {"step": torch.tensor(7.0)} | moments
                    flat.append(cuts["weights"][piece])
            self.save(rank, {
                "zero_stage": 3, "partition_count": self.ranks, "fp32_flat_groups": flat,
                "optimizer_state_dict": {"state": state, "param_groups": self.param_groups(sub_groups)},
            }, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")  # fmt: skip

    def param_groups(self, sub_groups: int, step: bool = False) -> list[dict[str, Any]]:
        ids = [list(range(i * sub_groups, (i + 1) * sub_groups)) for i in range(len(self.groups))]
        groups = [
            {"params": params, "betas": (0.9, 0.95), "eps": 1e-7} | ({"step": 7} if step else {}) for params in ids
        ]
        return [*groups, {"params": [], "betas": (0.9, 0.95), "eps": 1e-7}]

    def save(self, rank: int, state: dict[str, Any], model_file: str) -> None:
        torch.save({"optimizer_state_dict": state}, self.folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        shapes = [OrderedDict((name, torch.Size(ODD[name])) for name in group) for group in [*self.groups, []]]
        torch.save({"param_shapes": shapes, "module": {}}, self.folder / model_file)

    def check(self) -> None:
        state = read_deepspeed(self.folder.parent)
        for which, table in self.tables.items():
            found = getattr(state, which)
            assert set(found) == set(table)
            assert all(torch.equal(found[name], value) for name, value in table.items())
        assert state.betas == (0.9, 0.95)
        assert state.eps == 1e-7
        assert set(state.step.values()) == {7}


@pytest.mark.parametrize("groups", [[list(ODD)], [list(ODD)[:2], list(ODD)[2:4], list(ODD)[4:]]], ids=["one", "three"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
@pytest.mark.parametrize("variant", ["stage 2", "aligned", "step in group", "stage 3", "sub-groups"])
def test_reads_what_was_cut(tmp_path: Path, ranks: int, groups: list[list[str]], variant: str) -> None:
    checkpoint = Checkpoint(tmp_path, ranks, groups)
    {
        "stage 2": lambda: checkpoint.write_stage_2(),
        "aligned": lambda: checkpoint.write_stage_2(padding=3),
        "step in group": lambda: checkpoint.write_stage_2(step_in_group=True),
        "stage 3": lambda: checkpoint.write_stage_3(),
        "sub-groups": lambda: checkpoint.write_stage_3(sub_groups=3),
    }[variant]()
    checkpoint.check()


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
    with pytest.raises(ValueError, match="optimizer states of 1 ranks, expected 2"):
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
    checkpoint = Checkpoint(tmp_path, 1, [list(ODD)])
    checkpoint.write_stage_2()
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
