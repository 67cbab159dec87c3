"""4-bit weights of bitsandbytes on a CPU, which must stay in the layout that a pass with gradients reads."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def keep_unpacked(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> None:
    """Keeps bitsandbytes from packing 4-bit weights anew.

    On CPUs with AVX512-BF16 it does so, for good, at the first pass without gradients in eval mode; a later pass with
    gradients takes the packed numbers for plain ones, and all that it gives is wrong.

    Args:
        model: any.
        modules: of it, if they are at hand.

    Raises:
        ValueError: it has done so already.
    """
    packable = [module for module in modules or model.modules() if "support_avx512bf16_for_cpu" in vars(module)]
    module: Any
    for module in packable:
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            name = next(name for name, other in model.named_modules() if other is module)
            raise ValueError(
                f"{type(model).__name__}: the 4-bit weights of {name} are packed for passes without gradients, which "
                "bitsandbytes does at the first such pass on a CPU; a pass with gradients would be wrong; expected a "
                "model that has not run yet: load it again"
            )
        module.support_avx512bf16_for_cpu = False
