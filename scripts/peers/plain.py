"""What costs are compared with: one forward and backward pass over the pool, logits at supervised positions alone."""

import numpy as np
import torch
from result import Job, main
from task import INPUTS, batches
from torch.nn import functional as F

BATCH = 32


def forward_backward(job: Job) -> np.ndarray:
    """No scores (zeros): the gradient of the summed losses is made and thrown away, batch by batch."""
    model = job.task.model(job.way, job.checkpoint)
    base = model.get_base_model() if job.way == "lora" else model  # type: ignore[operator]
    rows = job.task.tokens["pool"]
    for batch in batches(rows, BATCH):
        hidden = base.model(**{name: batch[name] for name in INPUTS if name in batch}).last_hidden_state
        row, place = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
        each = F.cross_entropy(base.lm_head(hidden[row, place]), batch["labels"][row, place + 1], reduction="none")
        tokens = torch.bincount(row, minlength=len(batch["row"]))
        (each / tokens[row]).sum().backward()
        model.zero_grad()
    return np.zeros((len(rows), len(job.task.names)))


if __name__ == "__main__":
    main({"forward and backward": forward_backward})
