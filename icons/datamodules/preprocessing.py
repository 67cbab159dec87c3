"""Preprocessing: the one setting that warm-up, gradients and fine-tune share, so that they cannot differ unnoticed."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

_PRESETS = ("llava-train", "icons-release")


@dataclass(frozen=True)
class Preprocessing:
    """How a record becomes tokens and pixels.

    Attributes:
        template: conversation template; "auto": the one that the model's folder calls for.
        max_length: tokens at which a conversation is cut, before images are expanded and again after.
        preset: "llava-train" moves `<image>` to the front of its turn and pads images to a square, as LLaVA is trained;
            "icons-release" does neither (images are centre-cropped), as the released ICONS scripts do.
        processor: settings of an image-text model's image processor, `max_pixels` say, in place of its folder's.
    """

    template: str = "auto"
    max_length: int = 2048
    preset: str = "llava-train"
    processor: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.preset not in _PRESETS:
            raise ValueError(f"preset {self.preset!r}; expected one of {', '.join(_PRESETS)}")
        if self.max_length < 2:
            raise ValueError(f"max_length {self.max_length}; expected at least 2 tokens")

    @property
    def reorder(self) -> bool:
        return self.preset == "llava-train"

    @property
    def pad(self) -> bool:
        return self.preset == "llava-train"

    def text_limit(self, tokenizer_max_length: int) -> int:
        """Tokens at which the template cuts text: `max_length`; in "icons-release" the tokenizer's own, as there."""
        return self.max_length if self.preset == "llava-train" else max(self.max_length, tokenizer_max_length)

    def as_dict(self) -> dict[str, Any]:
        """For manifests; without `processor` where none of it is set, as former versions wrote it."""
        return {name: value for name, value in asdict(self).items() if name != "processor" or value}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Preprocessing":
        return cls(**{field.name: saved[field.name] for field in fields(cls) if field.name in saved})
