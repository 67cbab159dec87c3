"""The proof that per-sample gradients are autograd's, in the first pass over a model and where a new use is met.

With weights w of the samples that differ, `sum_i w_i block_i` must be the gradient of `sum_i w_i loss_i`, which
autograd gives. The blocks come from a backward pass without weights: were a block another sample's, or wrong in itself,
the sums would differ. The weights are powers of two, so that weighing rounds nothing.

A layer of a vision tower can look laid out as the batch is, and be so in one batch, while its rows are images. So what
does not see the text is a stranger, whatever it looks like: its input does not move when the text does. Its rows are
the samples' as `icons.gradients.ownership` has it, or nobody knows whose.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icons.batch import IGNORE_INDEX, Batch
from icons.gradients.backward_pass import BackwardPass, OverflowedError, finite, owners_in
from icons.gradients.chance import without_chance
from icons.gradients.loss_scale import LossScale, needs_scale
from icons.gradients.output_layer import SupervisedPositions
from icons.gradients.ownership import FOREIGN
from icons.gradients.paths import Paths, is_text
from icons.gradients.structure import Members
from icons.gradients.tap import NarrowInputs

WEIGHTS = (1.0, -2.0, 4.0, -1.0, 2.0, -4.0, 0.5, -0.5)
FLOOR = 3e-6  # of |x| |g|: what float32 sums of such products are good for


@dataclass
class Truth:
    """What autograd says of one batch: `weights [B]` (0 for a sample whose loss is not finite), and each parameter's
    gradient of the weighted sum of losses; None: it has no influence."""

    weights: Float[Tensor, " batch"]
    gradients: dict[str, Tensor | None]

    def apart(self, other: "Truth") -> dict[str, float]:
        """How far two passes over the same batch differ, parameter by parameter: the noise of kernels that add in
        another order each time, which half precision amplifies from layer to layer."""
        return {
            name: float((value.float() - again.float()).norm())
            for name, value in self.gradients.items()
            if value is not None and (again := other.gradients[name]) is not None
        }


def prove(model: nn.Module, batch: Batch, members: Members, known: Paths) -> set[str]:
    """Finds, for each parameter, the quickest path that is right on this batch, and writes it down.

    Costs one pass for the truth, and one for each path that has to be tried.

    Returns:
        Parameters of which nothing could be shown, their gradient not being finite: for this batch they are slow.
    """
    size = len(batch["labels"])
    if known.kind[1]:
        look_for_strangers(model, batch, members, known)
    truth, scale = truth_of(model, batch, members, known), LossScale.of(batch, members)
    noise: dict[str, float] | None = None
    while True:
        verdict = Verdict(truth)
        backward_pass = BackwardPass(model, batch, members, known, verdict.receive, scale=scale, proving=True)
        try:
            backward_pass.run()
        except OverflowedError:
            continue
        wrong, silent, unknown = verdict.of(backward_pass, noise or {})
        if wrong and noise is None and is_half(backward_pass):
            noise = truth.apart(truth_of(model, batch, members, known))
            wrong, silent, unknown = verdict.of(backward_pass, noise)
        for name in wrong:
            known.worsen(name, backward_pass.met[name])
        if not wrong:
            for name in set(members.trainable) - known.slow(members.trainable) - unknown:
                known.record(name, backward_pass.met[name], size, name in silent)
            return unknown


class Verdict:
    """Compares blocks with the truth as they stream by."""

    def __init__(self, truth: Truth) -> None:
        self.truth = truth
        self.found: dict[str, Tensor] = {}  # |sum - truth|, |truth|, root of sum of |w block|^2

    def receive(self, name: str, block: Tensor, rows: slice) -> None:
        kept = self.truth.weights != 0
        weights = self.truth.weights[kept].to(block.device)
        flat = block[:, None].flatten(1)[kept.to(block.device)].to(weights.dtype)
        expected = self.truth.gradients[name]
        total = weights @ flat
        true = torch.zeros_like(total) if expected is None else expected.reshape(-1).to(total)
        spread = (weights[:, None] * flat).norm()
        self.found[name] = torch.stack([(total - true).norm(), true.norm(), spread])

    def of(self, backward_pass: BackwardPass, noise: Mapping[str, float]) -> tuple[set[str], set[str], set[str]]:
        """Names found wrong; names without any gradient; names whose gradient is not finite.

        Args:
            backward_pass: which gave the blocks.
            noise: see `Truth.apart`.
        """
        wrong: set[str] = set()
        silent: set[str] = set()
        unknown: set[str] = set()
        for name, numbers in self.found.items():
            error, true, spread = numbers.tolist()
            sizes = backward_pass.size_of.get(name)  # of a broken sample they are nothing to measure by
            kept = () if sizes is None else sizes[self.truth.weights.to(sizes.device) != 0].tolist()
            size = max(true, spread)
            rounding = FLOOR * 4 * sum(kept) + min(3 * noise.get(name, 0.0), size / 4)
            if not all(map(torch.isfinite, numbers.cpu())):
                unknown.add(name)
            elif not error <= tolerance(backward_pass, backward_pass.parameters[name]) * size + rounding:
                wrong.add(name)
            elif true == spread == 0:
                # a call that is not tapped would stay silent when it no longer is
                (wrong if FOREIGN in backward_pass.met[name] else silent).add(name)
        return wrong, silent, unknown


def tolerance(backward_pass: BackwardPass, parameter: nn.Parameter) -> float:
    """Relative error below which two ways of summing agree."""
    if not is_half(backward_pass):
        return 1e-4
    return 2**-8 if parameter.device.type == "cpu" else 2**-6


def is_half(backward_pass: BackwardPass) -> bool:
    """Whether anything in the pass is float16 or bfloat16."""
    dtypes = backward_pass.members.structure.dtypes
    if any(dtype in (torch.float16, torch.bfloat16) for dtype, _ in dtypes):
        return True
    return any(torch.is_autocast_enabled(kind) for kind in {kind for _, kind in dtypes})


def truth_of(model: nn.Module, batch: Batch, members: Members, known: Paths) -> Truth:
    """One ordinary pass over the batch with all of its trainable weights; where it does not fit a GPU's memory, with
    its activations in the CPU's."""
    try:
        return ordinary_pass(model, batch, members, known)
    except torch.OutOfMemoryError:
        with torch.autograd.graph.save_on_cpu():
            return ordinary_pass(model, batch, members, known)


def ordinary_pass(model: nn.Module, batch: Batch, members: Members, known: Paths) -> Truth:
    parameters, scaled = members.trainable, needs_scale(members)
    grads = {name: parameter.grad for name, parameter in parameters.items()}
    inputs = NarrowInputs(owners_in(members, known.plan(members).sockets), known.narrow)
    inputs.checking = True
    positions = SupervisedPositions(model, batch["labels"], known.narrows)
    try:
        with ExitStack() as stack:
            for handle in [*inputs.hooks(), *watches(inputs)]:
                stack.callback(handle.remove)
            stack.callback(inputs.forget)
            stack.enter_context(torch.enable_grad())
            with without_chance(model):
                losses = positions.run(model, batch)
            inputs.checking = False
            weights = sample_weights(losses)
            if not bool((weights != 0).all()):
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda value: value, finite))
                losses = positions.run(model, batch)
            factor = float(LossScale(batch["labels"]).factors(losses).min()) / 64 if scaled else 1.0
            while True:
                for parameter in parameters.values():
                    parameter.grad = None
                if losses.requires_grad:
                    torch.autograd.backward(losses, weights * factor)
                found = {name: parameter.grad for name, parameter in parameters.items()}
                if factor < 2**-20 or not scaled or all_finite(found):
                    break
                factor /= 2**8  # it overflowed in float16
                losses = positions.run(model, batch)
        if factor != 1:
            found = {name: None if value is None else value.float() / factor for name, value in found.items()}
        return Truth(weights, found)
    finally:
        for name, parameter in parameters.items():
            parameter.grad = grads[name]


def all_finite(gradients: Mapping[str, Tensor | None]) -> bool:
    flags = [value.isfinite().all() for value in gradients.values() if value is not None]
    return not flags or bool(torch.stack(flags).all())


def watches(inputs: NarrowInputs) -> list[Any]:
    """Hooks that compare each layer's input with the narrower tensor that a tap would keep."""

    def watch(module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        if args and isinstance(args[0], Tensor):
            inputs.of(module, args[0])

    return [module.register_forward_hook(watch) for module in inputs.owners]


def sample_weights(losses: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Powers of two with signs, different within each eight samples, in an order without a period."""
    generator = torch.Generator().manual_seed(0)
    count = len(losses)
    orders = [torch.randperm(len(WEIGHTS), generator=generator) for _ in range(-(-count // len(WEIGHTS)))]
    weights = torch.tensor(WEIGHTS, dtype=losses.dtype)[torch.cat(orders)[:count]].to(losses.device)
    return torch.where(losses.detach().isfinite(), weights, 0)


def look_for_strangers(model: nn.Module, batch: Batch, members: Members, known: Paths) -> None:
    """Writes down which modules get the same when the text is moved by a token, or its embeddings are made longer:
    those of towers, whose rows are images."""
    owners = [owner for owners in members.structure.owners.values() for owner in owners]
    modules = {members.modules[number] for owner in owners for number in (owner.module, owner.around)}
    if all(module in known.sees_text for module in modules):
        return
    before = fingerprints(model, modules, batch)
    try:
        after = fingerprints(model, modules, moved(batch))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model says to a text whose last token is gone
        embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
        if embeddings is None:
            for name in members.trainable:
                known.leave(name)
            return
        handle = embeddings.register_forward_hook(lambda _module, _args, output: output * 1.5)
        try:
            after = fingerprints(model, modules, batch)
        finally:
            handle.remove()
    for module, value in before.items():
        same = torch.allclose(value, after[module], rtol=1e-6, atol=0)
        known.sees_text[module] = known.sees_text.get(module, True) and not same


def moved(batch: Batch) -> Batch:
    """The batch with its text one place further right: another token at the beginning, none at the end."""
    shape, labels = batch["labels"].shape, batch["labels"]
    found = dict(batch)
    for name, value in batch.items():
        if is_text(name, value, shape):
            found[name] = torch.cat([value[:, :1], value[:, :-1]], dim=1)
    if "input_ids" in found:
        found["input_ids"][:, 0] = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX][0]
    return found


def fingerprints(model: nn.Module, modules: Iterable[nn.Module], batch: Batch) -> dict[nn.Module, Tensor]:
    """A number for what each module gets, in which the order of its numbers counts."""
    found: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)
        if given is not None:
            flat = given.detach().flatten().double().nan_to_num(0, 0, 0)
            ramp = torch.linspace(1, 2, flat.numel(), dtype=torch.float64, device=flat.device)
            found[module] = found.get(module, torch.zeros((), dtype=torch.float64)) + (flat.abs() @ ramp).cpu()

    with ExitStack() as stack, torch.no_grad():
        for module in modules:
            stack.callback(module.register_forward_pre_hook(watch, with_kwargs=True).remove)
        SupervisedPositions(model, batch["labels"]).run(model, batch)
    return found
