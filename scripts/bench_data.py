"""How fast data are found and read: the first index, reopening, one record, tokens and masks, the loader with workers.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/bench_data.py [--gigabytes 2] [--json FILE]

Each figure stands beside what it must reach. Files are made in a temporary folder, LLaVA-like (about 1.6 kB a record).
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessorPil

from icons.datamodules.chat.templates import CHAT, IMAGE_PLACE, TEMPLATES, Turn
from icons.datamodules.chat.tokenizer import load_tokenizer
from icons.datamodules.records import RecordIndex

IGNORE = -100
MEGABYTE = 1e6
TOKENIZER = Path(__file__).parent.parent / "tests" / "data" / "original_llava" / "vicuna-tiny"


def record(number: int) -> dict[str, Any]:
    words = 'The bus in the image is white and red, and the sign says "stop". '
    turns = [
        {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?\nAnswer in a sentence."},
        {"from": "gpt", "value": words * 6},
        {"from": "human", "value": "Where is it parked?"},
        {"from": "gpt", "value": words * (8 + number % 9)},
    ]
    return {"id": f"{number:012d}", "image": f"coco/train2017/{number:012d}.jpg", "conversations": turns}


def make(path: Path, size: float, lines: bool) -> int:
    """A data file of about `size` bytes; the number of its records."""
    block = [json.dumps(record(number)) for number in range(512)]
    between = "\n" if lines else ", "
    text, count, written = between.join(block), 0, 0
    with path.open("w") as file:
        file.write("" if lines else "[")
        while written < size:
            file.write((between if count else "") + text)
            written, count = written + len(text), count + len(block)
        file.write("\n" if lines else "]")
    return count


def timed(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def anonymous_megabytes() -> float:
    """Memory of this process that is no mapped file."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def index_figures(folder: Path, size: float) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for lines, wanted in ((True, 500), (False, 200)):
        name = "JSONL" if lines else "JSON list"
        path = folder / ("data.jsonl" if lines else "data.json")
        count = make(path, size, lines)
        path.read_bytes()[:1]  # in the page cache: the disk is not what is measured
        before = anonymous_megabytes()
        seconds = timed(lambda path=path: RecordIndex(path))  # type: ignore[misc]
        megabytes = path.stat().st_size / MEGABYTE
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found[f"first index of {megabytes:,.0f} MB {name}"] = (f"{megabytes / seconds:,.0f} MB/s", f">= {wanted} MB/s")
        found[f"memory kept by the {name} index"] = (f"{anonymous_megabytes() - before:,.0f} MB", "<= 300 MB")
        found[f"peak resident, mapped file included ({name})"] = (f"{peak:,.0f} MB", "")
        found[f"opening the {name} again"] = (f"{timed(lambda path=path: RecordIndex(path)):.3f} s", "<= 0.2 s")  # type: ignore[misc]
        index = RecordIndex(path)
        rows = random.Random(0).sample(range(count), 2000)
        found[f"one random record of {count:,} ({name})"] = (
            f"{1000 * timed(lambda i=index, r=rows: [i[row] for row in r]) / len(rows):.3f} ms", "<= 1 ms",  # type: ignore[misc]
        )  # fmt: skip
        kept = range(0, count, 5)
        seconds = timed(lambda i=index, k=kept, f=folder: i.write_selection(k, f / "selected"))  # type: ignore[misc]
        speed = (folder / "selected").stat().st_size / MEGABYTE / seconds
        found[f"writing a 20 % selection ({name})"] = (f"{speed:,.0f} MB/s", ">= 200 MB/s")
        path.unlink()
    return found


def slow_ids(tokenizer: Any, text: str) -> list[int]:
    """LLaVA's `tokenizer_image_token`: the tokenizer itself, called for each part."""
    parts = [tokenizer(part).input_ids for part in text.split("<image>")]
    ids = list(parts[0])
    for part in parts[1:]:
        ids += [IMAGE_PLACE, *part[1:]]
    return ids


def reference_v1(tokenizer: Any, conversation: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """LLaVA's `preprocess_v1` in its own steps, on lists."""
    text = CHAT + " "
    for turn in conversation:
        text += f"USER: {turn['value']} " if turn["from"] == "human" else f"ASSISTANT: {turn['value']}</s>"
    ids = slow_ids(tokenizer, text)
    labels, place = list(ids), 1
    labels[:1] = [IGNORE]
    for number, part in enumerate(text.split("</s>")):
        pieces = part.split(" ASSISTANT: ")
        if len(pieces) != 2:
            break
        asked, whole = (
            len(slow_ids(tokenizer, pieces[0] + " ASSISTANT: ")) - 2,
            len(slow_ids(tokenizer, part)),
        )
        asked, whole = (asked - 1, whole - 1) if number and not tokenizer.legacy else (asked, whole)
        labels[place : place + asked] = [IGNORE] * asked
        place += whole
    return ids, labels


def token_figures() -> dict[str, tuple[str, str]]:
    tokenizer = load_tokenizer(TOKENIZER)
    records = [record(number) for number in range(200)]
    turns = [[Turn(turn["from"] == "human", turn["value"]) for turn in entry["conversations"]] for entry in records]

    def ours() -> list[Any]:
        return [TEMPLATES["v1"](tokenizer, said, True, 2048, None) for said in turns]

    def theirs() -> list[Any]:
        return [reference_v1(tokenizer, entry["conversations"]) for entry in records]

    assert [tuple(found) for found in ours()] == theirs()
    ratio = min(timed(ours) for _ in range(3)) / min(timed(theirs) for _ in range(3))
    return {"tokens and masks / the original's algorithm": (f"{ratio:.2f}", "<= 1.00")}


class Pictures(Dataset[Any]):
    """Decoded and resized, nothing else; or by the package's own data set, which is what is compared."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        with Image.open(self.folder / f"{row:05d}.jpg") as image:
            return self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]


def loader_figures(folder: Path, count: int = 192) -> dict[str, tuple[str, str]]:
    """Two workers against two workers: all that the data set does besides decoding and resizing."""
    from icons.datamodules.dataset import ConversationDataset
    from icons.datamodules.preprocessing import Preprocessing
    from icons.models.folder import ModelFolder

    clip = folder / "clip"
    pictures = Pictures(folder, count)
    pictures.processor.save_pretrained(clip)
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "hidden_size": 16}
    (clip / "config.json").write_text(json.dumps(vision))
    generator = np.random.default_rng(0)
    for row in range(count):
        small = Image.fromarray(generator.integers(0, 255, (28, 28, 3), dtype=np.uint8))
        small.resize((336, 336), Image.Resampling.BICUBIC).save(folder / f"{row:05d}.jpg", quality=90)
    records = [{**record(row), "image": f"{row:05d}.jpg"} for row in range(count)]
    (folder / "pictures.json").write_text(json.dumps(records))
    places = ModelFolder.open(TOKENIZER, clip, TOKENIZER.parent / "mm_projector.bin")
    dataset = ConversationDataset(RecordIndex(folder / "pictures.json"), folder, places, Preprocessing())

    def run(data: Any, collate: Any) -> float:
        loader = DataLoader(data, batch_size=8, num_workers=2, collate_fn=collate, persistent_workers=True)
        list(loader)  # workers have started
        return min(timed(lambda: [None for _ in loader]) for _ in range(3))

    ratio = run(pictures, None) / run(dataset, dataset.collate)
    return {"loader, 2 workers / decoding and resizing alone": (f"{ratio:.2f}", ">= 0.90")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["ICONS_CACHE"] = str(folder / "cache")
        found = index_figures(folder, options.gigabytes * 1e9) | token_figures() | loader_figures(folder)
    for what, (value, wanted) in found.items():
        print(f"{what:<55} {value:>14}   {wanted}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
