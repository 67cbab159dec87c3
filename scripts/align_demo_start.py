"""Makes the small LLaVA that `icons demo` starts from, and saves it where the package ships it.

    python scripts/align_demo_start.py --out icons/configs/demo_start

A `LlavaForConditionalGeneration` from a config, its tokenizer trained here, aligned on easy-VQA captions and on
questions in plain formats, about images that are in no other split: an able model before visual instruction tuning.
It has seen the chat format on text alone, as a language model has, and never with an image. Two rounds: one plain
format first, then the three of `FORMATS`, so that the start does not hang on a prompt's exact words. About 8 minutes on
2 quiet CPU cores.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from icons.datamodules.easy_vqa import KINDS, alignment_samples, kind_of, questions, text_only

IMAGE_SIZE, PATCH_SIZE, SHIFT = 64, 16, 8
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
FORMATS = (("", ""), ("Q: ", " A:"), ("question: ", " answer:"))
"""Plain formats of a question: what stands before the image, and between question and answer."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {{ message['content'] }} "
    "{% else %}ASSISTANT: {% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_tokenizer(samples: list[tuple[Path, str, str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the alignment texts, the roles' words, and the text-only records' words."""
    draw = random.Random(0)
    corpus = [f"{question} {answer}" for _, question, answer in samples] + ["USER: ASSISTANT: "] * 50
    for _ in range(2000):
        corpus += [" " + turn["value"] for turn in text_only(draw)["conversations"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        model_max_length=128,
        padding_side="right",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=112,
        intermediate_size=224,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=32,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config)


class Samples:
    """Token ids, labels and pixels, all in memory (a few thousand small images)."""

    def __init__(
        self,
        samples: list[tuple[Path, str, str]],
        tokenizer: PreTrainedTokenizerFast,
        processor: CLIPImageProcessorPil,
        formats: Sequence[tuple[str, str]] = FORMATS[:1],
    ) -> None:
        self.texts: list[tuple[list[int], list[int]]] = []
        self.tokenizer = tokenizer
        paths = sorted({path for path, _, _ in samples})
        number = {path: i for i, path in enumerate(paths)}
        images = [Image.open(path).convert("RGB") for path in paths]
        self.pixels = processor(images, return_tensors="pt").pixel_values
        self.image = [number[path] for path, _, _ in samples]
        image_tokens = [tokenizer.convert_tokens_to_ids("<image>")] * IMAGE_TOKENS
        for number, (_, question, answer) in enumerate(samples):
            before, after = formats[number % len(formats)] if question else ("", "")
            self.add([*self.ids(before), *image_tokens, *self.ids("\n" + question + after)], answer)

    def add_text_chat(self, count: int, draw: random.Random) -> None:
        """Adds text-only conversations in the chat format: a language model before LLaVA has seen that format."""
        for _ in range(count):
            asked, told = (turn["value"] for turn in text_only(draw)["conversations"])
            self.add(self.ids(f"USER: {asked} ASSISTANT:"), told)
            self.image.append(-1)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def add(self, asked: list[int], answer: str) -> None:
        told = [*self.ids(" " + answer), self.tokenizer.eos_token_id]
        self.texts.append(([self.tokenizer.bos_token_id, *asked], told))

    def batch(self, chosen: list[int], draw: random.Random | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """The model's inputs and the labels of some samples; with `draw`, the images are moved about."""
        texts = [self.texts[i] for i in chosen]
        length = max(len(asked) + len(told) for asked, told in texts)
        ids = torch.full((len(texts), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(texts), length), -100)
        for row, (asked, told) in enumerate(texts):
            end = len(asked) + len(told)
            ids[row, :end] = torch.tensor(asked + told)
            labels[row, len(asked) : end] = torch.tensor(told)
        pixels = self.pixels[[self.image[i] for i in chosen if self.image[i] >= 0]]
        inputs = {"input_ids": ids, "attention_mask": (ids != self.tokenizer.pad_token_id).long()}
        return inputs | {"pixel_values": shifted(pixels, draw) if draw else pixels}, labels


def shifted(pixels: Tensor, draw: random.Random) -> Tensor:
    """The images mirrored half of the time and moved by up to `SHIFT` pixels, their border repeated."""
    padded = F.pad(pixels, (SHIFT,) * 4, mode="replicate")
    moved = torch.empty_like(pixels)
    for i, image in enumerate(padded):
        top, left = draw.randrange(2 * SHIFT + 1), draw.randrange(2 * SHIFT + 1)
        image = image[:, top : top + pixels.shape[2], left : left + pixels.shape[3]]
        moved[i] = image.flip(-1) if draw.random() < 0.5 else image
    return moved


@torch.no_grad()
def accuracy(model: LlavaForConditionalGeneration, samples: Samples) -> float:
    """Share of samples whose answer tokens are all the most probable ones."""
    right = 0
    for chosen in torch.arange(len(samples.texts)).split(256):
        inputs, labels = samples.batch(chosen.tolist())
        logits = model(**inputs, use_cache=False).logits
        targets = labels[:, 1:]
        right += int(((logits[:, :-1].argmax(-1) == targets) | (targets == -100)).all(1).sum())
    return right / len(samples.texts)


@dataclass(frozen=True)
class Round:
    """One round of alignment: AdamW on all parameters, the learning rate falling to zero."""

    formats: Sequence[tuple[str, str]]
    steps: int
    learning_rate: float
    captions_only: float
    """share of the steps before questions and text join in"""


ROUNDS = (Round(FORMATS[:1], 3400, 1e-3, 0.3), Round(FORMATS, 800, 6e-4, 0.0))


def align(
    model: LlavaForConditionalGeneration, train: Samples, kinds: dict[str, list[int]], held_out: Samples, of: Round
) -> float:
    """Trains for one round, question kinds twice as often as captions and text; accuracy on the held-out questions."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=of.learning_rate, weight_decay=0.01)
    draw = random.Random(0)
    begun, reached = time.monotonic(), 0.0
    for step in range(1, of.steps + 1):
        names = ["caption"] if step < of.captions_only * of.steps else [*kinds, *KINDS]
        chosen = [draw.choice(kinds[draw.choice(names)]) for _ in range(64)]
        inputs, labels = train.batch(chosen, draw)
        logits = model(**inputs, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.param_groups[0]["lr"] = of.learning_rate * min(1.0, step / 100, 1.2 * (1 - step / of.steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == of.steps:
            reached = accuracy(model, held_out)
            spent = time.monotonic() - begun
            print(f"step {step}  {spent:.0f} s  loss {loss.item():.3f}  held-out accuracy {reached:.3f}", flush=True)
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text-chat", type=int, default=500, help="text-only conversations in the chat format")
    parser.add_argument("--scale", type=float, default=1.0, help="of every round's steps; below 1 to try the script")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    samples = alignment_samples()
    asked = [(question.image, question.text, question.answer) for question in questions("development")]
    tokenizer = make_tokenizer(samples)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    model = make_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens, {len(samples)} samples")
    held_out = Samples(asked, tokenizer, processor)
    kinds: dict[str, list[int]] = {}
    for i, (_, question, answer) in enumerate(samples):
        kinds.setdefault(kind_of(question, answer) if question else "caption", []).append(i)
    kinds["text"] = list(range(len(samples), len(samples) + args.text_chat))
    for of in ROUNDS:
        train = Samples(samples, tokenizer, processor, of.formats)
        train.add_text_chat(args.text_chat, random.Random(1))
        reached = align(model, train, kinds, held_out, replace(of, steps=round(args.scale * of.steps)))
    model.to(torch.float16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    content = {"rounds": [of.steps for of in ROUNDS], "held_out_accuracy_plain": round(reached, 4)}
    (args.out / "alignment.json").write_text(json.dumps(content) + "\n")
    for file in args.out.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    main()
