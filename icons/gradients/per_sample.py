"""Per-sample gradients from one batched backward pass: whole, projected as they stream by, or scored against tasks.

Planned on paper for LLaVA-7B, LoRA r = 128 (P = 320 M), batch 8; bytes per token were measured on a small bfloat16
Llama. Held per GPU in float32: adapter 1.3 GB, signs of the count sketch 1.3 GB; with `adam` two moments 2.6 GB, with
`diagonal` one multiplier 1.3 GB; the largest block of per-sample gradients (8 x 128 x 11,008) 45 MB, twice while it is
preconditioned; the accumulator [8, 5120] 0.2 MB. Weights in bfloat16 13.5 GB. Activations that the backward pass needs
are 20 bytes per hidden and 8 per intermediate unit for each token and layer, 5.4 MB a token in all: 45 GB for the 8,192
tokens that `icons gradients` puts into a batch by default (8 rows of 1,024, 4 full ones), 65 GB with all the rest,
within 80 GB. 8 full rows of 2,048 at once would take 89 GB of activations and fit no such card. With gradient
checkpointing they are 0.26 MB per token and one layer: 8 full rows take 7 GB, 8,192 tokens 3.5 GB, within 48 GB. Logits
exist of supervised tokens alone, in the model's dtype, 0.5 GB for 4,096 of them with their gradient.

The floor is the pass through the frozen weights, 4 x 6.7 G operations per token: 16,384 tokens are 0.44 PFLOP, 2.8 s
at 160 TFLOP/s. Blocks are written once and read once (`icons.gradients.fused_fold`), 8 x P x 4 bytes each: 20 GB, 10 ms
at 2 TB/s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from icons.batch import Batch, supervised_tokens
from icons.gradients.altered_batches import as_run
from icons.gradients.blocks import Receiver
from icons.gradients.capture import per_sample_blocks
from icons.gradients.loss_scale import needs_scale
from icons.gradients.output_layer import SupervisedPositions
from icons.gradients.paths import paths_of
from icons.gradients.projected_rows import ProjectedRows, by_entry
from icons.gradients.repeatable import repeatable
from icons.gradients.structure import Members, members_of, turn_of
from icons.gradients.sums import SquaredNorms, inner_products
from icons.preconditioner import Preconditioner
from icons.projection import Identity, Projector


@dataclass(frozen=True)
class ProjectedGradients:
    """What one batch gives: `gradient [B, K]`, `norm [B]` before projection, `loss [B]`, `tokens [B]` supervised."""

    gradient: Float[Tensor, "batch dim"]
    norm: Float[Tensor, " batch"]
    loss: Float[Tensor, " batch"]
    tokens: Int[Tensor, " batch"]


def per_sample_gradients(model: nn.Module, batch: Batch) -> Float[Tensor, "batch params"]:
    """The exact gradient of each sample's own mean loss with respect to the trainable parameters.

    Equals one `torch.autograd.grad` per sample alone and unpadded. Holds all B x P numbers: for small models and tests;
    `projected_gradients` streams.

    Args:
        model: Hugging Face causal or image-text model in eval mode.
        batch: see `icons.batch`.

    Returns:
        `[B, P]` float32, the parameters flattened in `named_parameters()` order. A sample without supervised tokens
        has gradient 0; a non-finite gradient stays visible as it is.

    Raises:
        ValueError: in inference mode, with active dropout, or without trainable parameters.
    """
    identity = Identity()
    total = torch.zeros(0)

    def begin(members: Members) -> Receiver:
        nonlocal total
        total = identity.start(len(batch["labels"]), members.shapes, members.device)

        def receive(name: str, block: Tensor, rows: slice) -> None:
            identity.add(total[rows], name, block.float())

        return receive

    per_sample_blocks(model, batch, begin)
    return total


def projected_gradients(
    model: nn.Module, batch: Batch, projector: Projector, preconditioner: Preconditioner | None = None
) -> ProjectedGradients:
    """Per-sample gradients, preconditioned and projected inside the backward pass; `[B, P]` never exists.

    Equals `projector` applied to `preconditioner` applied to `per_sample_gradients(model, batch)`.

    Args:
        model: Hugging Face causal or image-text model in eval mode.
        batch: see `icons.batch`.
        projector: `CountSketch`, `Rademacher`, `Gaussian` or `Identity`.
        preconditioner: None leaves the gradient plain (validation side).

    Returns:
        float32 rows; `norm` is the L2 norm of what was projected, that is after the preconditioner.

    Raises:
        ValueError: in inference mode, with active dropout, without trainable parameters, or without their moments.
    """
    size = len(batch["labels"])
    rows: ProjectedRows

    def begin(members: Members) -> Receiver:
        nonlocal rows
        rows = ProjectedRows(size, members.shapes, members.device, projector, preconditioner)
        return rows.receive

    losses = per_sample_blocks(model, batch, begin, in_pieces=by_entry(projector, preconditioner))
    return ProjectedGradients(rows.total, rows.norm(), losses.float(), supervised_tokens(batch["labels"]))


def exact_influence(
    model: nn.Module,
    batch: Batch,
    task_vectors: Sequence[Mapping[str, Tensor]],
    preconditioner: Preconditioner | None = None,
) -> Float[Tensor, "batch tasks"]:
    """Inner product of each sample's unit gradient with each task vector, without projection.

    With a task vector that is the mean of the task's unit gradients, this is the mean cosine similarity, exactly.

    Args:
        model: Hugging Face causal or image-text model in eval mode.
        batch: see `icons.batch`.
        task_vectors: one mapping per task, parameter name -> tensor of the parameter's shape; a name that is missing
            counts as zero.
        preconditioner: for the samples' gradients; None leaves them plain.

    Returns:
        `[B, S]` float32; NaN for a sample whose gradient is zero or not finite.

    Raises:
        ValueError: as `projected_gradients`; or a task vector names an unknown parameter, or has another shape.
    """
    product, norm, _ = scored_gradients(model, batch, TaskMatrix(model, task_vectors), preconditioner)
    return product / norm[:, None]


class TaskMatrix:
    """The task vectors of all tasks, parameter by parameter, as `[S, O*I]` matrices on the model's device.

    Args:
        model: whose trainable parameters the vectors belong to.
        task_vectors: one mapping per task, parameter name -> tensor.
        dtype: float32, or bfloat16 for half the memory (S x P numbers).
        offload: keep them on the CPU and copy a parameter's part when its gradient arrives.

    Raises:
        ValueError: a name or a shape is not the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        task_vectors: Sequence[Mapping[str, Tensor]],
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> None:
        members = members_of(model)
        shapes = members.shapes
        for number, vector in enumerate(task_vectors):
            for name, value in vector.items():
                if name not in shapes or value.shape != shapes[name]:
                    expected = f"shape {tuple(shapes[name])}" if name in shapes else "one of the trainable parameters"
                    raise ValueError(
                        f"task vector {number}: {name} with shape {tuple(value.shape)}; expected {expected}: it was "
                        "made for another model or adapter"
                    )
        self.tasks = len(task_vectors)
        device = torch.device("cpu") if offload else members.device
        self.rows: dict[str, Tensor] = {}
        for name, shape in shapes.items() if task_vectors else ():
            rows = [vector.get(name, torch.zeros(shape, dtype=torch.float32)).flatten() for vector in task_vectors]
            self.rows[name] = torch.stack(rows).to(device, dtype)

    def product(self, name: str, block: Float[Tensor, " batch *shape"]) -> Float[Tensor, "batch tasks"]:
        rows = self.rows[name].to(block.device, block.dtype, non_blocking=True)
        return inner_products(block[:, None].flatten(1), rows)


def scored_gradients(
    model: nn.Module,
    batch: Batch,
    tasks: TaskMatrix,
    preconditioner: Preconditioner | None = None,
    projector: Projector | None = None,
) -> tuple[Float[Tensor, "batch tasks"], Float[Tensor, " batch"], ProjectedGradients | None]:
    """Inner products with the task vectors, norms, and on demand the projected gradients, in one backward pass.

    Returns:
        Products `[B, S]` (not divided by the norm), norms `[B]`, and the projected gradients if a projector is given
        (else an empty projection that still carries loss and tokens).
    """
    size = len(batch["labels"])
    product, total, squares = torch.zeros(0), torch.zeros(0), SquaredNorms(0, (), torch.device("cpu"))

    def begin(members: Members) -> Receiver:
        nonlocal product, squares, total
        product = torch.zeros(size, tasks.tasks, device=members.device, dtype=torch.float32)
        total = product.new_zeros(size, 0)
        squares = SquaredNorms(size, members.trainable, members.device)
        if projector is not None:
            total = projector.start(size, members.shapes, members.device)

        def receive(name: str, block: Tensor, rows: slice) -> None:
            block = block.float()
            if preconditioner is not None:
                block = preconditioner.apply(name, block)
            if tasks.rows:
                product.add_(tasks.product(name, block))
            squares.put(name, block, rows)
            if projector is not None:
                sign = projector.sign(name, block.shape[1:], block.device)
                projector.add(total, name, block if sign is None else block.mul_(sign))

        return receive

    losses = per_sample_blocks(model, batch, begin)
    norm, tokens = squares.norm(), supervised_tokens(batch["labels"])
    return product, norm, ProjectedGradients(total, norm, losses.float(), tokens)


def weighted_gradient(
    model: nn.Module, batch: Batch, weights: Float[Tensor, " batch"]
) -> dict[str, Float[Tensor, "..."]]:
    """The gradient of sum_i weights_i * loss_i.

    With `weights = 1 / norm` it is the sum of the samples' unit gradients: a task vector, up to the count. A sample of
    weight 0 is left out altogether, even if its gradient is not finite.

    On a CPU one ordinary batched backward pass gives it. On a GPU that pass may not fit (for LLaVA-7B, 8,192 tokens and
    an adapter in float32 it takes 69 GB of activations where ours takes 44): per-sample gradients are added up as they
    stream by, as they are where a weight is 0.

    Returns:
        Parameter name -> float32 tensor of its shape, zeros where a parameter has no influence. `.grad` is left as it
        was.
    """
    with turn_of(model):
        members = members_of(model)
        parameters = members.trainable
        if len(weights) == 0:
            return {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
        if members.device.type != "cpu" or not bool((weights != 0).all()) or needs_scale(members):
            return {name: total[0] for name, total in combined_gradients(model, batch, weights[:, None]).items()}

        @torch.enable_grad()
        def compute() -> tuple[Tensor | None, ...]:
            known = paths_of(model, members, batch)
            losses = SupervisedPositions(model, batch["labels"], known.narrows).run(model, as_run(batch, known))
            total = (losses * weights.to(losses.device)).sum()
            return torch.autograd.grad(total, list(parameters.values()), allow_unused=True)

        gradients = repeatable(model, members.device, compute)
        return {
            name: torch.zeros_like(parameter, dtype=torch.float32) if gradient is None else gradient.float()
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        }


def combined_gradients(
    model: nn.Module, batch: Batch, coefficients: Float[Tensor, "batch sums"]
) -> dict[str, Float[Tensor, "sums ..."]]:
    """Several weighted sums of the samples' gradients, from one pass that streams them.

    A sample whose coefficients are all 0 is left out, even if its gradient is not finite.

    Returns:
        Parameter name -> `[sums, *shape]` float32.
    """
    kept = (coefficients != 0).any(dim=1).nonzero()[:, 0]
    sums: dict[str, Tensor] = {}

    def begin(members: Members) -> Receiver:
        weights, some = coefficients[kept].to(members.device).float(), kept.to(members.device)

        def receive(name: str, block: Tensor, rows: slice) -> None:
            block = block.float() if len(some) == len(block) else block.float()[some]
            sums[name] = torch.einsum("bs,b...->s...", weights.to(block.device), block)

        return receive

    per_sample_blocks(model, batch, begin)
    return {name: sums[name] for name in members_of(model).trainable}
