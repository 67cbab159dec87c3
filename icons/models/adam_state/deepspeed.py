"""DeepSpeedState: weights and Adam's moments by name from ZeRO-1, 2 and 3 checkpoints, without DeepSpeed.

DeepSpeed keeps trained parameters and their moments as flat vectors, cut over the ranks:

- ZeRO-1 and 2: the parameters of a group lie one after the other in one vector, which is cut into equal parts, one per
  rank, after padding its end.
- ZeRO-3: each parameter is cut over the ranks by itself, each part padded to `ceil(numel / ranks)`; a rank's parts lie
  one after the other, a vector per sub-group (some of a group's parameters; all of them by default).

Names and shapes are in the model states' `param_shapes`, in the order of the vectors: one table per group that is not
empty, in ZeRO-3 per sub-group. (`param_slice_mappings` is not used: with round-robin gradients it names the wrong
slices.) Source: deepspeed/runtime/zero/stage_1_and_2.py, stage3.py, bf16_optimizer.py and utils/zero_to_fp32.py.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icons.models.tensor_files import load_data
from icons.terminal import counted

MOMENTS = ("exp_avg", "exp_avg_sq")
Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class Moments:
    """Adam's state by the names that the parameters had in training."""

    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    step: Mapping[str, int]
    betas: tuple[float, float]
    eps: float


@dataclass(frozen=True)
class DeepSpeedState(Moments):
    """With the trained parameters themselves; all float32."""

    weights: Mapping[str, Tensor]


class Stub:
    """Stands for an object of DeepSpeed's own classes; what is in it is not needed."""

    def __init__(self, *values: Any, **named: Any) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        self.state = state


class IntStub(int):
    """Stands for DeepSpeed's enumerations, which are compared as integers."""


def is_deepspeed(folder: Path) -> bool:
    """Whether `folder` is a DeepSpeed checkpoint, or holds one."""
    if not folder.is_dir():
        return False
    return bool(_optimizer_files(folder)) or any(
        _optimizer_files(inner) for inner in folder.iterdir() if inner.is_dir()
    )


def read_deepspeed(folder: Path) -> DeepSpeedState:
    """Puts the state of all ranks together.

    Args:
        folder: the checkpoint (`global_stepN`), or the folder above it, whose file `latest` names it.

    Raises:
        FileNotFoundError: no checkpoint is there.
        ValueError: a rank's file is missing, sizes do not add up, or the state is of a kind that is not supported.
    """
    folder = _step_folder(folder)
    files = _optimizer_files(folder)
    ranks = [load(file)["optimizer_state_dict"] for file in files]
    stage = 3 if "fp32_flat_groups" in ranks[0] else 2
    _check_ranks(folder, ranks)
    groups = _shapes_of(folder)
    inner = [rank["optimizer_state_dict" if stage == 3 else "base_optimizer_state"] for rank in ranks]
    if not all(isinstance(state, dict) and "state" in state for state in inner):
        raise ValueError(
            f"{folder}: the optimizer state is of DeepSpeed's elastic form; expected the plain one: save it with "
            '"zero_optimization": {"elastic_checkpoint": false}'
        )
    members = [group["params"] for group in inner[0]["param_groups"] if group["params"]]
    if stage == 3 and len(groups) == sum(map(len, members)):  # stage 3 names parameters by sub-group
        members = [[part] for group in members for part in group]
    if len(members) != len(groups):
        raise ValueError(
            f"{folder}: has {counted(len(members), 'optimizer group')} and names for {len(groups)}; expected as many"
        )
    settings = {(tuple(group["betas"]), group["eps"]) for group in inner[0]["param_groups"] if "betas" in group}
    if len(settings) != 1:
        raise ValueError(f"{folder}: betas and eps are {sorted(settings) or 'missing'}; expected Adam with one of each")
    betas, eps = settings.pop()
    tables: dict[str, dict[str, Tensor]] = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
    steps: dict[str, int] = {}
    for number, (ids, shapes) in enumerate(zip(members, groups, strict=True)):
        pieces = {which: [[state["state"][i][which] for i in ids] for state in inner] for which in MOMENTS}
        flat = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        pieces["weights"] = [[rank[flat][i] for i in ids] for rank in ranks]
        for which, parts in pieces.items():
            streams = [torch.cat([part.detach().flatten().float() for part in rank]) for rank in parts]
            where = f"{folder}: {which} of group {number}"
            if stage == 3:
                tables[which] |= join_parameters(streams, shapes, where)
            else:
                gaps = _alignment(ranks[0], number, len(shapes))
                tables[which] |= join_group(streams, shapes, gaps, _end_padding(ranks, number), where)
        steps |= dict.fromkeys(shapes, _step_of(inner[0], ids[0], f"{folder}: group {number}"))
    return DeepSpeedState(**tables, step=steps, betas=betas, eps=eps)


def _step_folder(folder: Path) -> Path:
    """The folder with the files: this one, the one that `latest` names, or the only one there is."""
    if _optimizer_files(folder):
        return folder
    latest = folder / "latest"
    if latest.is_file():
        named = folder / latest.read_text().strip()
        if not _optimizer_files(named):
            raise FileNotFoundError(f"{named}: is named by {latest} and holds no *_optim_states.pt; copy it again")
        return named
    inner = [step for step in sorted(folder.iterdir()) if step.is_dir() and _optimizer_files(step)]
    if not inner:
        raise FileNotFoundError(f"{folder}: no DeepSpeed checkpoint here; expected *_optim_states.pt in it or below it")
    if len(inner) > 1:
        raise ValueError(
            f"{folder}: holds {len(inner)} checkpoints ({', '.join(step.name for step in inner)}) and no file "
            "`latest`; give the one that is meant"
        )
    return inner[0]


def _optimizer_files(folder: Path) -> list[Path]:
    """One file per rank, in the order of ranks: as numbers, since rank 10 comes after rank 2."""
    by_rank = {}
    for file in folder.glob("*zero_pp_rank_*_optim_states.pt"):
        if match := re.fullmatch(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt", file.name):
            by_rank[int(match[2]), int(match[1])] = file
    return [by_rank[key] for key in sorted(by_rank)]


def _check_ranks(folder: Path, ranks: Sequence[Mapping[str, Any]]) -> None:
    counts = ranks[0]["partition_count"]
    expected = max(counts) if isinstance(counts, Sequence) else int(counts)
    if len(ranks) != expected:
        raise ValueError(
            f"{folder}: has the optimizer states of {counted(len(ranks), 'rank')}, expected {expected} (one file per "
            "rank, one model part): copy the missing ones here"
        )


def _shapes_of(folder: Path) -> list[Shapes]:
    """Names and shapes of the trained parameters, one table per group that is not empty."""
    files = sorted(folder.glob("*mp_rank_00_model_states.pt"))
    if not files:
        raise FileNotFoundError(f"{folder}: has no *_model_states.pt, which name the parameters; copy them here")
    shapes = load(files[0]).get("param_shapes")
    if not shapes:
        raise ValueError(
            f"{files[0]}: names no trained parameters (param_shapes); expected a checkpoint of DeepSpeed 0.8 on"
        )
    tables = [shapes] if isinstance(shapes, Mapping) else shapes
    return [table for table in tables if table]


def load(file: Path) -> Mapping[str, Any]:
    """One file with `weights_only=True`: DeepSpeed's own classes become stubs, any other is refused."""
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (RuntimeError, ValueError, EOFError) as error:
        raise ValueError(f"{file}: cannot be read ({str(error).partition(chr(10))[0]}); copy it again") from None
    stubs = [(IntStub if name.endswith("Enum") else Stub, name) for name in foreign if name.startswith("deepspeed.")]
    if others := [name for name in foreign if not name.startswith("deepspeed.")]:
        raise ValueError(f"{file}: contains {others[0]}, which is not data; expected a file written by DeepSpeed")
    with torch.serialization.safe_globals(stubs):  # type: ignore[arg-type]
        content: Mapping[str, Any] = load_data(file, "a file of DeepSpeed")
    return content


def join_group(
    streams: Sequence[Tensor], shapes: Shapes, gaps: Sequence[int], padding: int, where: str
) -> dict[str, Tensor]:
    """ZeRO-1 and 2: the ranks' parts are one vector of parameters, with `gaps` after each, and `padding` at the end.

    The padding at the end is there in the moments, and cut away from the weights (as far as the last rank holds it).

    >>> parts = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 0.0])]
    >>> join_group(parts, {"a": torch.Size([2]), "b": torch.Size([3])}, [0, 0], 1, "doctest")["b"].tolist()
    [3.0, 4.0, 5.0]
    """
    flat = torch.cat(list(streams))
    needed = sum(shape.numel() + gap for shape, gap in zip(shapes.values(), gaps, strict=True))
    if not needed <= len(flat) <= needed + padding:
        raise ValueError(
            f"{where}: has {len(flat)} numbers, expected {needed} for {len(shapes)} parameters (and {padding} of "
            "padding): the files are not of one checkpoint"
        )
    tensors, start = {}, 0
    for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
        tensors[name] = flat[start : start + shape.numel()].reshape(shape)
        start += shape.numel() + gap
    return tensors


def join_parameters(streams: Sequence[Tensor], shapes: Shapes, where: str) -> dict[str, Tensor]:
    """ZeRO-3: every rank's stream holds its part of each parameter, `ceil(numel / ranks)` numbers.

    >>> parts = [torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3.0, 0.0, 0.0])]
    >>> join_parameters(parts, {"a": torch.Size([3]), "b": torch.Size([1])}, "doctest")["a"].tolist()
    [1.0, 2.0, 3.0]
    """
    tensors, start = {}, 0
    lengths = {name: math.ceil(shape.numel() / len(streams)) for name, shape in shapes.items()}
    needed = sum(lengths.values())
    for rank, stream in enumerate(streams):
        if len(stream) != needed:
            raise ValueError(
                f"{where}: rank {rank} has {len(stream)} numbers, expected {needed} for {len(shapes)} parameters: the "
                "files are not of one checkpoint"
            )
    for name, shape in shapes.items():
        whole = torch.cat([stream[start : start + lengths[name]] for stream in streams])
        tensors[name] = whole[: shape.numel()].reshape(shape)
        start += lengths[name]
    return tensors


def _end_padding(ranks: Sequence[Mapping[str, Any]], group: int) -> int:
    """Padding at the end of a group's vector, counted over the ranks that hold it."""
    return sum(int(rank["group_paddings"][group]) for rank in ranks if "group_paddings" in rank)


def _alignment(rank: Mapping[str, Any], group: int, num_parameters: int) -> list[int]:
    """Padding after each parameter of a group (newer versions; none before)."""
    gaps = rank.get("param_alignment_paddings")
    return list(gaps[group]) if gaps else [0] * num_parameters


def _step_of(state: Mapping[str, Any], parameter: Any, where: str) -> int:
    """Adam's step: of the parameter's state, or of its group (fused kernels keep it there)."""
    step = state["state"].get(parameter, {}).get("step")
    if step is None:
        group = next(group for group in state["param_groups"] if parameter in group["params"])
        step = group.get("step")
    if step is None:
        raise ValueError(
            f"{where}: has no step, which Adam's bias correction needs; expected the state of Adam or AdamW"
        )
    return int(step)
