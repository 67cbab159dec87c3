"""What a model consists of, seen in one quick walk: nothing else goes through its thousands of modules in a batch."""

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torch_module


@dataclass(frozen=True)
class Owner:
    """A module that holds a parameter.

    Attributes:
        module: its number among `Members.modules`.
        around: that of the nearest module around it that is called itself.
        path: its name.
        outer: the name of the one around it.
        kind: the parameter's name in it.
    """

    module: int
    around: int
    path: str
    outer: str
    kind: str


@dataclass
class Structure:
    """What follows from a model's modules and parameters. It holds none of them: no model lives longer for it.

    Attributes:
        computation: what is compared in order to see that the model computes as it did: modules, how they stand in one
            another, and hooks, of the gradients of weights too.
        marks: the same for its parameters.
        alive: the modules, their classes' and own `forward`, and hooks: an id alone could be another's by now.
        names: of trainable parameters, each with its number in the walk.
        dtypes: of all parameters, with the kind of their device.
        owners: where each trainable parameter stands: in one module, or in several that share it.
        accepted: whether all that can be told without a pass was looked at, and was fit for one.
    """

    computation: list[Any]
    marks: list[Any]
    alive: list[weakref.ref[Any]]
    names: list[tuple[str, int]] = field(default_factory=list)
    dtypes: frozenset[tuple[torch.dtype, str]] = frozenset()
    owners: dict[str, list[Owner]] = field(default_factory=dict)
    accepted: bool = False

    def computes(self, computation: list[Any]) -> bool:
        """Whether these are the same modules, wired and hooked as they were, of which none has gone."""
        return self.computation == computation and None not in [one() for one in self.alive]


@dataclass(frozen=True)
class Members:
    """A model's modules and parameters as they are now.

    Attributes:
        modules: each once; the model itself is the first.
        trainable: the parameters with `requires_grad`, in `named_parameters()` order: they define P and its order.
        training: modules in train mode.
        structure: the same object as before if nothing has changed.
    """

    modules: list[nn.Module]
    trainable: dict[str, nn.Parameter]
    training: list[nn.Module]
    structure: Structure

    @property
    def device(self) -> torch.device:
        return next(iter(self.trainable.values())).device

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self.trainable.items()}


_seen: WeakKeyDictionary[nn.Module, Structure] = WeakKeyDictionary()
_turns: WeakKeyDictionary[nn.Module, AbstractContextManager[Any]] = WeakKeyDictionary()


def turn_of(model: nn.Module) -> AbstractContextManager[Any]:
    """To be held by a thread for a whole pass: the next one's waits. All threads see the hooks of a pass, and its
    weights frozen."""
    return _turns.setdefault(model, RLock())


def members_of(model: nn.Module) -> Members:
    """Walks through the model.

    Raises:
        ValueError: nothing in it is trainable.
    """
    modules, parameters, marks = [model], list[nn.Parameter](), list[Any]()
    met, code = {id(model)}, list[Any]([*torch_module._global_forward_hooks.values(), None])
    code += *torch_module._global_forward_pre_hooks.values(), None
    computation: list[Any] = []
    for module in modules:  # grows
        forward = module.__dict__.get("forward")
        computation += module.__class__, forward is None, len(code)
        if module._forward_hooks or module._forward_pre_hooks:
            code += *module._forward_hooks.values(), None, *module._forward_pre_hooks.values()
        if forward is not None:
            code.append(forward)
        for name, child in module._modules.items():
            computation += name, id(child)
            if child is not None and id(child) not in met:
                met.add(id(child))
                modules.append(child)
        for kind, parameter in module._parameters.items():
            if parameter is not None:
                marks += kind, id(parameter), parameter.__class__
                marks += parameter.requires_grad, parameter.dtype, parameter.device
                parameters.append(parameter)
                if parameter._backward_hooks:
                    code += parameter._backward_hooks.values()
                if parameter._post_accumulate_grad_hooks:
                    code += parameter._post_accumulate_grad_hooks.values()
        marks.append(-1)
    code += [kind.forward for kind in dict.fromkeys(map(type, modules)) if hasattr(kind, "forward")]
    computation += map(id, code)
    structure = _seen.get(model)
    if structure is None or structure.marks != marks or not structure.computes(computation):
        alive = _references([*modules, *(one for one in code if one is not None)])
        structure = _seen[model] = _structure_of(model, computation, marks, alive, modules, parameters)
    if not structure.names:
        raise ValueError(
            "per-sample gradients: the model has no trainable parameter; expected at least one with "
            "requires_grad=True: PeftModel.from_pretrained freezes everything unless is_trainable=True"
        )
    trainable = {name: parameters[number] for name, number in structure.names}
    return Members(modules, trainable, [module for module in modules if module.training], structure)


def _references(values: Iterable[Any]) -> list[weakref.ref[Any]]:
    """Of each; a dead one where there can be none: its structure then never holds."""
    references = []
    for value in values:
        try:
            references.append(weakref.ref(value))
        except TypeError:
            references.append(weakref.ref(type("Gone", (), {})()))
    return references


def _structure_of(
    model: nn.Module,
    computation: list[Any],
    marks: list[Any],
    alive: list[weakref.ref[Any]],
    modules: list[nn.Module],
    parameters: list[nn.Parameter],
) -> Structure:
    number_of = {id(parameter): number for number, parameter in enumerate(parameters)}
    names = [(name, number_of[id(value)]) for name, value in model.named_parameters() if value.requires_grad]
    return Structure(
        computation,
        marks,
        alive,
        names,
        frozenset((parameter.dtype, parameter.device.type) for parameter in parameters),
        _owners_of(model, modules, {id(parameters[number]): name for name, number in names}),
    )


def _owners_of(model: nn.Module, modules: list[nn.Module], name_of: dict[int, str]) -> dict[str, list[Owner]]:
    number_of, named = {id(module): number for number, module in enumerate(modules)}, dict(model.named_modules())
    owners: dict[str, list[Owner]] = {name: [] for name in name_of.values()}
    for path, module in named.items():
        for kind, parameter in module._parameters.items():
            if id(parameter) in name_of:
                outer = _enclosing(named, path)
                around = number_of[id(named[outer])]
                owner = Owner(number_of[id(module)], around, path, outer, kind)
                owners[name_of[id(parameter)]].append(owner)
    return owners


def _enclosing(named: dict[str, nn.Module], path: str) -> str:
    """The nearest module around `path` that is called itself, not a list or dict of modules."""
    while path:
        path = path.rpartition(".")[0]
        if not isinstance(named[path], nn.ModuleDict | nn.ModuleList):
            break
    return path
