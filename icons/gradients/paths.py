"""What is known of a model's trainable parameters: which path serves each, and in which uses that path is proven."""

from collections.abc import Iterable, Set
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from icons.batch import OWN_FIELDS, Batch
from icons.gradients.layers import Part
from icons.gradients.ownership import FOREIGN, Layout
from icons.gradients.structure import Members, Owner, Structure

LAYER, MODULE, _ENCLOSING, SLOW = range(4)
"""Paths, quickest first: `g^T x` of linear layers (other modules run again); the parameter's own module run again; the
module around it run again; one backward pass of the whole model per sample."""


Kind = tuple[bool, frozenset[str]]  # of a batch: one row or more, and what it holds beside the text


@dataclass
class Socket:
    """A module to tap.

    Attributes:
        module: its number among the model's modules.
        around: that of the nearest module around it that is called itself.
        path: its name.
        parts: the parameters that it serves.
        linear: whether all of them are a linear layer's.
    """

    module: int
    around: int
    path: str
    parts: list[Part] = field(default_factory=list)

    linear: bool = True

    def serve(self, part: Part) -> None:
        self.parts.append(part)
        self.linear &= part.linear

    def alike(self) -> "Socket":
        """The socket with none of its parts linear unless all are: the others are seen with the module's hooks, these
        without."""
        return self if self.linear else replace(self, parts=[replace(part, linear=False) for part in self.parts])

    def without(self, names: Set[str]) -> "Socket":
        """The socket with these parameters left out."""
        parts = [part for part in self.parts if part.name not in names]
        return replace(self, parts=parts)


@dataclass
class Plan:
    """What follows from the paths of all parameters for one kind of batch.

    Attributes:
        sockets: the modules to tap.
        slow: parameters that no tap serves.
        tried: whether a proof has looked at a batch that held the same beside the text. It may have met no call at all,
            as where only the projector is trained and no row has an image.
        unmet: parameters of whose path no proof has met a call.
        hidden: those with a use that has no inputs to show, as an embedding's of a tied weight.
        covered: what `Paths.covers` was asked before, and affirmed.
    """

    sockets: list[Socket]
    slow: set[str]
    tried: bool
    unmet: set[str]
    hidden: set[str]
    covered: set[tuple[str, Layout, int]] = field(default_factory=set)


@dataclass
class Paths:
    """What passes over a model have shown.

    A path that was found wrong is left for all batches of a kind, never for another kind's: what one batch shows would
    else decide the last bits of the next, and a run that is resumed begins with another batch.

    Attributes:
        structure: of the model when it was last looked at.
        stood: where each parameter stood; one that stands elsewhere is proven anew.
        plans: by kind of batch, as long as they hold.
        first: the quickest path of each parameter.
        worsened: by kind of batch, the paths of parameters whose quicker ones were found wrong.
        kind: of the batch at hand.
        proven: by parameter, path, and what the batch held beside the text, the layouts of calls in which it agreed
            with autograd -> the strength of the strongest batch, see `strength`. With images a model may take another
            way, on which it reads the parameter once more.
        refused: by parameter and path, the maps from images to rows that did not.
        sees_text: of the modules that were looked at in a batch with images, whether the text makes a difference.
        silent: parameters whose gradient was zero in every proof: the first that is not needs a proof.
        narrow: see `NarrowInputs`.
        narrows: whether the output layer may be narrowed to supervised positions.
        unmasked: of one row or more, and what batches hold: with which share of padding on the right they were shown to
            need no attention mask. 1: with any; 0: they need it.
        tested: sides of padding, and kinds of batch, with which the model has passed its self-test.
    """

    structure: Structure | None = None
    stood: dict[str, list[Owner]] = field(default_factory=dict)
    plans: dict[Kind, Plan] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    worsened: dict[Kind, dict[str, int]] = field(default_factory=dict)
    kind: Kind = (False, frozenset())
    proven: dict[tuple[str, int, frozenset[str]], dict[Layout, int]] = field(default_factory=dict)
    refused: dict[tuple[str, int], frozenset[str]] = field(default_factory=dict)
    sees_text: WeakKeyDictionary[nn.Module, bool] = field(default_factory=WeakKeyDictionary)
    silent: set[str] = field(default_factory=set)
    narrow: dict[str, bool] = field(default_factory=dict)
    narrows: bool = True
    unmasked: dict[Kind, float] = field(default_factory=dict)
    tested: set[tuple[str, Kind]] = field(default_factory=set)

    def path(self, name: str) -> int:
        """The quickest path of a parameter that was not found wrong in a batch of this kind."""
        return self.worsened.get(self.kind, {}).get(name, self.first[name])

    def use(self, name: str) -> tuple[str, int, frozenset[str]]:
        """Of a parameter in batches of this kind, as `proven` has it."""
        return name, self.path(name), self.kind[1]

    def covers(self, name: str, layout: Layout, wanted: int) -> bool:
        """Whether a parameter's path is proven for a call of this layout, by a batch of this strength or more."""
        known = self.proven.get(self.use(name), {})
        return any(good >= wanted and other.covers(layout) for other, good in known.items())

    def met(self, name: str) -> bool:
        """Whether a proof has met a call of the parameter's path."""
        return bool(self.proven.get(self.use(name)))

    def record(self, name: str, layouts: Iterable[Layout], shown: int, silent: bool) -> None:
        """A path has agreed with autograd on a batch of this strength in which it met these layouts."""
        self.plans.clear()
        known = self.proven.setdefault(self.use(name), {})
        for layout in layouts:
            known[layout] = max(known.get(layout, 0), shown)
        (self.silent.add if silent else self.silent.discard)(name)

    def worsen(self, name: str, layouts: Iterable[Layout]) -> None:
        """The parameter's path was found wrong in these layouts: another map, or the next path, is to be proven."""
        self.plans.clear()
        key = (name, self.path(name))
        self.proven.pop(self.use(name), None)
        maps = frozenset[str]().union(*(layout.agreeing for layout in layouts))
        if maps and FOREIGN not in layouts:
            self.refused[key] = self.refused.get(key, frozenset()) | maps
        else:
            self.leave(name, self.path(name) + 1)

    def leave(self, name: str, path: int = SLOW) -> None:
        """From now on the parameter takes a slower path in batches of this kind."""
        self.plans.clear()
        self.worsened.setdefault(self.kind, {})[name] = path

    def refuses(self, parts: Iterable[Part]) -> frozenset[str]:
        """Maps that were found wrong for these parameters."""
        return frozenset[str]().union(
            *(self.refused.get((part.name, self.path(part.name)), frozenset()) for part in parts)
        )

    def plan(self, members: Members) -> Plan:
        """The plan for batches of the kind at hand."""
        plan = self.plans.get(self.kind)
        if plan is None:
            names = list(members.trainable)
            slow, unmet = self.slow(names), {name for name in names if not self.met(name)}
            sockets, tried = self._sockets(members), any(self.use(name) in self.proven for name in names)
            hidden = {part.name for socket in sockets for part in socket.parts if not part.linear}
            plan = self.plans[self.kind] = Plan(sockets, slow, tried, unmet, hidden)
        return plan

    def slow(self, parameters: Iterable[str]) -> set[str]:
        return {name for name in parameters if self.path(name) == SLOW}

    def _sockets(self, members: Members) -> list[Socket]:
        sockets: dict[int, Socket] = {}
        for name, owners in members.structure.owners.items():
            path = self.path(name)
            for owner in owners if path != SLOW else ():
                module = members.modules[owner.module]
                socket = Socket(owner.module, owner.around, owner.path)
                part = Part(owner.kind, name, path == LAYER and _is_linear(module, owner.kind))
                if path == _ENCLOSING:
                    socket = Socket(owner.around, owner.around, owner.outer)
                    inner = owner.path[len(owner.outer) :].removeprefix(".")
                    part = Part(f"{inner}.{owner.kind}".removeprefix("."), name, False)
                sockets.setdefault(socket.module, socket).serve(part)
        return [socket.alike() for socket in sockets.values()]

    def _forget(self, name: str) -> None:
        for use in [use for use in self.proven if use[0] == name]:
            del self.proven[use]
        for path in range(SLOW):
            self.refused.pop((name, path), None)
        for paths in self.worsened.values():
            paths.pop(name, None)
        self.silent.discard(name)


def strength(telling: Tensor) -> int:
    """What a batch can show: 1 of one row; 2 of several rows of which at most one has a gradient, which may stand where
    it would stand in another order too; 3.

    Args:
        telling: `[B]`, whether a row has a gradient that can be compared.

    >>> from torch import tensor
    >>> [strength(tensor(rows)) for rows in ([True], [False, True, False], [True, True])]
    [1, 2, 3]
    """
    return 1 if len(telling) == 1 else 2 + (int(telling.sum()) > 1)


KNOWN: WeakKeyDictionary[nn.Module, Paths] = WeakKeyDictionary()


def paths_of(model: nn.Module, members: Members, batch: Batch) -> Paths:
    """What is known of the model as it stands now, for batches of this kind. Nothing is, of one that computes by other
    modules than before, or with other hooks; nor of a parameter that is new, or stands elsewhere."""
    known = KNOWN.setdefault(model, Paths())
    if known.structure is not None and not known.structure.computes(members.structure.computation):
        known = KNOWN[model] = Paths()
    known.kind = _kind_of(batch)
    if known.structure is not members.structure:
        known.structure = members.structure
        known.plans.clear()
        for name, owners in members.structure.owners.items():
            if known.stood.get(name) != owners:
                known.stood[name], known.first[name] = owners, _first_path(members, name, owners)
                known._forget(name)
    return known


def _kind_of(batch: Batch) -> Kind:
    shape = batch["labels"].shape
    tensors = ((name, value) for name, value in batch.items() if isinstance(value, Tensor) and name not in OWN_FIELDS)
    return shape[0] == 1, frozenset(name for name, value in tensors if not is_text(name, value, shape))


def is_text(name: str, value: object, shape: tuple[int, ...]) -> bool:
    """Whether a field holds something for each token."""
    if not isinstance(value, Tensor) or value.shape[:2] != shape:
        return False
    return not value.is_floating_point() or name in ("inputs_embeds", "attention_mask")


def _first_path(members: Members, name: str, owners: Iterable[Owner]) -> int:
    modules = [(members.modules[owner.module], owner.kind) for owner in owners]
    if members.trainable[name]._backward_hooks:
        return SLOW  # what they do to a gradient, they do to each sample's
    if all(isinstance(module, nn.ParameterDict | nn.ParameterList) for module, _ in modules):
        return _ENCLOSING
    return LAYER if any(_is_linear(module, kind) for module, kind in modules) else MODULE


def _is_linear(module: nn.Module, kind: str) -> bool:
    """Whether a module's own code is `x W^T + b`: what other code does may be that in one batch and not in the next,
    by a number that has changed. Hooks are none of it: see `BackwardPass.hooks`."""
    plain = type(module).forward is nn.Linear.forward and "forward" not in vars(module)
    return plain and not torch_module._global_forward_hooks and kind in ("weight", "bias")
