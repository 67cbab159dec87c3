"""ModelFolder: what kind of model a folder holds, told from its JSON files, before anything heavy is loaded."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from icons.models.hub import on_disk
from icons.models.template_choice import template_of

_LLAVA_IMAGE_TOKEN_ID = -200  # LLaVA's IMAGE_TOKEN_INDEX: no row of the vocabulary
_DEFAULT_MAX_LENGTH = 2048
# of which an image is always the same number of features; Pixtral, say, is a LLaVA whose images vary
_LLAVA_TOWERS = ("clip_vision_model", "clip", "siglip_vision_model", "siglip")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
# what LLaVA-1.5 was trained with, for a base folder whose config says nothing about images
_LLAVA_DEFAULTS: dict[str, Any] = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
}


@dataclass(frozen=True)
class ModelFolder:
    """A model's files, and what data and model code must know of it."""

    model: Path
    """Folder of the (language) model: weights, config, tokenizer."""
    layout: Literal["huggingface", "original"]
    """`original`: LLaVA's own (Vicuna or Llama weights, projector, CLIP folder); else what transformers loads."""
    kind: Literal["llava", "image-text", "text"]
    """`image-text` and `text` are loaded by transformers' auto classes, with their own processor."""
    vision_tower: Path | None = None
    """CLIP folder of an original LLaVA model (weights, image processor)."""
    mm_projector: Path | None = None
    """File of the projector of an original LLaVA model; None: among the model's weights, or in the adapter."""
    tower_adapter: Path | None = None
    """LoRA on the vision tower (xtuner's `visual_encoder_adapter`), merged into it."""
    image_token_id: int | None = None
    """Id at image positions of `input_ids`; -200 for the original layout; None: no images."""
    image_tokens: int = 0
    """Features per image; 0 where the model's own processor decides, or for text models."""
    template: str = "chat"
    """What `--template auto` means: v1, llama_2, llama_3, mpt, or chat (the model's own); empty: nothing tells."""
    max_length: int = _DEFAULT_MAX_LENGTH
    """Tokens at which the model was trained to cut."""
    image_aspect_ratio: str = "pad"
    select_layer: int = -2
    """Layer of the vision tower whose output is projected."""
    select_feature: Literal["patch", "cls_patch"] = "patch"

    @classmethod
    def open(
        cls,
        model: Path | str,
        vision_tower: Path | str | None = None,
        mm_projector: Path | str | None = None,
        adapter: Path | str | None = None,
    ) -> "ModelFolder":
        """Recognises a model folder.

        Args:
            model: Hugging Face folder or a hub's name, original LLaVA base folder (Vicuna, Llama) or whole LLaVA
                folder.
            vision_tower: CLIP folder of an original LLaVA model; default: what its config names, if that is a folder.
            mm_projector: `mm_projector.bin`, or a folder with it, or xtuner's folder or its `projector/`.
            adapter: a LLaVA LoRA folder or one of its `checkpoint-N`: its config tells what the base folder's does not.

        Raises:
            FileNotFoundError: a folder or file is not there.
            ValueError: it is an adapter, or a kind of LLaVA that is not supported, or lacks its vision tower.
        """
        model = on_disk(model)
        config = read_config(model)
        if (model / "adapter_config.json").is_file():
            raise ValueError(
                f"{model}: is an adapter (it has adapter_config.json), expected a whole model; give the base model as "
                "--model and this folder as --adapter"
            )
        settings = _says_llava(config)
        if settings is None and "vision_config" in config:
            for option, value in (("--vision-tower", vision_tower), ("--mm-projector", mm_projector)):
                if value is not None:
                    raise ValueError(
                        f"{option} {value}: {model} is in the Hugging Face layout and has its own; leave it out"
                    )
            return huggingface(model, config)
        settings = settings or _llava_settings(adapter)
        if settings is None and vision_tower is None and mm_projector is None:
            return huggingface(model, config)
        return original(model, config, _LLAVA_DEFAULTS | (settings or {}), vision_tower, mm_projector)

    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) over the configs, and names and sizes of the weights; not over where they lie."""
        digest = hashlib.sha256(f"{self.layout} {self.kind}".encode())
        for part in (self.model, self.vision_tower, self.mm_projector, self.tower_adapter):
            if part is None:
                continue
            folder = part if part.is_dir() else part.parent
            if part.is_dir() and (part / "config.json").is_file():
                digest.update((part / "config.json").read_bytes())
            files = {file for pattern in _WEIGHTS for file in folder.glob(pattern)} if part.is_dir() else {part}
            for file in sorted(files):
                digest.update(f"{file.name} {file.stat().st_size}".encode())
        return digest.hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """For manifests: paths absolute."""
        return {
            name: str(value.resolve()) if isinstance(value, Path) else value for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelFolder":
        """The inverse of `as_dict`."""
        paths = ("model", "vision_tower", "mm_projector", "tower_adapter")
        return cls(**values | {name: Path(values[name]) for name in paths if values.get(name) is not None})

    @property
    def image_processor(self) -> Path | None:
        """Folder of the image processor's settings; None for text models."""
        if self.kind == "text":
            return None
        return self.vision_tower or self.model


def read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a model folder with config.json")
    if not (folder / "config.json").is_file():
        hint = "expected a model folder"
        if (folder / "adapter_config.json").is_file():
            hint = "it is an adapter: give the base model as --model and this folder as --adapter"
        elif (folder / "icons.json").is_file():
            hint = "it is a warm-up folder: give it as --checkpoint"
        raise FileNotFoundError(f"{folder}: has no config.json; {hint}")
    try:
        return json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'}: not valid JSON ({error}); download the folder again") from None


@contextmanager
def own_code(folder: Path) -> Iterator[None]:
    """Around what transformers loads: code of a folder's own that is not to be run is refused in one line."""
    try:
        yield
    except ValueError as error:
        # one line may stand in the library's place already, with its own words as the cause
        if "trust_remote_code" not in f"{error} {error.__cause__}":
            raise
        raise ValueError(
            f"{folder}: needs code that comes with it, which is run only when asked for; read it, then give "
            "--trust-remote-code"
        ) from None


def _says_llava(config: dict[str, Any]) -> dict[str, Any] | None:
    """The config when it is an original LLaVA's. Not by `model_type`: xtuner writes "llava", others "llava_llama"."""
    return config if "mm_projector_type" in config or "mm_vision_tower" in config else None


def _llava_settings(adapter: Path | str | None) -> dict[str, Any] | None:
    """What a LLaVA LoRA folder's config, or that of the run a `checkpoint-N` belongs to, says about images."""
    if adapter is None:
        return None
    for folder in (Path(adapter), Path(adapter).resolve().parent):
        if (folder / "config.json").is_file() and (reason := _says_llava(read_config(folder))):
            return reason
    return None


def huggingface(model: Path, config: dict[str, Any]) -> ModelFolder:
    text = config.get("text_config") or config
    cut = min(_DEFAULT_MAX_LENGTH, int(text.get("max_position_embeddings") or _DEFAULT_MAX_LENGTH))
    if config.get("model_type") == "llava" and _vision_kind(config) in _LLAVA_TOWERS:
        whole = config.get("vision_feature_select_strategy", "default") == "full"
        return ModelFolder(
            model,
            "huggingface",
            "llava",
            image_token_id=config.get("image_token_index", config.get("image_token_id", 32000)),
            image_tokens=features(config.get("vision_config") or {}, whole),
            template=template_of(text, model, original=False),
            max_length=cut,
            select_feature="cls_patch" if whole else "patch",
        )
    if "vision_config" in config:
        token = config.get("image_token_id", config.get("image_token_index"))
        return ModelFolder(model, "huggingface", "image-text", image_token_id=token, max_length=cut)
    return ModelFolder(model, "huggingface", "text", max_length=cut)


def _vision_kind(config: dict[str, Any]) -> str:
    return (config.get("vision_config") or {}).get("model_type") or "clip_vision_model"


def original(
    model: Path,
    config: dict[str, Any],
    settings: dict[str, Any],
    vision_tower: Path | str | None,
    mm_projector: Path | str | None,
) -> ModelFolder:
    _check_supported(model, settings)
    tower = _find_tower(model, settings, vision_tower)
    projector, tower_adapter = _find_projector(mm_projector if mm_projector is not None else _xtuner_projector(model))
    whole = settings["mm_vision_select_feature"] == "cls_patch"
    vision = read_config(tower)
    return ModelFolder(
        model,
        "original",
        "llava",
        vision_tower=tower,
        mm_projector=projector,
        tower_adapter=tower_adapter,
        image_token_id=_LLAVA_IMAGE_TOKEN_ID,
        image_tokens=features(vision.get("vision_config") or vision, whole),
        template=template_of(config, model, original=True),
        max_length=int(settings.get("tokenizer_model_max_length") or _DEFAULT_MAX_LENGTH),
        image_aspect_ratio=settings.get("image_aspect_ratio") or "pad",
        select_layer=settings["mm_vision_select_layer"],
        select_feature=settings["mm_vision_select_feature"],
    )


def _check_supported(model: Path, settings: dict[str, Any]) -> None:
    expected: dict[str, tuple[Any, ...]] = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_patch_merge_type": ("flat", None),
        "mm_use_im_start_end": (False, None),
        "mm_vision_select_feature": ("patch", "cls_patch"),
    }
    for name, values in expected.items():
        if settings.get(name) not in values:
            raise ValueError(
                f"{model}: {name} is {settings.get(name)!r}, expected {values[0]!r} (LLaVA-1.5's); convert the model "
                "to the Hugging Face layout if transformers knows its kind"
            )


def _find_tower(model: Path, settings: dict[str, Any], given: Path | str | None) -> Path:
    if given is not None:
        given = on_disk(given)
        read_config(given)
        return given
    named = settings.get("mm_vision_tower") or settings.get("vision_tower")
    places = [model / "vision_tower"]
    if named:
        places += [Path(named), model / named, model.resolve().parent / named]
    for candidate in places:
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(
        f"{model}: its vision tower ({named or 'not named in config.json'}) is not a folder here; give --vision-tower, "
        "the folder of openai/clip-vit-large-patch14-336 for LLaVA-1.5"
    )


def _xtuner_projector(model: Path) -> Path | None:
    return model if (model / "projector" / "model.safetensors").is_file() else None


def _find_projector(given: Path | str | None) -> tuple[Path | None, Path | None]:
    """The projector's file, and xtuner's adapter of the vision tower that lies beside it."""
    if given is None:
        return None, None
    given = Path(given)
    if given.is_file():
        return given, None
    names = ("mm_projector.bin", "projector/model.safetensors", "model.safetensors", "projector/pytorch_model.bin")
    for name in names:
        if (given / name).is_file():
            root = given if name.startswith("projector") else given.parent
            adapter = root / "visual_encoder_adapter"
            xtuner = name != "mm_projector.bin" and (adapter / "adapter_config.json").is_file()
            return given / name, adapter if xtuner else None
    raise FileNotFoundError(f"{given}: no projector here; expected mm_projector.bin, or xtuner's projector/ folder")


def features(vision: dict[str, Any], whole: bool) -> int:
    """Image features that reach the language model: one per patch, and the class token where it is kept.

    >>> features({"image_size": 336, "patch_size": 14}, whole=False)
    576
    """
    patches = (vision.get("image_size", 224) // vision.get("patch_size", 32)) ** 2
    has_class_token = "clip" in vision.get("model_type", "clip")
    return int(patches + (whole and has_class_token))
