"""How fast a device is: what the time of an estimate is based on."""

import time

import torch

_A100_FLOPS = 312e12  # bfloat16, dense: NVIDIA's data sheet
# Share of a matrix product's speed that a run reaches. LLaVA's README gives 20 hours for 13B on LLaVA-665K, 8 A100s;
# at about 900 tokens a row and 6 operations per parameter and token that is 0.26 of 312 TFLOP/s.
_EFFICIENCY = 0.25


def device_speed(dtype: str) -> tuple[float, str]:
    """Operations per second to reckon with, and what that is based on: this machine's device, timed for a moment.

    On a machine without a GPU a bfloat16 or float16 run is reckoned for an A100, since it will not happen here.
    """
    if not torch.cuda.is_available() and dtype != "float32":
        return _EFFICIENCY * _A100_FLOPS, "for A100 GPUs, none being here"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    width = 4096 if device.type == "cuda" else 512
    factor = torch.ones(width, width, dtype=getattr(torch, dtype), device=device)
    rounds, spent = 0, 0.0
    start = time.perf_counter()
    while spent < 0.1:
        (factor @ factor)[0, 0].item()  # waits for the device
        rounds, spent = rounds + 1, time.perf_counter() - start
    return _EFFICIENCY * rounds * 2 * width**3 / spent, f"from a matrix product timed on this {device.type}"
