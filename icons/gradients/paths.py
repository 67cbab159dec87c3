"""What is known of a model's trainable parameters: which path serves each, and in which uses that path is proven."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from icons.batch import OWN_FIELDS, Batch
from icons.gradients.layers import Part
from icons.gradients.ownership import FOREIGN, Layout
from icons.gradients.tap import enclosing

LAYER, MODULE, ENCLOSING, SLOW = range(4)
"""Paths, quickest first: `g^T x` of linear layers (other modules run again); the parameter's own module run again; the
module around it run again; one backward pass of the whole model per sample."""


Kind = tuple[bool, frozenset[str]]  # of a batch: one row or more, and what it holds beside the text


@dataclass
class Paths:
    """What passes over a model have shown.

    A path that was found wrong is left for all batches of a kind, never for another kind's: what one batch shows would
    else decide the last bits of the next, and a run that is resumed begins with another batch.

    Attributes:
        places: where each parameter stood, and among which hooks; what has changed is proven anew.
        first: the quickest path of each parameter.
        worsened: by kind of batch, the paths of parameters whose quicker ones were found wrong.
        kind: of the batch at hand.
        proven: by parameter and path, the layouts of calls in which it agreed with autograd -> 1 if only in batches of
            one row.
        refused: by parameter and path, the maps from images to rows that did not.
        sees_text: of the modules that were looked at in a batch with images, whether the text makes a difference.
        silent: parameters whose gradient was zero in every proof: the first that is not needs a proof.
        narrow: see `NarrowInputs`.
        narrows: whether the output layer may be narrowed to supervised positions.
        tested: sides of padding with which the model has passed its self-test.
    """

    places: dict[str, tuple[object, ...]] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    worsened: dict[Kind, dict[str, int]] = field(default_factory=dict)
    kind: Kind = (False, frozenset())
    proven: dict[tuple[str, int], dict[Layout, int]] = field(default_factory=dict)
    refused: dict[tuple[str, int], frozenset[str]] = field(default_factory=dict)
    sees_text: WeakKeyDictionary[nn.Module, bool] = field(default_factory=WeakKeyDictionary)
    silent: set[str] = field(default_factory=set)
    narrow: dict[str, bool] = field(default_factory=dict)
    narrows: bool = True
    tested: set[str] = field(default_factory=set)

    def path(self, name: str) -> int:
        """The quickest path of a parameter that was not found wrong in a batch of this kind."""
        return self.worsened.get(self.kind, {}).get(name, self.first[name])

    def covers(self, name: str, layout: Layout, size: int) -> bool:
        """Whether a parameter's path is proven for a call of this layout in a batch of `size` rows."""
        known = self.proven.get((name, self.path(name)), {})
        if known.get(layout, 0) >= min(size, 2):
            return True
        return any(good >= min(size, 2) and other.covers(layout) for other, good in known.items())

    def met(self, name: str) -> bool:
        """Whether a proof has met a call of the parameter's path."""
        return bool(self.proven.get((name, self.path(name))))

    def record(self, name: str, layouts: Iterable[Layout], size: int, silent: bool) -> None:
        """A path has agreed with autograd on a batch of `size` rows in which it met these layouts."""
        known = self.proven.setdefault((name, self.path(name)), {})
        for layout in layouts:
            known[layout] = max(known.get(layout, 0), min(size, 2))
        (self.silent.add if silent else self.silent.discard)(name)

    def worsen(self, name: str, layouts: Iterable[Layout]) -> None:
        """The parameter's path was found wrong in these layouts: another map, or the next path, is to be proven."""
        key = (name, self.path(name))
        self.proven.pop(key, None)
        maps = frozenset[str]().union(*(layout.agreeing for layout in layouts))
        if maps and FOREIGN not in layouts:
            self.refused[key] = self.refused.get(key, frozenset()) | maps
        else:
            self.leave(name, self.path(name) + 1)

    def leave(self, name: str, path: int = SLOW) -> None:
        """From now on the parameter takes a slower path in batches of this kind."""
        self.worsened.setdefault(self.kind, {})[name] = path

    def refuses(self, parts: Iterable[Part]) -> frozenset[str]:
        """Maps that were found wrong for these parameters."""
        return frozenset[str]().union(
            *(self.refused.get((part.name, self.path(part.name)), frozenset()) for part in parts)
        )

    def slow(self, parameters: Iterable[str]) -> set[str]:
        return {name for name in parameters if self.path(name) == SLOW}

    def forget(self, name: str) -> None:
        for path in range(SLOW):
            self.proven.pop((name, path), None)
            self.refused.pop((name, path), None)
        for paths in self.worsened.values():
            paths.pop(name, None)
        self.silent.discard(name)


KNOWN: WeakKeyDictionary[nn.Module, Paths] = WeakKeyDictionary()
Place = tuple[nn.Module, str, str]  # a module that holds a parameter, the module's name, the parameter's name in it


def paths_of(model: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch) -> Paths:
    """What is known of the model as it stands now, for batches of this kind. A parameter that is new, or whose modules
    are others than before or have other hooks, begins on its quickest path."""
    known = KNOWN.setdefault(model, Paths())
    known.kind = kind_of(batch)
    for name, places in owners_of(model, parameters).items():
        now = tuple(
            (id(module), type(module), len(module._forward_hooks), len(module._forward_pre_hooks), kind)
            for module, _, kind in places
        )
        if known.places.get(name) != now:
            known.places[name], known.first[name] = now, first_path(places)
            known.forget(name)
    return known


def kind_of(batch: Batch) -> Kind:
    shape = batch["labels"].shape
    tensors = ((name, value) for name, value in batch.items() if isinstance(value, Tensor) and name not in OWN_FIELDS)
    return shape[0] == 1, frozenset(name for name, value in tensors if not is_text(name, value, shape))


def is_text(name: str, value: object, shape: tuple[int, ...]) -> bool:
    """Whether a field holds something for each token."""
    if not isinstance(value, Tensor) or value.shape[:2] != shape:
        return False
    return not value.is_floating_point() or name in ("inputs_embeds", "attention_mask")


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
    inside = any(known.path(name) == ENCLOSING for name in parameters)
    modules = dict(model.named_modules()) if inside else {}
    found: dict[nn.Module, list[Part]] = {}
    for name, places in owners_of(model, parameters).items():
        for module, place, kind in places if known.path(name) != SLOW else ():
            part = Part(kind, name, known.path(name) == LAYER and is_linear(module, kind))
            if known.path(name) == ENCLOSING:
                path, module = enclosing(modules, place)
                part = Part(f"{place[len(path) :].removeprefix('.')}.{kind}".removeprefix("."), name, False)
            found.setdefault(module, []).append(part)
    return found
