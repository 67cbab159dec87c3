"""Settings as transformers 4 and vLLM read them, beside those that transformers 5 writes.

transformers 5 keeps the rotary embedding in `rope_parameters`, which version 4 does not read: it would take theta for
10,000, and compute other logits without a word.
"""

from collections.abc import Mapping
from typing import Any

_DEFAULT_THETA = 10000.0


def with_old_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config, and every config inside it, with both forms of its rotary embedding and of its dtype.

    >>> with_old_settings({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}})["rope_theta"]
    1000000.0
    """
    settings = {
        name: with_old_settings(value) if isinstance(value, Mapping) else value for name, value in values.items()
    }
    rope = values.get("rope_parameters")
    if isinstance(rope, Mapping) and rope:
        settings |= old_rope(rope)
    if isinstance(values.get("dtype"), str):
        settings["torch_dtype"] = values["dtype"]
    return settings


def old_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` from `rope_parameters`; of layers of two kinds (Gemma 3) those with full
    attention, and the others' theta as `rope_local_base_freq`."""
    if isinstance(full := rope.get("full_attention"), Mapping):
        old = old_rope(full)
        if isinstance(local := rope.get("sliding_attention"), Mapping):
            old["rope_local_base_freq"] = local.get("rope_theta", _DEFAULT_THETA)
        return old
    rest = dict(rope)
    old = {"rope_theta": rest.pop("rope_theta", _DEFAULT_THETA)}
    if "partial_rotary_factor" in rest:
        old["partial_rotary_factor"] = rest.pop("partial_rotary_factor")
    kind = rest.pop("rope_type", "default")
    plain = kind == "default" and not rest
    return old | {"rope_scaling": None if plain else rest | {"rope_type": kind, "type": kind}}
