"""What a run would do, before it is started: rows, bytes, memory and time (`--dry-run`)."""

from icons.cli.estimate.run_estimate import RunEstimate
from icons.cli.estimate.runs import (
    Plan,
    estimate_factors,
    estimate_factors_run,
    estimate_gradients,
    estimate_gradients_run,
    estimate_warmup,
    evenly,
)
from icons.cli.estimate.workload import ModelSize, Workload

__all__ = [
    "ModelSize",
    "Plan",
    "RunEstimate",
    "Workload",
    "estimate_factors",
    "estimate_factors_run",
    "estimate_gradients",
    "estimate_gradients_run",
    "estimate_warmup",
    "evenly",
]
