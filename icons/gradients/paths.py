"""What is known of a model's trainable parameters: which path serves each, and in which uses that path is proven."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

from icons.gradients.layers import Layout, Part
from icons.gradients.tap import enclosing

LAYER, MODULE, ENCLOSING, SLOW = range(4)
"""Paths, quickest first: `g^T x` of linear layers (other modules run again); the parameter's own module run again; the
module around it run again; one backward pass of the whole model per sample."""


@dataclass
class Paths:
    """What passes over a model have shown.

    Attributes:
        places: where each parameter stood, and among which hooks; what has changed is proven anew.
        path: of each parameter; the first that was not found wrong.
        proven: the layouts of its calls in which its path agreed with autograd -> 1 if only in batches of one row.
        silent: parameters whose gradient was zero in every proof: the first that is not needs a proof.
        narrow: see `NarrowInputs`.
        narrows: whether the output layer may be narrowed to supervised positions.
        tested: sides of padding with which the model has passed its self-test.
    """

    places: dict[str, tuple[object, ...]] = field(default_factory=dict)
    path: dict[str, int] = field(default_factory=dict)
    proven: dict[str, dict[Layout, int]] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    narrow: dict[str, bool] = field(default_factory=dict)
    narrows: bool = True
    tested: set[str] = field(default_factory=set)

    def covers(self, name: str, layout: Layout, size: int) -> bool:
        """Whether a parameter's path is proven for a call of this layout in a batch of `size` rows."""
        return self.proven.get(name, {}).get(layout, 0) >= min(size, 2)

    def record(self, name: str, layouts: Iterable[Layout], size: int, silent: bool) -> None:
        """A path has agreed with autograd on a batch of `size` rows in which it met these layouts."""
        known = self.proven.setdefault(name, {})
        for layout in layouts:
            known[layout] = max(known.get(layout, 0), min(size, 2))
        (self.silent.add if silent else self.silent.discard)(name)

    def worsen(self, name: str) -> None:
        """The parameter's path was found wrong: the next one is to be proven."""
        self.path[name] += 1
        self.proven.pop(name, None)

    def slow(self, parameters: Iterable[str]) -> set[str]:
        return {name for name in parameters if self.path[name] == SLOW}


KNOWN: WeakKeyDictionary[nn.Module, Paths] = WeakKeyDictionary()
Place = tuple[nn.Module, str, str]  # a module that holds a parameter, the module's name, the parameter's name in it


def paths_of(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Paths:
    """What is known of the model as it stands now. A parameter that is new, or whose modules are others than before or
    have other hooks, begins on its quickest path."""
    known = KNOWN.setdefault(model, Paths())
    for name, places in owners_of(model, parameters).items():
        now = tuple(
            (id(module), type(module), len(module._forward_hooks), len(module._forward_pre_hooks), kind)
            for module, _, kind in places
        )
        if known.places.get(name) != now:
            known.places[name], known.path[name] = now, first_path(places)
            known.proven.pop(name, None)
            known.silent.discard(name)
    return known


def owners_of(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, list[Place]]:
    """Where each parameter stands: in one module, or in several that share it."""
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, list[Place]] = {name: [] for name in parameters}
    for path, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in name_of:
                found[name_of[id(parameter)]].append((module, path, kind))
    return found


def first_path(places: Iterable[Place]) -> int:
    modules = [(module, kind) for module, _, kind in places]
    if all(isinstance(module, nn.ParameterDict | nn.ParameterList) for module, _ in modules):
        return ENCLOSING
    return LAYER if any(is_linear(module, kind) for module, kind in modules) else MODULE


def is_linear(module: nn.Module, kind: str) -> bool:
    return isinstance(module, nn.Linear) and kind in ("weight", "bias")


def parts_of(model: nn.Module, parameters: Mapping[str, nn.Parameter], known: Paths) -> dict[nn.Module, list[Part]]:
    """The modules to tap, with the parameters that each serves."""
    modules = dict(model.named_modules())
    found: dict[nn.Module, list[Part]] = {}
    for name, places in owners_of(model, parameters).items():
        for module, place, kind in places if known.path[name] != SLOW else ():
            part = Part(kind, name, known.path[name] == LAYER and is_linear(module, kind))
            if known.path[name] == ENCLOSING:
                path, module = enclosing(modules, place)
                part = Part(f"{place[len(path) :].removeprefix('.')}.{kind}".removeprefix("."), name, False)
            found.setdefault(module, []).append(part)
    return found
