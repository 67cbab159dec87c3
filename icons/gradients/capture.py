"""Per-sample gradients of one batch, block by block: tested, proven, and only then handed out."""

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icons.batch import Batch
from icons.gradients.acceptance import refuse_unknown
from icons.gradients.alone import LoneRow
from icons.gradients.backward_pass import (
    BackwardPass,
    OverflowedError,
    UnprovenError,
    Watcher,
)
from icons.gradients.blocks import Receiver
from icons.gradients.chance import refuse_dropout
from icons.gradients.loss_scale import LossScale
from icons.gradients.output_layer import SupervisedPositions
from icons.gradients.paths import Paths, paths_of
from icons.gradients.proof import prove
from icons.gradients.repeatable import repeatable
from icons.gradients.self_test import SelfTest
from icons.gradients.structure import Members, members_of, turn_of


class SlowerPathWarning(UserWarning):
    """Some trainable parameters need one backward pass per sample."""


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with `requires_grad`, in `named_parameters()` order: they define P and its order.

    Raises:
        ValueError: there are none.
    """
    return members_of(model).trainable


def per_sample_blocks(
    model: nn.Module,
    batch: Batch,
    begin: Callable[[Members], Receiver],
    watch: Watcher | None = None,
    in_pieces: bool = False,
) -> Float[Tensor, " batch"]:
    """Runs the pass; the last receiver gets every trainable parameter's whole block exactly once, in no particular
    order.

    Args:
        model: in eval mode (gradient-checkpointed layers may be in train mode; nothing may depend on chance).
        batch: see `icons.batch`; B = 0 is allowed.
        begin: makes a receiver, which is called inside the backward pass and may overwrite the block it gets. Called
            again when the pass has to start anew: what the receiver before it got is void.
        watch: shown what the blocks of linear layers are made of; void as well when `begin` is called again.
        in_pieces: see `BackwardPass`.

    Returns:
        The samples' losses, float32 (float64 for a float64 model).

    Raises:
        ValueError: inference mode is on, the model draws random numbers, nothing is trainable, or the model is none
            whose samples can be told apart (see `icons.gradients.acceptance` and
            `icons.gradients.self_test`).
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "per-sample gradients: inference mode is on, where every gradient is a silent zero; leave "
            "torch.inference_mode(), and give the Trainer inference_mode=False"
        )
    with turn_of(model):
        members = members_of(model)
        refuse_dropout(model, members.training)
        if len(batch["labels"]) == 0:
            receive = begin(members)
            for name, parameter in members.trainable.items():
                receive(name, torch.zeros(0, *parameter.shape, device=members.device, dtype=torch.float32), slice(0, 0))
            return torch.zeros(0, device=members.device, dtype=torch.float32)
        refuse_unknown(model, members)
        known = paths_of(model, members, batch)
        slow = known.plan(members).slow if known.tested else set()

        def compute() -> Float[Tensor, " batch"]:
            nonlocal members, known
            test = SelfTest.of(model, batch, known)
            if test is None:
                return _run(model, batch, members, known, begin, watch, in_pieces, None)
            # its passes may be the model's first, in which some put hooks on themselves
            members = members_of(model)
            known = test.known = paths_of(model, members, batch)
            lone = LoneRow.of(model, members, batch, test.row)
            try:
                looking = begin if lone is None else lone.begin(begin)
                losses = _run(model, batch, members, known, looking, watch, in_pieces, test)
                if lone is not None:
                    lone.compare()
            except BaseException:
                test.fail()
                raise
            return losses

        try:
            return repeatable(model, members.device, compute)
        finally:
            _announce(known.plan(members).slow - slow)


def _run(
    model: nn.Module,
    batch: Batch,
    members: Members,
    known: Paths,
    begin: Callable[[Members], Receiver],
    watch: Watcher | None,
    in_pieces: bool,
    test: SelfTest | None,
) -> Float[Tensor, " batch"]:
    """Passes until one is proven throughout; each pass that is given up adds to what is known."""
    scale, unproven, this_time = LossScale.of(batch, members), set[str](), set[str]()
    plan, shown = known.plan(members), None
    to_prove = not plan.tried and plan.slow != set(members.trainable)
    if test is not None and not to_prove:
        with torch.no_grad():
            positions = SupervisedPositions(model, batch["labels"], known.narrows)

            def forward(given: Batch) -> Tensor:
                return positions.of_tokens(positions.logits(model, given))

            tokens = test.unmasked(forward)
            test.compare(forward(batch) if tokens is None else tokens)
    while True:
        if to_prove:
            losses, this_time, shown = prove(model, batch, members, known, begin, watch, test)
            if losses is not None:
                return losses
        try:
            return BackwardPass(
                model,
                batch,
                members,
                known,
                begin(members),
                scale=scale,
                slow=this_time,
                watch=watch,
                strength=shown,
                in_pieces=in_pieces,
            ).run()
        except OverflowedError:
            to_prove = False
        except UnprovenError as error:
            again = error.names & unproven  # a proof on the telling batch has not met what this batch does
            for name in again:
                known.leave(name)
            to_prove = not again
            unproven |= error.names


def _announce(slow: set[str]) -> None:
    if slow:
        warnings.warn(
            f"{len(slow)} trainable parameters ({min(slow)}, ...) take one backward pass per sample: what goes in and "
            "out of their own modules does not tell the samples' gradients apart (a weight read elsewhere too, images "
            "or experts in place of rows)",
            SlowerPathWarning,
            stacklevel=5,
        )
