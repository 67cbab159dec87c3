"""One batched backward pass that hands out each parameter's per-sample gradients, block by block.

Taps on the linear layers that hold trainable weights remember the input `x [B, L, I]`; when the backward pass brings
the output's gradient `g [B, L, O]`, the per-sample gradient `g^T x [B, O, I]` goes to the receiver and is freed. The
weights themselves are frozen meanwhile: no batch-summed weight gradient is computed, and no `.grad` is left.

What hooks cannot serve (norms, embeddings, convolutions, DoRA, a layer whose input is not laid out as the batch is) is
differentiated by one backward pass per sample over the same graph: exact, slower, and announced once per model.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icons.batch import Batch, model_inputs
from icons.gradients.dropout import refuse_dropout
from icons.gradients.positions import SupervisedPositions
from icons.gradients.tap import NarrowInputs, Tap
from icons.gradients.weight_edges import weight_edges

Receiver = Callable[[str, Tensor], None]  # parameter name, its per-sample gradients [B, *shape] in float32


@dataclass
class Knowledge:
    """What the first passes over a model have shown."""

    slow: set[str] = field(default_factory=set)  # parameters that hooks cannot serve
    seen: set[str] = field(default_factory=set)  # parameters found in their own layers' calls and nowhere else
    narrow: dict[str, bool] = field(default_factory=dict)  # see NarrowInputs
    surveyed: bool = False


KNOWN: WeakKeyDictionary[nn.Module, Knowledge] = WeakKeyDictionary()


class SlowerPathWarning(UserWarning):
    """Some trainable parameters need one backward pass per sample."""


class NotServedError(Exception):
    """Hooks cannot serve these parameters; the pass starts again with them on the slower path."""

    def __init__(self, names: set[str], reason: str) -> None:
        super().__init__(reason)
        self.names, self.reason = names, reason


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with `requires_grad`, in `named_parameters()` order: they define P and its order.

    Raises:
        ValueError: there are none.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise ValueError(
            "per-sample gradients: the model has no trainable parameter; expected at least one with "
            "requires_grad=True: PeftModel.from_pretrained freezes everything unless is_trainable=True"
        )
    return found


def per_sample_blocks(model: nn.Module, batch: Batch, receive: Receiver) -> Float[Tensor, " batch"]:
    """Runs the pass; `receive` gets every trainable parameter exactly once, in no particular order.

    Args:
        model: in eval mode (gradient-checkpointed layers may be in train mode; dropout may not).
        batch: see `icons.batch`; B = 0 is allowed.
        receive: called inside the backward pass; it may overwrite the block it gets.

    Returns:
        The samples' losses, float32 (float64 for a float64 model).

    Raises:
        ValueError: inference mode is on, dropout is active, nothing is trainable, or the model's logits do not lie as
            the labels do.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "per-sample gradients: inference mode is on, where every gradient is a silent zero; leave "
            "torch.inference_mode(), and give the Trainer inference_mode=False"
        )
    refuse_dropout(model)
    parameters = trainable_parameters(model)
    if len(batch["labels"]) == 0:
        device = next(iter(parameters.values())).device
        for name, parameter in parameters.items():
            receive(name, torch.zeros(0, *parameter.shape, device=device))
        return torch.zeros(0, device=device)
    known = KNOWN.setdefault(model, Knowledge())
    while True:
        try:
            with torch.enable_grad():
                if not known.surveyed:
                    Sweep(model, batch, parameters, receive).survey()
                    known.surveyed = True
                return Sweep(model, batch, parameters, receive).run()
        except NotServedError as found:
            known.slow |= found.names
            warnings.warn(
                f"{len(found.names)} trainable parameters ({min(found.names)}, ...) take one backward pass per sample: "
                f"{found.reason}",
                SlowerPathWarning,
                stacklevel=3,
            )


class Sweep:
    """One forward and backward pass over one batch."""

    def __init__(self, model: nn.Module, batch: Batch, parameters: dict[str, nn.Parameter], receive: Receiver) -> None:
        self.model, self.batch, self.parameters, self.receive = model, batch, parameters, receive
        self.shape = batch["labels"].shape  # [B, L]
        known = KNOWN[model]
        self.slow, self.seen = known.slow, known.seen
        self.name_of = {id(parameter): name for name, parameter in parameters.items()}
        self.uses = dict.fromkeys(parameters, 0)  # calls in the forward pass that still owe their gradient
        self.partial: dict[str, Tensor] = {}
        self.sent: set[str] = set()
        self.forward_pass = True
        self.tapping = True
        self.tapped = [module for module in model.modules() if isinstance(module, nn.Linear) and self.names(module)]
        self.inputs = NarrowInputs(model, self.tapped, known.narrow)
        self.positions = SupervisedPositions(model, batch["labels"])  # asked before the weights are frozen

    def survey(self) -> None:
        """A forward pass for its graph alone: where each weight is used. Keeps no activation: while weights require a
        gradient, they would be more than those of any pass afterwards."""
        self.find_unservable()
        self.inputs.checking = True
        with self.hooks(), self.frozen(), torch.autograd.graph.saved_tensors_hooks(nothing, nothing):
            self.find_other_uses(self.forward())

    def forward(self) -> Tensor:
        with self.positions.narrowed():
            logits = self.model(**{"use_cache": False} | model_inputs(self.batch)).logits
        return self.positions.losses(logits)

    def run(self) -> Tensor:
        self.find_unservable()
        with self.hooks(), self.frozen():
            losses = self.forward()
            self.forward_pass = False
            self.find_other_uses(losses)
            if self.slow:
                self.slow_blocks(losses)
            if losses.requires_grad:
                losses.sum().backward()
        self.flush()
        return losses.detach()

    def find_unservable(self) -> None:
        """Every place a trainable parameter stands must be a plain linear layer."""
        odd: set[str] = set()
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                name = self.name_of.get(id(parameter))
                if name is not None and not isinstance(module, nn.Linear):
                    odd.add(name)
        if odd - self.slow:
            raise NotServedError(odd - self.slow, "they are not weights or biases of linear layers")

    def find_other_uses(self, losses: Tensor) -> None:
        """Weights met for the first time are in the graph still: each must be there for its layer's calls alone."""
        new = [name for name in self.parameters if name not in self.slow | self.seen]
        if not new:
            return
        edges = weight_edges(losses)
        if edges is None:  # the graph hides inside reentrant checkpoints; then a layer that was called is trusted
            odd = {name for name in new if not self.uses[name]}
        else:
            odd = {name for name in new if edges[id(self.parameters[name])] > self.uses[name]}
        if odd:
            raise NotServedError(odd, "the weights may be used outside the call of their own layer")
        self.seen |= {name for name in new if self.uses[name]}  # one that did not run has gradient zero this time

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Weights served by hooks need no gradient of their own; `.grad` is as it was afterwards."""
        grads = {name: parameter.grad for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.grad = None
                parameter.requires_grad_(name in self.slow or name not in self.seen)
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(True)
                parameter.grad = grads[name]

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = self.inputs.hooks() + [module.register_forward_hook(self.tap) for module in self.tapped]
        if any(getattr(module, "gradient_checkpointing", False) and module.training for module in self.model.modules()):
            # reentrant checkpointing differentiates nothing unless an input requires a gradient
            embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
            handles.append(embeddings.register_forward_hook(lambda _module, _args, output: output.requires_grad_()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.inputs.forget()

    def names(self, module: nn.Module) -> list[tuple[str, str]]:
        """The module's own parameters that its hook serves: (weight or bias, name)."""
        own = [(kind, self.name_of.get(id(value))) for kind, value in module.named_parameters(recurse=False)]
        return [(kind, name) for kind, name in own if name is not None and name not in self.slow]

    def tap(self, module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        names, x = self.names(module), args[0]
        if self.forward_pass:
            if x.shape[:-1] != self.shape and x.shape[0] != self.shape[0] * self.shape[1]:
                raise NotServedError(
                    {name for _, name in names}, f"an input of shape {tuple(x.shape)} is not laid out as the batch is"
                )
            for _, name in names:
                self.uses[name] += 1
        kept = self.inputs.of(module, x)
        if not torch.is_grad_enabled():
            return output
        if not output.requires_grad:
            output = output.detach().requires_grad_()  # the graph begins at the first trainable layer

        def see(x: Tensor, gradient: Tensor) -> None:
            self.arrive(names, x, gradient)

        return Tap.apply(output, kept, see)  # type: ignore[no-untyped-call]

    def arrive(self, names: list[tuple[str, str]], x: Tensor, gradient: Tensor) -> None:
        if not self.tapping:
            return
        x, gradient = (value.reshape(*self.shape, -1) for value in (x, gradient))
        for kind, name in names:
            if kind == "weight":
                block = torch.bmm(widen(gradient).mT, widen(x))
            else:
                block = widen(gradient).sum(dim=1)
            self.collect(name, block)

    def collect(self, name: str, block: Tensor) -> None:
        """A weight used several times in one forward pass is complete when all its uses have arrived."""
        block = self.partial.pop(name) + block if name in self.partial else block
        self.uses[name] -= 1
        if self.uses[name]:
            self.partial[name] = block
        else:
            self.send(name, block)

    def send(self, name: str, block: Tensor) -> None:
        self.sent.add(name)
        self.receive(name, block)

    def slow_blocks(self, losses: Tensor) -> None:
        """One backward pass per sample over the shared graph, for the parameters that hooks cannot serve."""
        self.tapping = False
        blocks = {name: [] for name in self.slow}  # type: dict[str, list[Tensor]]
        for loss in losses:
            if loss.requires_grad:
                loss.backward(retain_graph=True)
            for name in self.slow:
                parameter = self.parameters[name]
                found = parameter.grad
                blocks[name].append(torch.zeros_like(parameter) if found is None else found)
                parameter.grad = None
        for name, samples in blocks.items():
            self.send(name, widen(torch.stack(samples)))
        for name in self.slow:
            self.parameters[name].requires_grad_(False)
        self.tapping = True

    def flush(self) -> None:
        """What never arrived: sums whose last uses carry no gradient, and zeros for weights without influence."""
        for name, parameter in self.parameters.items():
            if name in self.partial:
                self.send(name, self.partial.pop(name))
            elif name not in self.sent:
                self.send(name, torch.zeros(len(self.batch["labels"]), *parameter.shape, device=parameter.device))


def nothing(_: object) -> Tensor:
    return torch.empty(0)


def widen(value: Tensor) -> Tensor:
    """float32 for sums, whatever the weights are; float64 stays."""
    return value if value.dtype == torch.float64 else value.float()
