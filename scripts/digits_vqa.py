"""A second real data set for the study: scikit-learn's handwritten digits, asked about as a user would ask.

The UCI test set of Alpaydin and Kaynak: 1,797 grey images of 8 x 8 pixels, written by 13 people, here enlarged to
64 x 64, dark on white. Laid out as `icons.datamodules.easy_vqa` lays out the demo's data: a pool with wrong answers,
near-duplicates and text of no use, four tasks with validation and test files, and no image in two of the splits.

    python scripts/digits_vqa.py --out digits_start

makes the start model: the demo's, which has never seen handwriting, aligned further on images of no other split with
questions in plain formats. About 6 minutes on one CPU core.
"""

import argparse
import random
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from align_demo_start import FORMATS, SHIFT, Samples, accuracy
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaForConditionalGeneration

from icons.datamodules.easy_vqa import (
    NUMBERS,
    POOL,
    DemoData,
    Question,
    draw_kinds,
    near_copy,
    record,
    text_only,
    write_records,
)

KINDS = ("digit", "parity", "size", "digit presence")
SPLITS = {
    "alignment": slice(0, 800),
    "pool": slice(800, 1250),
    "validation": slice(1250, 1400),
    "development": slice(1400, 1797),
}
TASKS = {
    "general": dict.fromkeys(KINDS, 0.25),
    "naming": {"digit": 0.55, "parity": 0.15, "size": 0.15, "digit presence": 0.15},
    "order": {"digit": 0.15, "parity": 0.35, "size": 0.35, "digit presence": 0.15},
    "presence": {"digit": 0.15, "parity": 0.15, "size": 0.15, "digit presence": 0.55},
}


def make_digits_data(
    out: Path, seed: int, num_pool: int = 2400, num_validation: int = 80, num_test: int = 400
) -> DemoData:
    """Writes pool, validation and test files and the images; the same arguments give the same bytes."""
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    write_records(out / "pool.json", draw_pool(questions("pool", images), num_pool, images, draw))
    files: dict[str, dict[str, Path]] = {"": {}, "_test": {}}
    for suffix, split, count in (("", "validation", num_validation), ("_test", "development", num_test)):
        draw = random.Random(f"test {seed}") if suffix else draw
        asked = questions(split, images)
        for task, shares in TASKS.items():
            drawn = draw_kinds(asked, shares, count, draw)
            files[suffix][task] = out / f"{task}{suffix}.json"
            records = [of(question, f"{task}{suffix}-{i}", images) for i, question in enumerate(drawn)]
            write_records(files[suffix][task], records)
    return DemoData(out / "pool.json", images, files[""], files["_test"])


def questions(split: str, images: Path) -> list[Question]:
    """All questions about a split's images: per image one of each kind, the presence of a digit asked for twice, once
    rightly. The images are written below `images`."""
    from sklearn.datasets import load_digits  # the study's own need, not the package's

    loaded = load_digits()
    order = np.random.default_rng(0).permutation(len(loaded.images))[SPLITS[split]]
    draw, found = random.Random(split), []
    for number in order.tolist():
        digit, path = int(loaded.target[number]), images / f"{number}.png"
        if not path.exists():
            grey = Image.fromarray((255 - loaded.images[number] * 255 / 16).astype(np.uint8))
            grey.resize((64, 64), Image.Resampling.BILINEAR).convert("RGB").save(path)
        limit, other = draw.randrange(9), draw.choice([d for d in range(10) if d != digit])
        asked = [
            ("what digit is in the image?", NUMBERS[digit], "digit"),
            ("is the digit even or odd?", "odd" if digit % 2 else "even", "parity"),
            (f"is the digit more than {NUMBERS[limit]}?", "yes" if digit > limit else "no", "size"),
            (f"is a {NUMBERS[digit]} present?", "yes", "digit presence"),
            (f"is a {NUMBERS[other]} present?", "no", "digit presence"),
        ]
        found += [Question(path, *each) for each in asked]
    return found


def draw_pool(asked: Sequence[Question], count: int, images: Path, draw: random.Random) -> list[dict[str, Any]]:
    """The pool's records, shuffled, in the demo's shares of good, wrong, duplicate and text-only ones."""
    num = {provenance: round(count * share) for provenance, share in POOL.items()}
    num["good"] = count - sum(num.values()) + num["good"]
    drawn = draw_kinds(asked, dict.fromkeys(KINDS, 1 / len(KINDS)), num["good"] + num["wrong"], draw)
    good, wrong = drawn[: num["good"]], drawn[num["good"] :]
    records = [of(question, "", images) for question in good]
    for question in wrong:
        records.append(of(question, "", images, provenance="wrong"))
        records[-1]["conversations"][1]["value"] = wrong_answer(question.answer, draw)
    for question in draw.sample(good, num["duplicate"]):
        name = Path("copies") / f"{len(records)}-{question.image.name}"
        near_copy(question.image, images / name, draw)
        records.append(record(question, "", images, provenance="duplicate", image=name))
    records += [text_only(draw) for _ in range(num["text-only"])]
    draw.shuffle(records)
    for number, entry in enumerate(records):
        entry["id"] = f"pool-{number}"
    return records


def of(question: Question, name: str, images: Path, provenance: str = "good") -> dict[str, Any]:
    return record(question, name, images, provenance=provenance, image=question.image.relative_to(images))


def wrong_answer(answer: str, draw: random.Random) -> str:
    """A false answer of the right kind."""
    choices = next(each for each in (NUMBERS, ("even", "odd"), ("yes", "no")) if answer in each)
    return draw.choice([other for other in choices if other != answer])


def align(steps: int, images: Path) -> tuple[LlavaForConditionalGeneration, AutoTokenizer, CLIPImageProcessorPil]:
    """The demo's start, all of it trained on plain questions about the alignment images, these moved about."""
    with resources.as_file(resources.files("icons") / "configs" / "demo_start") as start:
        model = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
        tokenizer, processor = AutoTokenizer.from_pretrained(start), CLIPImageProcessorPil.from_pretrained(start)
    train, held_out = (
        Samples([(q.image, q.text, q.answer) for q in questions(split, images)], tokenizer, processor, formats)
        for split, formats in (("alignment", FORMATS), ("development", FORMATS[:1]))
    )
    optimizer, draw = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01), random.Random(0)
    for step in range(1, steps + 1):
        inputs, labels = train.batch([draw.randrange(len(train.texts)) for _ in range(64)])
        inputs["pixel_values"] = moved(inputs["pixel_values"], draw)
        logits = model(**inputs, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, step / 100, 1.2 * (1 - step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps:
            print(f"step {step}  loss {loss.item():.3f}  held-out accuracy {accuracy(model, held_out):.3f}", flush=True)
    return model, tokenizer, processor


def moved(pixels: Tensor, draw: random.Random) -> Tensor:
    """The images moved by up to half of `SHIFT` pixels, their border repeated; never mirrored, as digits are not."""
    padded = F.pad(pixels, (SHIFT // 2,) * 4, mode="replicate")
    tops, lefts = ([draw.randrange(SHIFT + 1) for _ in pixels] for _ in range(2))
    high, wide = pixels.shape[2:]
    return torch.stack([image[:, y : y + high, x : x + wide] for image, y, x in zip(padded, tops, lefts, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    images = given.out / "images"
    images.mkdir(parents=True, exist_ok=True)
    model, tokenizer, processor = align(given.steps, images)
    model.to(torch.float16)
    for part in (model, tokenizer, processor):
        part.save_pretrained(given.out)


if __name__ == "__main__":
    main()
