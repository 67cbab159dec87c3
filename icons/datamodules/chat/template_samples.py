"""Samples for text models and LLaVAs: a conversation template writes the prompt, images are expanded and squared."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from icons.batch import IGNORE_INDEX, Status
from icons.datamodules.chat.own_template import OwnTemplate
from icons.datamodules.chat.rendering import ChatTemplate
from icons.datamodules.chat.templates import CHAT_TEMPLATE, IMAGE_PLACE, TEMPLATES, Template, Turn, check_fits
from icons.datamodules.chat.tokenizer import load_tokenizer
from icons.datamodules.conversation import IMAGE
from icons.datamodules.failed_row import FailedRowError
from icons.datamodules.pixels import PixelMaker
from icons.datamodules.preprocessing import Preprocessing
from icons.models.folder import ModelFolder


class TemplateSamples:
    """Turns and images -> ids, labels, and CLIP's pixel values.

    Args:
        folder: the model: its tokenizer, and how many positions an image takes.
        preprocessing: with a template's name.
        trust_remote_code: whether the tokenizer may be code of the model's folder.

    Attributes:
        chat: the model's own chat template, where that is the template.

    Raises:
        ValueError: the model was not trained with this template, or brings none of its own.
    """

    def __init__(self, folder: ModelFolder, preprocessing: Preprocessing, trust_remote_code: bool = False) -> None:
        self.folder, self.preprocessing, name = folder, preprocessing, preprocessing.template
        self.tokenizer: Any = load_tokenizer(folder.model, trust_remote_code)
        self.chat: ChatTemplate | None = None
        if name == CHAT_TEMPLATE:
            own = OwnTemplate(self.tokenizer, f"template chat: {folder.model}", self.image_token())
            self.template: Template = own
            self.chat = own.template
        else:
            check_fits(name, self.tokenizer, str(folder.model))
            self.template = TEMPLATES[name]
        self.pixels: PixelMaker | None = None
        if folder.kind == "llava":
            self.pixels = PixelMaker(folder.vision_tower or folder.model, preprocessing.pad, trust_remote_code)
        self.text_limit = preprocessing.text_limit(self.tokenizer.model_max_length)

    def image_token(self) -> str | None:
        """How a LLaVA's own chat template writes an image; None for a text model."""
        number = self.folder.image_token_id
        if self.folder.kind == "text" or number is None:
            return None
        return self.tokenizer.convert_ids_to_tokens(number) if 0 <= number < len(self.tokenizer) else IMAGE

    def __call__(
        self,
        turns: Sequence[Turn],
        image: bool,
        system: str | None,
        opened: Callable[[], Sequence[Image.Image]],
        known: Sequence[Tensor] | None = None,
    ) -> dict[str, Any]:
        """`input_ids [L]` and `labels [L]`, and `pixel_values [images, 3, H, W]` if there is an image that is not cut.

        Args:
            turns: with IMAGE where an image stands, if `image`.
            image: whether the record has images.
            system: its system text.
            opened: opens all of its images.
            known: what `tokens` gave for it, if it was asked before.

        Raises:
            TemplateError: the template has no form for the turns.
            FailedRowError: the text has the model's image token, or the model takes no images.
        """
        ids, labels = known or map(torch.tensor, self.tokens(turns, image, system))
        sample: dict[str, Any] = {"input_ids": ids, "labels": labels}
        if image and self.pixels is not None:
            assert self.folder.image_token_id is not None
            # images that the maximal length cuts away are not needed, but opened: a broken record is one all the same
            count = int((ids == self.folder.image_token_id).sum())
            needed, images = -(-count // self.folder.image_tokens), opened()
            if needed:
                sample["pixel_values"] = self.pixels(images[:needed])
        return sample

    def tokens(self, turns: Sequence[Turn], image: bool, system: str | None) -> tuple[list[int], list[int]]:
        """Ids and labels, images expanded to one position per feature, cut as LLaVA cuts: before and after."""
        limit = self.preprocessing.max_length
        ids, labels = self.template(self.tokenizer, turns, image, self.text_limit, system)
        if self.preprocessing.template == "llama_3":  # xtuner leaves room for one image, also where there is none
            limit = max(1, limit - self.folder.image_tokens)
        return self.expand(ids[:limit], labels[:limit])

    def expand(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        token_id, count, limit = self.folder.image_token_id, self.folder.image_tokens, self.preprocessing.max_length
        if token_id != IMAGE_PLACE and token_id in ids:
            raise FailedRowError(Status.BAD_RECORD, "the text holds the model's image token, and the record no image")
        if IMAGE_PLACE not in ids:
            return ids, labels
        if token_id is None:
            raise FailedRowError(Status.BAD_RECORD, "the record has an image and the model takes none")
        wide: list[int] = []
        marked: list[int] = []
        for token, label in zip(ids, labels, strict=True):
            image = token == IMAGE_PLACE
            wide += [token_id] * count if image else [token]
            marked += [IGNORE_INDEX] * count if image else [label]
        return wide[:limit], marked[:limit]
