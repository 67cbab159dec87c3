"""Per-sample gradients from one batched backward pass.

per_sample.py       whole, projected as they stream by, or scored against tasks; each of them from
capture.py          each parameter's gradients, sample by sample, block by block, through a
tap.py              layer's input and its output's gradient;
weight_edges.py     uses of a weight outside its layer's own call are noticed, and
dropout.py          chance is refused
positions.py        only supervised positions reach the output layer, and
token_loss.py       each token's cross-entropy
representation.py   what else can be collected of a sample
"""

from icons.gradients.per_sample import (
    ProjectedGradients,
    TaskMatrix,
    exact_influence,
    per_sample_gradients,
    projected_gradients,
    scored_gradients,
    weighted_gradient,
)

__all__ = [
    "ProjectedGradients",
    "TaskMatrix",
    "exact_influence",
    "per_sample_gradients",
    "projected_gradients",
    "scored_gradients",
    "weighted_gradient",
]
