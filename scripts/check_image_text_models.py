"""Per-sample gradients of image-text architectures of transformers, in float32, bfloat16 and float16.

As `check_models.py` does it for text: each is made small from its own config class, with random weights, and takes rows
with two images, none and one; three rows and three images, so that no shape tells whose an image is. How a model wants
its pixels is tried out. Those that want more than that, or cannot be made small by the names of their sizes, are told.

    python scripts/check_image_text_models.py            # all of them: five minutes on one core
    python scripts/check_image_text_models.py llava_next qwen3_vl --verbose
"""

import copy
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from check_models import LARGEST, SIZES, Outcomes, adapted, given_by, judged, on_a_line, randomize, row_of
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging

from icons.batch import sample_losses
from icons.datamodules.chat.processor import join

IMAGE, VIDEO, BEGIN, END = 63, 60, 61, 62
IMAGES = (2, 0, 1)
"""Of each row."""
ORDERS = ((0, 1, 2), (2, 0), (1,))
"""Batches of rows, one after the other."""
VISION: dict[str, Any] = {
    r"hidden_size|embed_dim|width|d_model": 16,
    r"intermediate_size|mlp_dim": 24,
    r"num_hidden_layers|depth|num_layers|encoder_layers|layers": 2,
    r"num_attention_heads|num_heads|heads|encoder_attention_heads|num_key_value_heads": 2,
    r"patch_size": 4,
    r"image_size|num_position_embeddings": 16,
    r"out_hidden_size|projection_dim|output_dim|proj_dim": 32,
    r"head_dim|window_size": 8,
    r"spatial_merge_size|temporal_patch_size": 2,
    r"vocab_size|max_position_embeddings": 64,
    r"\w*dropout\w*|\w*drop_rate|drop_path\w*": 0.0,
}
WHOLE: dict[str, Any] = {
    r"image_token_id|image_token_index": IMAGE,
    r"video_token_id|video_token_index": VIDEO,
    r"vision_start_token_id": BEGIN,
    r"vision_end_token_id": END,
    r"image_seq_length|mm_tokens_per_image": 4,
    r"projection_dim|projector_hidden_size": 32,
    r"image_grid_pinpoints": [[16, 32], [32, 16]],
}

Sample = dict[str, Tensor]
Pixels = Callable[[int, torch.Generator], Sample]


def small_config(kind: str) -> Any:
    usual = AutoConfig.for_model(kind)
    parts: dict[str, Any] = {}
    for name in type(usual).sub_configs:
        part = getattr(usual, name, None)
        if part is None:
            continue
        changes = _shrunk(part.to_dict(), SIZES if "text" in name or "llm" in name else VISION)
        if "kv_lora_rank" in changes:
            changes["num_key_value_heads"] = changes["num_attention_heads"]
        rope = getattr(part, "rope_parameters", None)
        if isinstance(rope, dict) and "mrope_section" in rope:
            changes |= {"rope_parameters": rope | {"mrope_section": [1, 1, 2]}, "head_dim": 8}
        parts[name] = type(part)(**changes)
    return type(usual)(**_shrunk(usual.to_dict(), WHOLE if parts else SIZES | WHOLE), **parts)


def _shrunk(values: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        new = next((size for pattern, size in sizes.items() if re.fullmatch(pattern, name)), None)
        if name in ("layer_types", "mlp_layer_types") and value:
            found[name] = (list(dict.fromkeys(value)) * 2)[:2]
        elif name in ("deepstack_visual_indexes", "fullatt_block_indexes"):
            found[name] = [0]
        elif new is None or value is None or isinstance(value, bool | dict):
            continue
        elif isinstance(value, list) and not isinstance(new, list):
            found[name] = [new] * len(value)
        else:
            found[name] = new
    return found


def ways() -> Iterator[tuple[str, Pixels]]:
    """How pixels may come: images alone, with their sizes, as tiles; or flat patches with their grids."""
    for side in (16, 8, 32):

        def images(count: int, generator: torch.Generator, side: int = side) -> Sample:
            return {"pixel_values": torch.randn(count, 3, side, side, generator=generator)}

        def sized(count: int, generator: torch.Generator, side: int = side) -> Sample:
            return images(count, generator, side) | {"image_sizes": torch.tensor([[side, side]]).expand(count, 2)}

        def tiles(count: int, generator: torch.Generator, side: int = side) -> Sample:
            pixels = torch.randn(count, 3, 3, side, side, generator=generator)
            return {"pixel_values": pixels, "image_sizes": torch.tensor([[side, side]]).expand(count, 2)}

        yield from ((f"images {side}", images), (f"sized {side}", sized), (f"tiles {side}", tiles))
    for width in (3 * 2 * 4 * 4, 3 * 4 * 4):

        def flat(count: int, generator: torch.Generator, width: int = width) -> Sample:
            grids = torch.tensor([[1, 4, 4]]).expand(count, 3)
            return {"pixel_values": torch.randn(16 * count, width, generator=generator), "image_grid_thw": grids}

        yield f"patches {width}", flat


def tokens_of(features: Any) -> int:
    """How many tokens one image takes."""
    while not isinstance(features, Tensor):
        features = features.pooler_output if hasattr(features, "pooler_output") else features
        if isinstance(features, list | tuple):
            features = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
    return features.reshape(-1, features.shape[-1]).shape[0]


def model_of(config: Any, train: str) -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    randomize(model)
    if train == "lora":
        head = model.get_output_embeddings()
        layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head]
        targets = [name for name in layers if "router" not in name and not name.endswith("gate")]
        return adapted(model, LoraConfig(r=3, target_modules=targets))
    return model


def samples_of(model: nn.Module, pixels: Pixels, tokens: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    wanted, samples = inspect.signature(base.forward).parameters, []
    for row, images in enumerate(IMAGES):
        text = torch.randint(3, 58, (9 - row,), generator=generator).tolist()
        ids = torch.tensor([[5, *[BEGIN, *[IMAGE] * tokens, END] * images, *text]])
        labels = ids.masked_fill(ids > 58, -100)
        labels[:, 0] = -100
        types = next((name for name in ("mm_token_type_ids", "token_type_ids") if name in wanted), None)
        own = {} if types is None else {types: (ids == IMAGE).long()}
        samples.append({"input_ids": ids, "labels": labels} | own | pixels(images, generator))
    return samples


def batch_of(samples: list[Sample]) -> dict[str, Any]:
    """As the datamodule collates them."""
    lengths = [sample["labels"].shape[1] for sample in samples]
    batch: dict[str, Any] = {"row": torch.arange(len(samples)), "entries_per_row": {}}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if all(value.shape == sample["labels"].shape for value, sample in zip(values, samples, strict=True)):
            fill = -100 if name == "labels" else 0
            longest = max(lengths)
            batch[name] = torch.cat([nn.functional.pad(v, (0, longest - v.shape[1]), value=fill) for v in values])
        elif any(len(value) for value in values):
            batch["entries_per_row"][name] = torch.tensor([len(value) for value in values])
            batch[name] = join([value for value in values if len(value)])
    batch["attention_mask"] = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return batch


def one_by_one(model: nn.Module, samples: list[Sample]) -> Tensor:
    rows = []
    for sample in samples:
        given = {name: value for name, value in sample.items() if name != "labels" and len(value)}
        logits = model(**given, attention_mask=torch.ones_like(sample["labels"]), use_cache=False).logits
        rows.append(row_of(model, sample_losses(logits, sample["labels"]).sum()))
    return torch.stack(rows)


def found_way(config: Any) -> tuple[Pixels, int]:
    """Pixels that the model takes, and the tokens of an image.

    Raises:
        ValueError: it takes none of these.
    """
    model, said = model_of(config, "full"), ""
    for name, pixels in ways():
        try:
            given = pixels(1, torch.Generator().manual_seed(0))
            known = inspect.signature(model.get_image_features).parameters  # type: ignore[arg-type]
            with torch.no_grad():
                features = model.get_image_features(**{n: v for n, v in given.items() if n in known})  # type: ignore[operator]
            tokens = tokens_of(features)
            one_by_one(model, samples_of(model, pixels, tokens))
            return pixels, tokens
        except Exception as error:
            said = said or f"{name}: {type(error).__name__}: {error}"
    raise ValueError(said)


def check(config: Any, train: str, dtype: torch.dtype, pixels: Pixels, tokens: int) -> tuple[str, str]:
    """See `check_models.check`."""
    try:
        model = model_of(config, train).to(dtype)
        samples = [_cast(sample, dtype) for sample in samples_of(model, pixels, tokens)]
        plain = one_by_one(model, samples)
        true = one_by_one(model_of(config, train).to(dtype).float(), [_cast(one, torch.float32) for one in samples])
    except Exception as error:
        return "cannot", f"{type(error).__name__}: {error}"
    batches = ((list(order), batch_of([samples[row] for row in order])) for order in ORDERS)
    found = [judged(model, batch, plain[order], true[order]) for order, batch in batches]
    return max(found, key=lambda one: ("right", "warned", "refused", "wrong").index(one[0]))


def _cast(sample: Sample, dtype: torch.dtype) -> Sample:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in sample.items()}


def main(words: list[str] | None = None) -> int:
    given = given_by(words, __doc__, sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
    logging.set_verbosity_error()
    outcomes = Outcomes(given.verbose)
    for kind in given.kinds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                config = small_config(kind)
                with torch.device("meta"):
                    model = AutoModelForImageTextToText.from_config(config)
                if (size := sum(parameter.numel() for parameter in model.parameters())) > LARGEST:
                    raise ValueError(f"it has {size:,} parameters; expected at most {LARGEST:,}")
                way = found_way(config)
            except Exception as error:
                outcomes.counts["not made or not run"] += 1
                print(f"{'cannot':8} {kind:24} {type(error).__name__}: {on_a_line(str(error))}", flush=True)
                continue
            for train in given.train:
                for dtype in given.dtypes:
                    outcomes.add(*check(config, train, getattr(torch, dtype), *way), kind, train, dtype)
    return outcomes.ended()


if __name__ == "__main__":
    sys.exit(main())
