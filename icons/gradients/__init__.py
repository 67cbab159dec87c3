"""Per-sample gradients from one batched backward pass.

per_sample.py       whole, projected as they stream by, or scored against tasks; each of them from
capture.py          each parameter's gradients, sample by sample, block by block: once
acceptance.py       the model is one whose samples can be told apart,
self_test.py        a sample's loss is known to depend on the sample alone
altered_batches.py  (whatever its padding, end and company, and
row_losses.py       token by token;
noise.py            half precision's own noise is measured),
alone.py            a row's gradient is what it is alone, and
proof.py            every layer's blocks have agreed with autograd; what is
strangers.py        (towers, which do not see the text, are found out)
paths.py            known of a model is kept with it; each of these from
structure.py        its modules and parameters, seen in one walk,
backward_pass.py    one forward and backward pass, in which
tokens.py           (ids that are no tokens are refused)
slow_path.py        (or one for each sample, for what no tap serves)
tap.py              a layer's inputs and its output's gradient are seen, and
layers.py           turned into per-sample gradients
blocks.py           handed out, each once and whole:
projected_rows.py   preconditioned, projected, their norms taken; on a GPU
fused_fold.py       by one kernel that does it all,
fold_kernels.py     which Triton compiles;
output_layer.py     only supervised positions reach the output layer; each token's cross-entropy
loss_scale.py       float16 loses no small gradient, and
chance.py           chance is refused
overflow.py         what does not fit a GPU's memory lies in the CPU's;
garbage.py          no search for garbage while a pass is on;
repeatable.py       kernels repeat: each a
shared_setting.py   setting of the whole process, which its threads share
packing.py          4-bit weights on a CPU
features.py         what else can be collected of a sample
"""

from icons.gradients.per_sample import (
    ProjectedGradients,
    TaskMatrix,
    combined_gradients,
    exact_influence,
    per_sample_gradients,
    projected_gradients,
    scored_gradients,
    weighted_gradient,
)

__all__ = [
    "ProjectedGradients",
    "TaskMatrix",
    "combined_gradients",
    "exact_influence",
    "per_sample_gradients",
    "projected_gradients",
    "scored_gradients",
    "weighted_gradient",
]
