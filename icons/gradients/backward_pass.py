"""One batched backward pass that hands out each parameter's per-sample gradients, block by block.

Taps on the modules that hold trainable weights remember their inputs; when the backward pass brings the gradient of a
module's output, `icons.gradients.layers` makes the per-sample gradients `[B, *shape]` of its parameters, which go to
the receiver and are freed. The weights themselves are frozen meanwhile: no batch-summed weight gradient is computed,
and no `.grad` is left.

No tap is trusted unseen: `icons.gradients.proof` compares it with autograd in the first pass. What taps cannot serve
(a weight that is read elsewhere, a layer that mixes samples) is differentiated by one backward pass per sample over the
same graph: exact, slower, and announced once.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icons.batch import Batch, supervised_tokens
from icons.gradients.acceptance import refuse_absent
from icons.gradients.altered_batches import as_run
from icons.gradients.blocks import Blocks, Receiver, whole_precision
from icons.gradients.chance import without_chance
from icons.gradients.garbage import no_collection
from icons.gradients.layers import TEXT, Call, Division, Part, Widened, divided, half_products, input_of, widen
from icons.gradients.loss_scale import LossScale
from icons.gradients.output_layer import SupervisedPositions
from icons.gradients.ownership import FOREIGN, Layout, Ownership
from icons.gradients.paths import Paths, Socket
from icons.gradients.paths import strength as strength_of
from icons.gradients.slow_path import blocks_one_by_one, finite
from icons.gradients.structure import Members
from icons.gradients.sums import samples_at_a_time
from icons.gradients.tap import NarrowInputs, Tap

Watcher = Callable[[str, Tensor, Tensor, Tensor, bool], None]
"""Of a weight that linear layers alone use, once for each of its uses: name, inputs [entries, in] as they were kept,
output gradients [entries, out] in float32, whose each entry is [entries], and whether entries are the B x L positions
of the text."""


class UnprovenError(Exception):
    """These parameters are used in a way that no proof has covered yet."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(f"{min(names)}: not proven")
        self.names = names


class OverflowedError(Exception):
    """Samples whose loss is finite overflowed in float16; the pass starts again with a smaller scale for them."""


class BackwardPass:
    """One forward and backward pass over one batch.

    Args:
        model: with its weights as they are trained.
        batch: B above 0.
        members: of the model.
        known: of this model.
        receive: gets the blocks.
        scale: of float16 losses; None: nothing in the pass is float16.
        slow: these take one backward pass per sample; default: those known to.
        proving: whether to accept what is not proven; parameters on the slow path are then left out.
        watch: shown what the blocks of linear layers are made of.
        strength: of the batch, see `icons.gradients.paths.strength`; default: by its supervised tokens.
        in_pieces: whether the receiver takes a large block some samples at a time; else it always gets whole ones.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        members: Members,
        known: Paths,
        receive: Receiver,
        *,
        scale: LossScale | None = None,
        slow: set[str] | None = None,
        proving: bool = False,
        watch: Watcher | None = None,
        strength: int | None = None,
        in_pieces: bool = False,
    ) -> None:
        self.model, self.batch, self.members, self.known = model, batch, members, known
        self.parameters = parameters = members.trainable
        self.shape = (batch["labels"].shape[0], batch["labels"].shape[1])
        self.proving, self.scale, self.watch = proving, scale, watch
        self.in_pieces = in_pieces
        self.strength = strength_of(supervised_tokens(batch["labels"]) > 0) if strength is None else strength
        self.plan = known.plan(members)
        self.slow = set() if proving else self.plan.slow | (slow or set())
        self.ownership = Ownership(model, batch)
        self.sockets = self.plan.sockets
        if slow:
            self.sockets = [few for socket in self.sockets if (few := socket.without(slow)).parts]
        self.blocks = Blocks(receive, self.shape[0], members.device, set() if proving else known.silent - self.slow)
        self.met: dict[str, set[Layout]] = {name: set() for name in parameters}
        self.size_of: dict[str, Tensor] = {}  # |x| |g| of each sample, summed over uses: what rounding is measured by
        self.failed: set[str] = set()  # whose module does not run once more
        self.forward_pass = self.listening = True
        self.inside = False  # a module that runs once more is not tapped
        self.inputs = NarrowInputs(owners_in(members, self.sockets), known.narrow)
        self.widened = Widened()
        # asked before the weights are frozen: an output layer that is trained sees every position
        self.positions = SupervisedPositions(model, batch["labels"], known.narrows)
        self.autocast = _autocast_of(members.device.type)

    def run(self) -> Float[Tensor, " batch"]:
        """The pass: blocks to the receiver; the losses.

        Raises:
            UnprovenError: before or after blocks were sent; what was received is void.
            OverflowedError: the same.
        """
        with no_collection(), self.hooks(), self.frozen():
            losses = self.forward()
            if self.slow and not bool(losses.isfinite().all()):
                # not even zero times such a sample's activations is zero: they are zeros for the others' sake
                with torch.autograd.graph.saved_tensors_hooks(lambda value: value, finite):
                    losses = self.forward()
            self.forward_pass = False
            factors = self.blocks.factors = None if self.scale is None else self.scale.factors(losses)
            if self.slow:
                self.listening = False
                for name, block in blocks_one_by_one(losses, factors, self.parameters, self.slow).items():
                    self.blocks.send(name, block)
                self.listening = True
            if losses.requires_grad:
                torch.autograd.backward(losses, torch.ones_like(losses) if factors is None else factors)
            self.find_unmet()
        self.flush()
        if self.scale is not None and self.scale.lower(losses.detach().isfinite() & ~self.blocks.finite):
            raise OverflowedError
        if loud := self.blocks.loud():
            raise UnprovenError(loud)
        return losses.detach()

    def forward(self) -> Float[Tensor, " batch"]:
        self.blocks.expect_none()
        with torch.enable_grad(), without_chance(self.model):
            return self.positions.run(self.model, as_run(self.batch, self.known))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Weights served by taps need no gradient of their own; `.grad` is as it was afterwards.

        What no proof has met does need one: that it has none then is how one knows that it took no part.
        """
        grads = {name: parameter.grad for name, parameter in self.parameters.items()}
        unmet = set() if self.proving else self.plan.unmet
        try:
            for name, parameter in self.parameters.items():
                parameter.grad = None
                parameter.requires_grad_(name in self.slow or name in unmet)
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(True)
                parameter.grad = grads[name]

    def find_unmet(self) -> None:
        unmet = {n for n, p in self.parameters.items() if n not in self.slow and p.requires_grad and p.grad is not None}
        if unmet:
            raise UnprovenError(unmet)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = self.inputs.hooks()
        try:
            for socket in self.sockets:
                module = self.members.modules[socket.module]
                # a linear layer's own output, before other hooks: they are the graph's; else what the module is run for
                tap = partial(self.tap, socket)
                handles.append(module.register_forward_hook(tap, with_kwargs=True, prepend=socket.linear))
            if any(getattr(module, "gradient_checkpointing", False) for module in self.members.training):
                # reentrant checkpointing differentiates nothing unless an input requires a gradient
                embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
                handles.append(embeddings.register_forward_hook(lambda _module, _args, output: output.requires_grad_()))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.inputs.forget()

    def tap(self, socket: Socket, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.inside:
            return None
        call = None if socket.linear else Call(module, args, kwargs)
        kept = input_of(args, kwargs) if call is None else call.let_go()
        if self.known.sees_text.get(module, True):
            division = divided(kept, output, self.shape)
        else:
            division = Division(*self.ownership.share(kept, output, self.known.refuses(socket.parts)))
        if self.forward_pass:
            self.meet(socket.parts, division.layout)
        if division.layout is FOREIGN or not torch.is_grad_enabled():
            return None
        if not output.requires_grad:
            output = output.detach().requires_grad_()  # the graph begins at the first trainable layer
        if call is None:
            kept = [self.inputs.of(module, kept[0])]
        return Tap.apply(output, partial(self.arrive, socket, division, call), *kept)  # type: ignore[no-untyped-call]

    def meet(self, parts: list[Part], layout: Layout) -> None:
        unknown: set[tuple[str, Layout, int]] = set()
        for part in parts:
            use = part.name, layout, self.strength
            if not self.proving and use not in self.plan.covered:
                (self.plan.covered if self.known.covers(*use) else unknown).add(use)
            if self.proving:
                self.met[part.name].add(layout)
            if layout is not FOREIGN:
                self.blocks.expect(part.name)
        if unknown:
            raise UnprovenError({name for name, *_ in unknown})

    def arrive(
        self, socket: Socket, division: Division, call: Call | None, kept: tuple[Tensor, ...], gradient: Tensor
    ) -> None:
        if not self.listening:
            return
        blocks: dict[str, Tensor] = {}
        if call is not None:
            blocks = self.again(socket, division, call, kept, gradient)
        with whole_precision(gradient):
            for part in socket.parts:
                if self.proving:
                    size = division.lengths(kept[0]).to(gradient.device) * division.lengths(gradient)
                    if self.blocks.factors is not None:
                        size = size / self.blocks.factors.to(size.device)
                    self.size_of[part.name] = self.size_of.get(part.name, torch.zeros_like(size)) + size
                if self.watch is not None and part.name not in self.plan.hidden and part.kind == "weight":
                    self.show(part.name, division, kept[0], gradient)
                pieces = self.pieces(part, division)
                if len(pieces) == 1:
                    block = self.linear(part, division, kept[0], gradient) if part.linear else blocks[part.kind]
                    self.blocks.collect(part.name, block)
                    continue
                made = ((rows, division.linear(part.kind, kept[0], gradient, rows)) for rows in pieces)
                self.blocks.collect_pieces(part.name, made)

    def again(
        self, socket: Socket, division: Division, call: Call, kept: tuple[Tensor, ...], gradient: Tensor
    ) -> dict[str, Tensor]:
        """The blocks of a module that runs once more for each sample. One that cannot, as it keeps something of the
        whole batch, is wrong for a proof, and else asks for one."""
        odd = {part.kind: self.parameters[part.name] for part in socket.parts if not part.linear}
        self.inside = True
        try:
            with self.autocast():
                return call.again(odd, division, kept, gradient)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            names = {part.name for part in socket.parts if not part.linear}
            if not self.proving:
                raise UnprovenError(names) from error
            self.failed |= names
            return {
                kind: value.new_zeros(self.shape[0], *value.shape, dtype=torch.float32) for kind, value in odd.items()
            }
        finally:
            self.inside = False

    def linear(self, part: Part, division: Division, x: Tensor, gradient: Tensor) -> Tensor:
        wide = part.kind == "weight" and not half_products(gradient, x)
        return division.linear(part.kind, self.widened.of(x) if wide else x, gradient)

    def pieces(self, part: Part, division: Division) -> list[slice]:
        """The samples to make a block of at a time: all, unless it is a large one that is made of this call alone."""
        possible = self.in_pieces and part.linear and division.layout.even
        if not (possible and self.blocks.alone(part.name)):
            return [slice(0, self.shape[0])]
        parameter = self.parameters[part.name]
        return samples_at_a_time(self.shape[0], parameter.numel(), parameter.device)

    def show(self, name: str, division: Division, x: Tensor, gradient: Tensor) -> None:
        assert self.watch is not None
        owners, gradient = division.owners(gradient), widen(division.entries(gradient))
        if self.blocks.factors is not None:
            gradient = gradient / self.blocks.factors.to(gradient.device)[owners, None]
        self.watch(name, division.entries(x), gradient, owners, division.layout.kind in TEXT)

    def flush(self) -> None:
        """What never arrived is zero, as of weights without influence."""
        left_out = self.plan.slow if self.proving else set()
        for name in self.blocks.flush([name for name in self.parameters if name not in left_out]):
            for owner in self.members.structure.owners[name]:
                refuse_absent(self.members.modules[owner.around], name)
            parameter = self.parameters[name]
            zeros = torch.zeros(self.shape[0], *parameter.shape, device=parameter.device, dtype=torch.float32)
            self.blocks.send(name, zeros)


def owners_in(members: Members, sockets: Iterable[Socket]) -> dict[nn.Module, tuple[str, nn.Module]]:
    """See `NarrowInputs`."""
    modules = members.modules
    return {modules[socket.module]: (socket.path, modules[socket.around]) for socket in sockets}


def _autocast_of(kind: str) -> Callable[[], Any]:
    """The autocast that is on now, to be entered again in the backward pass."""
    if not torch.is_autocast_enabled(kind):
        return nullcontext
    dtype = torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype)
