"""LLaVA as one model whatever its layout, and the merge of image features into the text.

Differs from transformers' own class in one thing: image positions may hold any id, negative ones too, and the last
image may be cut by the maximal length. So LLaVA's vocabulary stays as it was trained (its loss does not change), and
text is cut as the original cuts it: after the images are in.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from icons.terminal import counted


class Llava(LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` with its own merge; get one by `Llava.of(model, image_token_id)`."""

    image_token: int

    @classmethod
    def of(cls, model: LlavaForConditionalGeneration, image_token_id: int) -> "Llava":
        """The very same model, with the merge of this class (transformers converts old names for its own classes only,
        so a model is loaded as theirs and becomes ours afterwards)."""
        model.__class__ = cls
        assert isinstance(model, Llava)
        model.image_token = image_token_id
        return model

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        pixel_values: Float[Tensor, "images 3 height width"] | None = None,
        attention_mask: Int[Tensor, "batch length"] | Bool[Tensor, "batch length"] | None = None,
        inputs_embeds: Float[Tensor, "batch length width"] | None = None,
        **options: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """Logits `[batch, length, vocabulary]`.

        Args:
            input_ids: every image position holds the image token's id, `image_tokens` of them per image, in the
                order of `pixel_values`; the last image of a row may be cut.
            pixel_values: one per image, rows in order; None when no row has one.

        Raises:
            ValueError: the number of images is not the number of image runs.
        """
        if inputs_embeds is None:
            assert input_ids is not None, "Llava: give input_ids or inputs_embeds"
            inputs_embeds = self.embed(input_ids, pixel_values)
        output = self.model.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **options)
        return LlavaCausalLMOutputWithPast(
            logits=self.lm_head(output.last_hidden_state), past_key_values=output.past_key_values
        )

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Embeddings of the tokens, with image features at the image positions.

        The projector runs after the merge, on `[batch, length, features]` with zeros at the text: laid out as the batch
        is, so that its per-sample gradients follow from its input and its output's gradient like any other layer's.
        """
        places = input_ids == self.image_token
        table = self.get_input_embeddings()
        embeddings: Tensor = table(input_ids.masked_fill(places, 0))
        if pixel_values is not None and len(pixel_values):
            features = self.image_features(pixel_values)
            blank = features.new_zeros(*places.shape, features.shape[-1])
            projected = self.model.multi_modal_projector(merge_images(blank, features, places))
            return torch.where(places[..., None], projected.to(embeddings.dtype), embeddings)
        if places.any():
            raise ValueError(
                f"Llava: {counted(int(places.sum()), 'image position')} and no pixel_values; expected one image "
                "per run of them"
            )
        if self.training:  # a projector that is trained takes part in every batch: other ranks wait for its gradients
            unused = [part.sum() * 0.0 for part in self.model.multi_modal_projector.parameters() if part.requires_grad]
            embeddings = embeddings + sum(unused, embeddings.new_zeros(())).to(embeddings.dtype)
        return embeddings

    def image_features(
        self, pixel_values: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images features channels"]:
        """The tower's features of each image, in the projector's dtype (float32 while it is trained)."""
        projector: Any = self.model.multi_modal_projector
        tower: Any = self.model.vision_tower
        pixels = pixel_values.to(device=tower.device, dtype=tower.dtype)
        states = tower(pixels, output_hidden_states=True).hidden_states
        layers = self.config.vision_feature_layer
        start = 1 if self.config.vision_feature_select_strategy == "default" else 0
        chosen = [states[layer][:, start:] for layer in ([layers] if isinstance(layers, int) else layers)]
        # a quantised weight is no float: then the features stay in the dtype of the tower
        weight: Tensor = next(projector.parameters())
        features = torch.cat(chosen, dim=-1)
        return features.to(weight.dtype) if weight.is_floating_point() else features


def merge_images(
    embeddings: Float[Tensor, "batch length width"],
    features: Float[Tensor, "images features width"],
    places: Bool[Tensor, "batch length"],
) -> Float[Tensor, "batch length width"]:
    """Puts each row's images, in order, at its image positions.

    The k-th image position of a row takes feature `k mod F` of the row's image `k div F`: the last image of a row may
    be cut, no other. Rows without an image position take no image.

    Raises:
        ValueError: the number of images differs from the number of (whole or cut) runs.

    Source: haotian-liu/LLaVA, llava/model/llava_arch.py, prepare_inputs_labels_for_multimodal.

    >>> text, image = torch.zeros(2, 3, 1), torch.tensor([[[1.0], [2.0]]])
    >>> merge_images(text, image, torch.tensor([[False, True, True], [False, False, False]]))[..., 0].tolist()
    [[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]
    """
    per_image = features.shape[1]
    count = places.sum(dim=1)
    images = (count + per_image - 1) // per_image
    if int(images.sum()) != len(features):
        raise ValueError(
            f"Llava: {counted(len(features), 'image')} for {images.tolist()} runs of image positions per row "
            f"({per_image} positions an image); expected one image per run, rows in order: leave out images that the "
            "maximal length cuts away"
        )
    row, position = places.nonzero(as_tuple=True)
    nth = (places.cumsum(dim=1) - 1)[row, position]  # among the row's image positions
    first = images.cumsum(dim=0) - images
    chosen = features[first[row] + nth // per_image, nth % per_image]
    # every place is written once: the same on every device, forwards and backwards
    return embeddings.index_put((row, position), chosen.to(embeddings.dtype))


def assemble(
    language: nn.Module, tower: nn.Module, select_layer: int, select_feature: str
) -> LlavaForConditionalGeneration:
    """A LLaVA from a language model (`LlamaForCausalLM`) and a vision tower; its projector is yet to be loaded.

    Only the projector is new; it stands on the device and in the dtype of the language model's output layer.
    """
    text: Any = language.config
    vision: Any = tower.config
    kernels = [part._attn_implementation for part in (text, vision)]
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=text.vocab_size,  # a name only: positions are found by Llava.image_token
        vision_feature_layer=select_layer,
        vision_feature_select_strategy="full" if select_feature == "cls_patch" else "default",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2 + (select_feature == "cls_patch"),
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    for part, kernel in zip((text, vision), kernels, strict=True):
        part._attn_implementation = kernel  # which the common config has set back to the default
    core: Any = model.model
    core.language_model, core.vision_tower, model.lm_head = language.model, tower, language.lm_head
    dtype = text.dtype if isinstance(text.dtype, torch.dtype) else torch.float32
    core.multi_modal_projector.to(dtype)
    model.generation_config = getattr(language, "generation_config", model.generation_config)
    return model
