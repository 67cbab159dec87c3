"""PixelMaker: images as CLIP's pixel values, as the original makes them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, CLIPImageProcessorPil

from icons.batch import Status
from icons.datamodules.failed_row import FailedRowError
from icons.models.folder import own_code


class PixelMaker:
    """CLIP's pixel values, equal to the original's bit for bit: by pillow, also where torchvision is installed.

    Args:
        folder: where the image processor's settings are; one of another kind than CLIP's is used as it is.
        pad: squares images first, with the processor's mean colour, so that its centre crop loses nothing.
        trust_remote_code: whether a processor of another kind may be code of the folder's own.

    Raises:
        ValueError: it is, and may not.
    """

    def __init__(self, folder: Path, pad: bool, trust_remote_code: bool = False) -> None:
        clip = processor_kind(folder).startswith(("CLIP", "Llava"))
        kind: Any = CLIPImageProcessorPil if clip else AutoImageProcessor
        with own_code(folder):
            self.processor = kind.from_pretrained(folder, trust_remote_code=trust_remote_code)
        self.pad = pad
        self.colour = tuple(int(value * 255) for value in self.processor.image_mean)

        self.table = _value_table(self.processor) if _is_usual(self.processor) else None

    def __call__(self, images: Sequence[Image.Image]) -> Float[Tensor, "images 3 height width"]:
        ready = [square(image, self.colour) if self.pad else image for image in images]
        if self.table is not None:
            side = self.processor.size["shortest_edge"]
            values = np.empty((len(ready), 3, side, side), dtype=np.float32)
            for image, into in zip(ready, values, strict=True):
                self.look_up(image, self.table, into)
            return torch.from_numpy(values)
        pixels: Tensor = self.processor(ready, return_tensors="pt")["pixel_values"]
        return pixels

    def look_up(
        self, image: Image.Image, table: Float[np.ndarray, "3 256"], into: Float[np.ndarray, "3 height width"]
    ) -> None:
        """What the processor makes of an image, each byte's value taken from a table instead of computed."""
        side, short = into.shape[-1], min(image.size)
        width, height = (side if length == short else int(side * length / short) for length in image.size)
        if (width, height) != image.size:
            image = image.resize((width, height), self.processor.resample)
        left, top = (width - side) // 2, (height - side) // 2
        content = np.asarray(image.crop((left, top, left + side, top + side)))
        for channel in range(3):
            np.take(table[channel], content[:, :, channel], out=into[channel], mode="clip")


def _is_usual(processor: Any) -> bool:
    """Whether an image processor resizes the shorter side, cuts the centre of that size, rescales and normalises."""
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    if not isinstance(processor, CLIPImageProcessorPil) or not all(getattr(processor, step) for step in steps):
        return False
    side = dict(processor.size).get("shortest_edge")
    return side is not None and (processor.crop_size["height"], processor.crop_size["width"]) == (side, side)


def _value_table(processor: Any) -> Float[np.ndarray, "3 256"]:
    """The processor's pixel value for each byte of each channel, as it computes it itself."""
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([every] * 3, axis=-1))
    pixels = processor(image, do_resize=False, do_center_crop=False, return_tensors="np")["pixel_values"]
    return np.ascontiguousarray(pixels[0].reshape(3, 256), dtype=np.float32)


def processor_kind(folder: Path) -> str:
    """The class that a folder's image processor settings name.

    Raises:
        FileNotFoundError: there are none.
    """
    for name, part in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            settings = json.loads((folder / name).read_text())
            settings = settings if part is None else settings.get(part, {})
            return str(settings.get("image_processor_type") or settings.get("feature_extractor_type") or "CLIP")
    raise FileNotFoundError(f"{folder}: no preprocessor_config.json there; expected the image processor's settings")


def square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of this colour, as large as its longer side (LLaVA's `expand2square`).

    Raises:
        FailedRowError: TOO_LARGE, for a square of more pixels than pillow's limit.
    """
    if image.width == image.height:
        return image
    side, limit = max(image.size), Image.MAX_IMAGE_PIXELS
    if limit is not None and side**2 > limit:
        what = (
            f"an image of {image.width} x {image.height}, squared, has {side**2:,} pixels; expected at most {limit:,}"
        )
        raise FailedRowError(Status.TOO_LARGE, what)
    padded = Image.new("RGB", (side, side), colour)
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded
