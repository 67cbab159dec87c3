"""The proof that per-sample gradients are autograd's, in the first pass over a model and where a new use is met.

With weights w of the samples that differ, `sum_i w_i block_i` must be the gradient of `sum_i w_i loss_i`, which
autograd gives. The blocks come from a backward pass without weights: were a block another sample's, or wrong in itself,
the sums would differ. The weights are powers of two, so that weighing rounds nothing.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icons.batch import Batch, supervised_tokens
from icons.gradients.altered_batches import as_run, rows_of
from icons.gradients.backward_pass import BackwardPass, OverflowedError, Watcher, owners_in
from icons.gradients.blocks import Receiver
from icons.gradients.chance import without_chance
from icons.gradients.loss_scale import LossScale, needs_scale
from icons.gradients.output_layer import SupervisedPositions
from icons.gradients.overflow import fitted
from icons.gradients.ownership import FOREIGN
from icons.gradients.paths import Paths, strength
from icons.gradients.self_test import SelfTest
from icons.gradients.slow_path import finite
from icons.gradients.strangers import Strangers
from icons.gradients.structure import Members
from icons.gradients.tap import NarrowInputs

_WEIGHTS = (1.0, -2.0, 4.0, -1.0, 2.0, -4.0, 0.5, -0.5)
_FLOOR = 3e-6  # of |x| |g|: what float32 sums of such products are good for


@dataclass
class Truth:
    """What autograd says of one batch: `weights [B]` (0 for a sample whose loss is not finite), and each parameter's
    gradient of the weighted sum of losses; None: it has no influence."""

    weights: Float[Tensor, " batch"]
    gradients: dict[str, Tensor | None]

    def apart(self, other: "Truth") -> dict[str, float]:
        """How far two passes over the same rows differ, parameter by parameter: the noise of sums in another order,
        as some kernels take each time, which half precision amplifies from layer to layer; and of sums that are made in
        half precision themselves, as a CPU's LayerNorm adds up all positions."""
        return {
            name: float((value.float() - again.float()).norm())
            for name, value in self.gradients.items()
            if value is not None and (again := other.gradients[name]) is not None
        }


def prove(
    model: nn.Module,
    batch: Batch,
    members: Members,
    known: Paths,
    begin: Callable[[Members], Receiver],
    watch: Watcher | None,
    test: SelfTest | None,
) -> tuple[Float[Tensor, " batch"] | None, set[str], int]:
    """Finds, for each parameter, the quickest path that is right on this batch, and writes it down.

    Costs one pass for the truth, and one for each path that has to be tried. The last of these is the batch's own pass,
    if no parameter is slow: what was received in it stands.

    Args:
        model: any.
        batch: not empty.
        members: of the model.
        known: of the model.
        begin: see `icons.gradients.capture`.
        watch: see `icons.gradients.capture`.
        test: to be passed first.

    Returns:
        The losses if the receiver has all blocks, else None; parameters of which nothing could be shown, their
        gradient not being finite: for this batch they are slow; and the strength of what was shown.
    """
    strangers = Strangers.of(model, batch, members, known)
    truth = _truth_of(model, batch, members, known, strangers, test)
    scale = LossScale.of(batch, members)
    noise: dict[str, float] | None = None
    shown = strength((truth.weights != 0) & (supervised_tokens(batch["labels"]) > 0).to(truth.weights.device))
    while True:
        verdict = Verdict(truth, begin(members))
        backward_pass = BackwardPass(
            model, batch, members, known, verdict.receive, scale=scale, proving=True, watch=watch
        )
        try:
            losses = backward_pass.run()
        except OverflowedError:
            continue
        wrong, silent, unknown = verdict.of(backward_pass, noise or {})
        if wrong and noise is None and _is_half(backward_pass):
            turned = rows_of(batch, range(len(batch["labels"]))[::-1])
            again = (batch, truth.weights) if turned is None else (turned, truth.weights.flip(0))
            noise = truth.apart(_truth_of(model, again[0], members, known, weights=again[1]))
            wrong, silent, unknown = verdict.of(backward_pass, noise)
        for name in wrong:
            known.worsen(name, backward_pass.met[name])
        if not wrong:
            slow = known.plan(members).slow
            for name in set(members.trainable) - slow - unknown:
                known.record(name, backward_pass.met[name], shown, name in silent)
            return None if slow or unknown else losses, unknown, shown


class Verdict:
    """Compares blocks with the truth as they stream by to a receiver."""

    def __init__(self, truth: Truth, pass_on: Receiver) -> None:
        self.truth, self.pass_on = truth, pass_on
        self.numbers: dict[str, Tensor] = {}  # |sum - truth|, |truth|, root of sum of |w block|^2

    def receive(self, name: str, block: Tensor, rows: slice) -> None:
        kept = self.truth.weights != 0
        weights = self.truth.weights[kept].to(block.device)
        flat = block[:, None].flatten(1)[kept.to(block.device)].to(weights.dtype)
        expected = self.truth.gradients[name]
        total = weights @ flat
        true = torch.zeros_like(total) if expected is None else expected.reshape(-1).to(total)
        spread = (weights[:, None] * flat).norm()
        self.numbers[name] = torch.stack([(total - true).norm(), true.norm(), spread])
        self.pass_on(name, block, rows)

    def of(self, backward_pass: BackwardPass, noise: Mapping[str, float]) -> tuple[set[str], set[str], set[str]]:
        """Names found wrong; names without any gradient; names whose gradient is not finite.

        Args:
            backward_pass: which gave the blocks.
            noise: see `Truth.apart`.
        """
        wrong: set[str] = set()
        silent: set[str] = set()
        unknown: set[str] = set()
        for name, numbers in self.numbers.items():
            error, true, spread = numbers.tolist()
            sizes = backward_pass.size_of.get(name)  # of a broken sample they are nothing to measure by
            kept = () if sizes is None else sizes[self.truth.weights.to(sizes.device) != 0].tolist()
            size = max(true, spread)
            rounding = _FLOOR * 4 * sum(kept) + min(3 * noise.get(name, 0.0), size / 4)
            if not all(map(torch.isfinite, numbers.cpu())):
                unknown.add(name)
            elif not error <= _tolerance(backward_pass, backward_pass.parameters[name]) * size + rounding:
                wrong.add(name)
            elif true == spread == 0:
                # a call that is not tapped would stay silent when it no longer is
                (wrong if FOREIGN in backward_pass.met[name] else silent).add(name)
        failed = backward_pass.failed
        return wrong | failed, silent - failed, unknown - failed


def _tolerance(backward_pass: BackwardPass, parameter: nn.Parameter) -> float:
    """Relative error below which two ways of summing agree."""
    if not _is_half(backward_pass):
        return 1e-4
    return 2**-8 if parameter.device.type == "cpu" else 2**-6


def _is_half(backward_pass: BackwardPass) -> bool:
    """Whether anything in the pass is float16 or bfloat16."""
    dtypes = backward_pass.members.structure.dtypes
    if any(dtype in (torch.float16, torch.bfloat16) for dtype, _ in dtypes):
        return True
    return any(torch.is_autocast_enabled(kind) for kind in {kind for _, kind in dtypes})


def _truth_of(
    model: nn.Module,
    batch: Batch,
    members: Members,
    known: Paths,
    strangers: Strangers | None = None,
    test: SelfTest | None = None,
    weights: Float[Tensor, " batch"] | None = None,
) -> Truth:
    """One ordinary pass over the batch with all of its trainable weights; where it does not fit a GPU's memory, with
    activations in the CPU's. Its forward pass serves the self-test and the search for strangers too."""
    return fitted(members.device, lambda: _ordinary_pass(model, batch, members, known, strangers, test, weights))


def _ordinary_pass(
    model: nn.Module,
    batch: Batch,
    members: Members,
    known: Paths,
    strangers: Strangers | None,
    test: SelfTest | None,
    weights: Float[Tensor, " batch"] | None,
) -> Truth:
    parameters, scaled = members.trainable, needs_scale(members)
    grads = {name: parameter.grad for name, parameter in parameters.items()}
    inputs = NarrowInputs(owners_in(members, known.plan(members).sockets), known.narrow)
    inputs.checking = True
    positions = SupervisedPositions(model, batch["labels"], known.narrows)
    try:
        with ExitStack() as stack:
            for handle in [*inputs.hooks(), *_watches(inputs)]:
                stack.callback(handle.remove)
            stack.callback(inputs.forget)
            stack.enter_context(torch.enable_grad())

            def forward(given: Batch) -> Tensor:
                with without_chance(model), strangers.watching() if strangers else nullcontext():
                    return positions.of_tokens(positions.logits(model, given))

            tokens = None if test is None else test.unmasked(forward)
            given = as_run(batch, known)
            if tokens is None:
                tokens = forward(given)
            losses = positions.means(tokens)
            inputs.checking = False
            if strangers is not None:
                strangers.compare()
            if test is not None:
                test.compare(tokens)
                if not known.narrows and positions.head is not None:
                    positions = SupervisedPositions(model, batch["labels"], narrow=False)
                    losses = positions.run(model, given)
            weights = _sample_weights(losses) if weights is None else weights
            if not bool((weights != 0).all()):
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda value: value, finite))
                losses = positions.run(model, given)
            factor = float(LossScale(batch["labels"]).factors(losses).min()) / 64 if scaled else 1.0
            while True:
                for parameter in parameters.values():
                    parameter.grad = None
                if losses.requires_grad:
                    torch.autograd.backward(losses, weights * factor)
                gradients = {name: parameter.grad for name, parameter in parameters.items()}
                if factor < 2**-20 or not scaled or _all_finite(gradients):
                    break
                factor /= 2**8  # it overflowed in float16
                losses = positions.run(model, given)
        if factor != 1:
            gradients = {n: None if value is None else value.float() / factor for n, value in gradients.items()}
        return Truth(weights, gradients)
    finally:
        for name, parameter in parameters.items():
            parameter.grad = grads[name]


def _all_finite(gradients: Mapping[str, Tensor | None]) -> bool:
    flags = [value.isfinite().all() for value in gradients.values() if value is not None]
    return not flags or bool(torch.stack(flags).all())


def _watches(inputs: NarrowInputs) -> list[Any]:
    """Hooks that compare each layer's input with the narrower tensor that a tap would keep."""

    def watch(module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        if args and isinstance(args[0], Tensor):
            inputs.of(module, args[0])

    return [module.register_forward_hook(watch) for module in inputs.owners]


def _sample_weights(losses: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Powers of two with signs, different within each eight samples, in an order without a period."""
    generator = torch.Generator().manual_seed(0)
    count = len(losses)
    orders = [torch.randperm(len(_WEIGHTS), generator=generator) for _ in range(-(-count // len(_WEIGHTS)))]
    weights = torch.tensor(_WEIGHTS, dtype=losses.dtype)[torch.cat(orders)[:count]].to(losses.device)
    return torch.where(losses.detach().isfinite(), weights, 0)
