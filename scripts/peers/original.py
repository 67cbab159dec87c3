"""The original's way (https://github.com/princetonvisualai/icons): one sample at a time, dense random signs, Adam.

Its own code needs a GPU kernel for the projection (`fast_jl`); here numbers of the same kind come from blocks of a
random matrix of signs, drawn again for every sample as `trak`'s BasicProjector draws it.
"""

import numpy as np
import torch
from result import Job, main
from task import batches, losses_of
from torch import Tensor

from icons.models.adam_state import load_adam_state

DIM, BLOCK = 5120, 128


def project(gradient: Tensor) -> Tensor:
    """`[P]` -> `[5120]`, by a matrix of signs made block by block from one seed."""
    generator, parts = torch.Generator().manual_seed(0), []
    for _ in range(0, DIM, BLOCK):
        signs = torch.empty(len(gradient), BLOCK).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        parts.append(gradient @ signs)
    return torch.cat(parts)


def dense_signs(job: Job) -> np.ndarray:
    """Mean cosine with a task's rows."""
    model = job.task.model(job.way, job.checkpoint)
    adam = load_adam_state(job.checkpoint, model)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    rows: dict[str, Tensor] = {}
    for part, tokens in job.task.tokens.items():
        found = []
        for batch in batches(tokens, 1):
            gradients = torch.autograd.grad(losses_of(model, batch).sum(), list(trained.values()))
            blocks = dict(zip(trained, gradients, strict=True))
            if part == "pool":
                blocks = {name: adam.apply(name, block[None].clone())[0] for name, block in blocks.items()}
            found.append(project(torch.cat([block.flatten() for block in blocks.values()])))
        rows[part] = torch.nn.functional.normalize(torch.stack(found), dim=1)
    pool = rows.pop("pool")
    return torch.stack([(pool @ side.T).mean(dim=1) for side in rows.values()], dim=1).numpy()


if __name__ == "__main__":
    main({"dense signs": dense_signs})
