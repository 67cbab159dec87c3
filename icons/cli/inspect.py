"""`icons inspect`: a few samples as the model sees them, before a long run is started on many."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from statistics import median
from typing import Any

from rich.console import Console
from rich.text import Text

from icons.batch import IGNORE_INDEX, Status
from icons.cli.console import console, tell
from icons.cli.model_source import ModelSource
from icons.cli.options.inspect import InspectOptions
from icons.datamodules.dataset import ConversationDataset
from icons.terminal import counted

_LEARNED, IMAGE, PLAIN = "bold green", "bold magenta", ""
_OPENING, _CLOSING = "\N{LEFT DOUBLE ANGLE BRACKET}", "\N{RIGHT DOUBLE ANGLE BRACKET}"
_EXAMPLES = 3


def inspect(options: InspectOptions) -> int:
    """Shows samples as the model sees them: which tokens are learned, where images stand, and which rows fail."""
    for name, value in (("--samples", options.samples), ("--scan", options.scan)):
        if value < 1:
            raise ValueError(f"{name} {value}: expected 1 or more")
    source = ModelSource.resolve(options, preparing=options)
    dataset = source.datamodule(options, options.data, options.images).dataset
    for row in options.row or []:
        if not 0 <= row < len(dataset):
            raise ValueError(
                f"--row {row}: {options.data} has {counted(len(dataset), 'row')}; expected 0 to {len(dataset) - 1}"
            )
    settings = dataset.preprocessing
    tell(
        f"{options.data}: {counted(len(dataset), 'row')}, dialect {dataset.dialect.name}, "
        f"template {settings.template}, max length {settings.max_length}"
    )
    for row in options.row or spread(len(dataset), options.samples):
        show(dataset, row)
    scanned = spread(len(dataset), options.scan)
    good = summary([dataset[row] for row in scanned])
    return int(not good)


def spread(rows: int, count: int) -> list[int]:
    """At most `count` rows, evenly spaced.

    >>> spread(10, 3)
    [0, 4, 9]
    """
    count = min(rows, count)
    return [round(index * (rows - 1) / max(1, count - 1)) for index in range(count)]


def show(dataset: ConversationDataset, row: int) -> None:
    """Prints one sample: its numbers, then its tokens in order."""
    sample = dataset[row]
    name = dataset.records.id(row)
    head = f"row {row}{f' (id {name})' if name else ''}"
    if "failed" in sample:
        status = Status(sample["failed"]).name.lower()
        tell(f"\n{head}: FAILED {status}: {sample['reason']}")
        return
    learned = int((sample["labels"] != IGNORE_INDEX).sum())
    length = len(sample["input_ids"])
    cut = ", cut at the maximal length" if length == dataset.preprocessing.max_length else ""
    tell(f"\n{head}: {counted(length, 'token')}, {learned} learned{cut}{pixels(sample)}")
    console.print(as_text(dataset, sample, console), soft_wrap=True)


def pixels(sample: Mapping[str, Any]) -> str:
    """What of the sample is not tokens, by name and shape.

    >>> import torch
    >>> pixels({"row": 1, "labels": torch.zeros(3), "pixel_values": torch.zeros(1, 3, 8, 8)})
    ', pixel_values [1, 3, 8, 8]'
    """
    names = [name for name in sample if name not in ("row", "input_ids", "labels") and sample[name].dim() > 1]
    return "".join(f", {name} {list(sample[name].shape)}" for name in names)


def as_text(dataset: ConversationDataset, sample: Mapping[str, Any], target: Console) -> Text:
    """The tokens decoded: what is learned in green, or between brackets where there are no colours; runs of image
    positions as one mark."""
    text = Text()
    for kind, ids in runs(sample["input_ids"].tolist(), sample["labels"].tolist(), dataset.folder.image_token_id):
        if kind == IMAGE:
            text.append(f"[image x {len(ids)}]", style=IMAGE)
            continue
        said = str(dataset.tokenizer.decode(ids))
        bracketed = kind == _LEARNED and (target.color_system is None or target.no_color)
        text.append(_OPENING + said + _CLOSING if bracketed else said, style=kind)
    return text


def runs(ids: Sequence[int], labels: Sequence[int], image: int | None) -> Iterator[tuple[str, list[int]]]:
    """Consecutive tokens of one kind.

    >>> list(runs([5, 9, 9, 6, 7], [-100, -100, -100, -100, 7], image=9))
    [('', [5]), ('bold magenta', [9, 9]), ('', [6]), ('bold green', [7])]
    """

    def kind(pair: tuple[int, int]) -> str:
        return IMAGE if pair[0] == image else PLAIN if pair[1] == IGNORE_INDEX else _LEARNED

    for style, pairs in groupby(zip(ids, labels, strict=True), kind):
        yield style, [token for token, _ in pairs]


def summary(samples: Sequence[Mapping[str, Any]]) -> int:
    """Prints lengths and, by kind, failures with examples; how many samples are good."""
    good = [sample for sample in samples if "failed" not in sample]
    lines = [f"\nof {counted(len(samples), 'row')} tried, {len(good)} {'is' if len(good) == 1 else 'are'} good"]
    if good:
        lengths = [len(sample["input_ids"]) for sample in good]
        learned = [int((sample["labels"] != IGNORE_INDEX).sum()) for sample in good]
        for name, numbers in (("tokens", lengths), ("learned", learned)):
            lines.append(f"  {name:<8} {min(numbers)} to {max(numbers)}, median {median(numbers):g}")
    kinds: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if "failed" in sample:
            kinds[Status(sample["failed"]).name.lower()][sample["reason"]].append(sample["row"])
    for status, reasons in sorted(kinds.items()):
        lines.append(f"  {status}: {counted(sum(map(len, reasons.values())), 'row')}")
        lines += [f"    row {rows[0]}: {reason}" for reason, rows in [*reasons.items()][:_EXAMPLES]]
    tell("\n".join(lines))
    return len(good)
