"""Where Adam's moments come from: warm-up folder, Lightning, Hugging Face Trainer or DeepSpeed checkpoint."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from torch import Tensor, nn

from icons.models.adam_state.deepspeed import MOMENTS, Moments, is_deepspeed, read_deepspeed
from icons.models.parameter_names import match_names
from icons.models.tensor_files import load_data
from icons.preconditioner import AdamPreconditioner

_WARMUP_FILE = "adam.safetensors"
_FILES = ("optimizer.pt", "optimizer.bin", "last.ckpt")  # the Trainer's, accelerate's and FSDP's, Lightning's
_PROJECTOR_NAMES = ("multi_modal_projector", "mm_projector")
# transformers 5, Trainer.get_decay_parameter_names
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
_SHOWN = 3


def load_adam_state(
    path: str | Path, model: nn.Module, form: Literal["adam", "diagonal"] = "adam"
) -> AdamPreconditioner:
    """Adam's moments for the trainable parameters of `model`, found by name.

    Args:
        path: a warm-up folder; a Lightning checkpoint (file, or folder of its DeepSpeed strategy); the Hugging Face
            Trainer's `optimizer.pt` or `checkpoint-N`; accelerate's `optimizer.bin`, FSDP's by name among them; a
            DeepSpeed checkpoint (ZeRO-1, 2 or 3).
        model: its parameters with `requires_grad` get moments; those saved for others are left out.
        form: see `AdamPreconditioner`.

    Returns:
        Moments in float32 under the names of `model.named_parameters()`; `step` is one number, or one per name where
        they differ.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is no optimizer state, a parameter has no moments or moments of another shape, or the file does
            not tell which moments are whose.
    """
    path = Path(path)
    moments = _read_moments(path, model)
    places = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not places:
        raise ValueError(f"{path}: the model has no trainable parameter; expected an adapter: load the model with one")
    saved = match_names(list(moments.exp_avg), list(places), str(path))
    for name, parameter in places.items():
        for which, table in zip(MOMENTS, (moments.exp_avg, moments.exp_avg_sq), strict=True):
            if table[saved[name]].shape != parameter.shape:
                raise ValueError(
                    f"{path}: {which} of {saved[name]} has shape {tuple(table[saved[name]].shape)}, the parameter "
                    f"{name} {tuple(parameter.shape)}; expected the same: is it the state of another adapter?"
                )
    steps = {name: moments.step[saved[name]] for name in places}
    return AdamPreconditioner(
        {name: moments.exp_avg[saved[name]].float() for name in places},
        {name: moments.exp_avg_sq[saved[name]].float() for name in places},
        step=next(iter(steps.values())) if len(set(steps.values())) == 1 else steps,
        betas=moments.betas,
        eps=moments.eps,
        form=form,
    )


def _read_moments(path: Path, model: nn.Module) -> Moments:
    """Recognises what `path` holds, and reads it; `model` is needed only where the file has no names."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected an optimizer state")
    if path.is_dir():
        if (path / _WARMUP_FILE).is_file():
            return _read_warmup(path / _WARMUP_FILE)
        if is_deepspeed(path):
            return read_deepspeed(path)
        if any(path.glob("*.distcp")) or any(path.glob("*/*.distcp")):
            raise ValueError(
                f"{path}: is a sharded checkpoint (*.distcp); expected one file: make it with python -m "
                "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER optimizer.bin"
            )
        for name in _FILES:
            if (path / name).exists():
                return _read_moments(path / name, model)
        raise FileNotFoundError(
            f"{path}: no optimizer state here; expected {_WARMUP_FILE} (warm-up), {', '.join(_FILES)} or "
            "*_optim_states.pt (DeepSpeed): an adapter alone has none"
        )
    if path.suffix == ".safetensors":
        return _read_warmup(path)
    content = load(path)
    for name in ("optimizer", "optimizer_state_dict"):  # with a model's weights beside it
        if isinstance(inner := content.get(name), Mapping) and "state" in inner:
            content = inner
    if "optimizer_states" in content:
        states = content["optimizer_states"]
        if len(states) != 1:
            raise ValueError(f"{path}: holds the states of {len(states)} optimizers, expected one")
        known = list(content.get("state_dict", {}))
        return _read_torch(states[0], path, model, known)
    if {"state", "param_groups"} <= set(content):
        return _read_torch(content, path, model, [])
    raise ValueError(
        f"{path}: is no optimizer state (it holds {', '.join(sorted(map(str, content))[:_SHOWN])}); expected "
        "Lightning's checkpoint or the Hugging Face Trainer's optimizer.pt"
    )


def _read_warmup(file: Path) -> Moments:
    """`exp_avg/<name>` and `exp_avg_sq/<name>`; step, betas and eps in the file's metadata."""
    with safe_open(str(file), framework="pt") as stored:
        metadata = stored.metadata() or {}
        if not {"step", "betas", "eps"} <= set(metadata):
            raise ValueError(f"{file}: has no step, betas and eps in its metadata; expected a warm-up folder's file")
        tables = {
            which: {
                name.partition("/")[2]: stored.get_tensor(name)
                for name in stored.keys()  # noqa: SIM118
                if name.startswith(f"{which}/")
            }
            for which in MOMENTS
        }
    betas = json.loads(metadata["betas"])
    step = int(metadata["step"])
    steps = dict.fromkeys(tables["exp_avg"], step)
    return Moments(**tables, step=steps, betas=(betas[0], betas[1]), eps=float(metadata["eps"]))


def load(path: Path) -> Mapping[str, Any]:
    content = load_data(
        path,
        "data alone",
        "expected an optimizer state without Python objects: save the checkpoint without them, or give the "
        "optimizer's file",
        mapped=False,
    )
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected an optimizer state")
    return content


def _read_torch(state: Mapping[str, Any], path: Path, model: nn.Module, known: Sequence[str]) -> Moments:
    """The form of `torch.optim.Optimizer.state_dict()`: numbered parameters, named where the optimizer had names.

    Or parameters by name, as FSDP saves them.
    """
    groups, entries = state["param_groups"], state["state"]
    settings = {(tuple(group["betas"]), group["eps"]) for group in groups if "betas" in group}
    if len(settings) != 1:
        raise ValueError(f"{path}: betas and eps are {sorted(settings) or 'missing'}; expected Adam with one of each")
    betas, eps = settings.pop()
    indices = [index for group in groups for index in group["params"]]
    if any(isinstance(index, str) for index in [*entries, *indices]):
        if not all(isinstance(index, str) for index in [*entries, *indices]) or not set(entries) <= set(indices):
            raise ValueError(
                f"{path}: names some parameters and numbers others; expected names throughout, or numbers: it is not "
                "known which moments are whose"
            )
        names: dict[Any, str] = {index: index for index in indices}
    elif all("param_names" in group for group in groups if group["params"]):
        names = {
            index: name
            for group in groups
            if group["params"]
            for index, name in zip(group["params"], group["param_names"], strict=True)
        }
    else:
        names = _names_by_order(state, path, model, known)
    tables: dict[str, dict[str, Tensor]] = {which: {} for which in MOMENTS}
    steps: dict[str, int] = {}
    for group in groups:
        for index in group["params"]:
            entry = entries.get(index)
            if entry is None:  # never had a gradient: a trainable parameter without moments is refused by name later
                continue
            for which in MOMENTS:
                if which not in entry:
                    raise ValueError(f"{path}: {names[index]} has no {which}; expected the state of Adam or AdamW")
                tables[which][names[index]] = entry[which]
            step = entry.get("step", group.get("step"))
            if step is None:
                raise ValueError(f"{path}: {names[index]} has no step, which Adam's bias correction needs")
            steps[names[index]] = int(step)
    return Moments(**tables, step=steps, betas=betas, eps=eps)


def _names_by_order(state: Mapping[str, Any], path: Path, model: nn.Module, known: Sequence[str]) -> dict[int, str]:
    """Names for numbered moments, from the orders in which trainers hand parameters to an optimizer.

    Every order that could have been is tried (with or without the projector, projector before or after the adapter,
    split by weight decay and by the projector's own learning rate); one whose number and shapes of parameters all fit
    is taken. Two that fit and differ are refused: then the moments cannot be told apart.

    Raises:
        ValueError: no order fits, or several.
    """
    groups = [list(group["params"]) for group in state["param_groups"] if group["params"]]
    shapes = {index: tuple(entry["exp_avg"].shape) for index, entry in state["state"].items() if "exp_avg" in entry}
    fitting: dict[tuple[str, ...], dict[int, str]] = {}
    parameters = dict(model.named_parameters())
    for order in _orders(model, known):
        if [len(names) for names in order] != [len(indices) for indices in groups]:
            continue
        pairs = [
            (index, name)
            for indices, names in zip(groups, order, strict=True)
            for index, name in zip(indices, names, strict=True)
        ]
        if all(index not in shapes or shapes[index] == tuple(parameters[name].shape) for index, name in pairs):
            fitting[tuple(name for _, name in pairs)] = dict(pairs)
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    sizes = [len(indices) for indices in groups]
    trainable = sum(parameter.requires_grad for parameter in parameters.values())
    problem = (
        "more than one order of the model's parameters fits" if fitting else "no order of the model's parameters fits"
    )
    raise ValueError(
        f"{path}: has no names, groups of {sizes} parameters, and {problem} (the model has {trainable} trainable "
        "ones); expected the state of this very adapter, number by number and shape by shape: check --adapter, and "
        "--target"
    )


def _orders(model: nn.Module, known: Sequence[str]) -> list[list[list[str]]]:
    """Groups of names in which an optimizer may have got the model's parameters."""
    every = [name for name, _ in model.named_parameters()]
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    lora = [name for name in every if "lora_" in name]
    projector = [name for name in every if any(part in name for part in _PROJECTOR_NAMES)]
    sets = [trainable, lora, [*lora, *projector], [*projector, *lora]]
    if known:  # Lightning saves names, in order, though not beside the moments
        plain = {name.partition(".")[2]: name for name in known} | {name: name for name in known}
        sets.append([name for name in every if name in plain and ("lora_" in name or name in trainable)])
    normed = {
        f"{module_name}.{name}" for module_name, module in model.named_modules() if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }  # fmt: skip

    def decays(name: str) -> bool:
        return not _NO_DECAY.search(name.lower()) and name not in normed

    orders: list[list[list[str]]] = []
    for names, by_decay, by_projector in product(sets, (False, True), (False, True)):
        groups = [names]
        if by_projector:  # LLaVATrainer: the projector's groups come last
            is_projector = [[name for name in names if (name in projector) == last] for last in (False, True)]
            groups = is_projector
        if by_decay:
            groups = [[name for name in group if decays(name) == first] for group in groups for first in (True, False)]
        orders.append([group for group in groups if group])
    return orders
