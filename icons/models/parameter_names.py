"""Parameter names: one parameter is called differently by LLaVA, by transformers then and now, by PEFT, by wrappers."""

import re
from collections.abc import Collection

WRAPPERS = re.compile(
    r"(^|(?<=\.))(_forward_module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\."
)
PROJECTOR = {"0": "linear_1", "2": "linear_2"}
SHOWN = 3


def current_name(name: str) -> str:
    """What transformers 5's LLaVA calls a weight that the original LLaVA, or an older transformers, saved as `name`.

    Names it does not know are returned as they are. PEFT's prefix stays.

    >>> current_name("model.layers.0.mlp.up_proj.weight")
    'model.language_model.layers.0.mlp.up_proj.weight'
    >>> current_name("base_model.model.model.mm_projector.2.bias")
    'base_model.model.model.multi_modal_projector.linear_2.bias'
    """
    prefix = "base_model.model." if name.startswith("base_model.model.") else ""
    name = name.removeprefix(prefix)
    if match := re.fullmatch(r"(?:model\.)?mm_projector\.([02])\.(weight|bias)", name):
        return f"{prefix}model.multi_modal_projector.{PROJECTOR[match[1]]}.{match[2]}"
    name = re.sub(r"^multi_modal_projector\.", "model.multi_modal_projector.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    name = re.sub(r"^model\.(layers|embed_tokens|norm)\.", r"model.language_model.\1.", name)
    return prefix + name


# how the same module was called by older versions, LLaVA's and others'; tried one after the other, and together
_FORMER = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^model\.(layers|embed_tokens|norm)\b", r"model.language_model.\1"),
    (r"^model\.language_model\.", "language_model.model."),
    (r"\bvision_tower\.vision_model\.", "vision_tower."),
    (r"\bvision_tower\.vision_tower\.", "vision_tower."),
    (r"\bmm_projector\.0\b", "multi_modal_projector.linear_1"),
    (r"\bmm_projector\.2\b", "multi_modal_projector.linear_2"),
    (r"^model\.(visual|vision_tower|multi_modal_projector)\b", r"\1"),
    (r"^(visual|vision_tower|vision_model|multi_modal_projector|language_model|connector)\b", r"model.\1"),
    (r"^(layers|embed_tokens|norm)\b", r"model.\1"),
)
_MOST_RENAMES = 3


def known_name(name: str, known: Collection[str]) -> str:
    """What a module that was saved as `name` is called among the `known` modules; as it is if it is not among them.

    >>> known_name("vision_tower.vision_model.encoder.layers.0", {"model.vision_tower.encoder.layers.0"})
    'model.vision_tower.encoder.layers.0'
    """
    tried = [name]
    for _ in range(_MOST_RENAMES):
        matching = [each for each in tried if each in known]
        if matching:
            return matching[0]
        tried += [new for each in tried for old, by in _FORMER if (new := re.sub(old, by, each, count=1)) not in tried]
    return next((each for each in tried if each in known), current_name(name))


def canonical_name(name: str) -> str:
    """One spelling for a parameter, whoever saved it: without wrappers, adapter names and LLaVA's old module names.

    >>> canonical_name("_forward_module.model.base_model.model.model.layers.0.q_proj.lora_A.default.weight")
    'model.layers.0.q_proj.lora_A.weight'
    >>> canonical_name("base_model.model.model.language_model.layers.0.q_proj.lora_A.default.weight")
    'model.layers.0.q_proj.lora_A.weight'
    """
    name = name.rpartition("base_model.model.")[2]
    name = WRAPPERS.sub("", name)
    name = re.sub(r"(lora_\w+)\.\w+\.(weight)$", r"\1.\2", name)
    name = re.sub(r"modules_to_save\.\w+\.", "", name)
    name = re.sub(r"mm_projector\.([02])\.", lambda match: f"multi_modal_projector.{PROJECTOR[match[1]]}.", name)
    return name.replace("language_model.", "").removeprefix("base_model.")


def match_names(saved: Collection[str], wanted: Collection[str], what: str) -> dict[str, str]:
    """Which saved name stands for each wanted one.

    A first component that only the saved names have (the attribute under which a LightningModule keeps its model) is
    left out where that makes all of them match.

    Raises:
        ValueError: a wanted parameter is not among the saved, or two saved names mean the same parameter.
    """
    attempts = [_by_canonical(saved, what)]
    if len({name.partition(".")[0] for name in saved}) == 1:
        shorter = _by_canonical([name.partition(".")[2] for name in saved], what)
        first = next(iter(saved)).partition(".")[0]
        attempts.append({key: f"{first}.{name}" for key, name in shorter.items()})
    for known in attempts:
        matched = {name: known[canonical_name(name)] for name in wanted if canonical_name(name) in known}
        if len(matched) == len(wanted):
            return matched
    known = attempts[0]
    missing = [name for name in wanted if canonical_name(name) not in known]
    raise ValueError(
        f"{what}: holds nothing for {len(missing)} of the {len(wanted)} parameters of the model, such as "
        f"{', '.join(missing[:SHOWN])}; it names {len(saved)}, such as {', '.join(sorted(saved)[:SHOWN])}: "
        "give the file that was saved with this very adapter"
    )


def _by_canonical(names: Collection[str], what: str) -> dict[str, str]:
    known: dict[str, str] = {}
    for name in names:
        key = canonical_name(name)
        if key in known:
            raise ValueError(f"{what}: {known[key]} and {name} both mean the parameter {key}; expected each one once")
        known[key] = name
    return known
