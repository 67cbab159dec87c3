"""Training formats: a selection as the next tool reads it (LLaMA-Factory, TRL, ms-swift, Hugging Face data sets).

| format | files in the folder |
|---|---|
| `llamafactory` | `data.json` in its ShareGPT form and `dataset_info.json`, which its `dataset_dir` asks for |
| `trl` | `data.jsonl`: `messages` whose contents are lists of parts, `images` |
| `swift` | `data.jsonl`: `messages` with `<image>` in their texts, `images` |
| `datasets` | what `datasets.load_from_disk` reads: `messages` as for `trl`, `images` |

Beside them lie `rows.npy` (the records' positions in the data file), `ids.txt`, `images/` (only images that the records
bring along themselves) and a data-set card, `README.md`. Images of the image folder are named as the records name them,
below `image_root` where one is given.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icons.consensus.selection_file import SelectionManifest
from icons.datamodules.conversation import Conversation, ImageRef
from icons.datamodules.dialects import Dialect, detect, read_conversation
from icons.datamodules.failed_row import FailedRowError
from icons.datamodules.records import RecordSource
from icons.datamodules.records.data_set import library, without_bars
from icons.manifest import versions
from icons.output import at_the_top, mark, whole_folder
from icons.terminal import counted

Message = dict[str, Any]
Example = dict[str, Any]
_NUM_PROBED = 64
MADE_BY, _CARD = "select", "README.md"


@dataclass(frozen=True)
class TrainingFormat:
    """How one tool wants a conversation, and the files that it is written to."""

    does: str
    content: Callable[[Sequence[Any]], Any]
    """The parts of a turn (texts, and None for an image) -> a message's content."""
    write: Callable[[Iterator[Example], Path], None]


def write_training_data(
    records: RecordSource,
    rows: Sequence[int],
    out: Path,
    form: str,
    *,
    named: Path | None = None,
    image_root: Path | None = None,
    dialect: Dialect | None = None,
    card: Mapping[str, str] | None = None,
) -> None:
    """Writes the records of `rows` into the folder `out` for another tool.

    Args:
        records: the data file.
        rows: positions in it; the order of the examples.
        out: the folder, whole or not there; what a former selection left in it is replaced.
        form: a key of `FORMATS`.
        named: where it will lie in the end, if that is not `out`: images are named from there.
        image_root: what relative image names start from; None leaves them relative.
        dialect: how the records are written; None: as most of the first are.
        card: the data-set card's table, what was selected from what and how.

    Raises:
        ValueError: no such format; a record that is no conversation.
    """
    if form not in FORMATS:
        raise ValueError(f"format {form!r}: expected one of {', '.join(FORMATS)}")
    with whole_folder(out, last=_CARD, stale=at_the_top) as partial:
        images = partial / "images"
        images.mkdir()
        own = Images(images, (named or out).absolute() / "images", image_root)
        FORMATS[form].write(examples(records, rows, own, FORMATS[form], dialect), partial)
        if not any(images.iterdir()):
            images.rmdir()
        np.save(partial / "rows.npy", np.asarray(rows, np.int64))
        ids = (" ".join(str(records.id(row)).splitlines()) for row in rows)  # one a line, whatever they hold
        (partial / "ids.txt").write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
        mark(partial, MADE_BY)
        (partial / _CARD).write_text(_data_card(len(rows), form, card or {}), encoding="utf-8")


def examples(
    records: RecordSource, rows: Sequence[int], images: "Images", form: TrainingFormat, dialect: Dialect | None
) -> Iterator[Example]:
    """The records as examples, one at a time."""
    dialect = dialect or detect([records.light(row) for row in rows[:_NUM_PROBED]])
    for row in rows:
        try:
            conversation = read_conversation(records[row], dialect)
        except (ValueError, FailedRowError) as error:
            raise ValueError(f"record {row} of {records.path}: {error}; leave it out with --exclude") from error
        names = [images.place(image, f"{row}-{number}") for number, image in enumerate(conversation.images)]
        yield {"messages": messages(conversation, form), "images": names}


def messages(conversation: Conversation, form: TrainingFormat) -> list[Message]:
    system = [] if conversation.system is None else [{"role": "system", "content": form.content([conversation.system])}]
    turns = [
        {
            "role": "user" if turn.human else "assistant",
            "content": form.content([None if isinstance(part, ImageRef) else part for part in turn.parts]),
        }
        for turn in conversation.turns
    ]
    return system + turns


@dataclass(frozen=True)
class Images:
    """Where the tool will find the images.

    Attributes:
        folder: where those that records bring along are written.
        final: what that folder will be called.
        root: what relative names start from; None leaves them relative.
    """

    folder: Path
    final: Path
    root: Path | None

    def place(self, image: ImageRef, name: str) -> str:
        """The image's name for the tool; its content, if it has one, is written under `name`."""
        if image.content is not None:
            file = f"{name}{_suffix_of(image.content)}"
            (self.folder / file).write_bytes(image.content)
            return str(self.final / file)
        is_relative = not (":" in image.name.split("/")[0] or Path(image.name).is_absolute())
        return str(self.root / image.name) if self.root is not None and is_relative else image.name


def _suffix_of(content: bytes) -> str:
    """The usual suffix of an image file, by its first bytes.

    >>> _suffix_of(b"\\x89PNG...."), _suffix_of(b"\\xff\\xd8\\xff\\xe0"), _suffix_of(b"?")
    ('.png', '.jpg', '')
    """
    known = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}
    return next((suffix for start, suffix in known.items() if content.startswith(start)), "")


def _as_text(parts: Sequence[Any]) -> str:
    """`<image>` stands where an image is."""
    return "".join("<image>" if part is None else part for part in parts)


def _as_parts(parts: Sequence[Any]) -> list[dict[str, str]]:
    return [{"type": "image", "text": ""} if part is None else {"type": "text", "text": part} for part in parts]


def _write_lines(examples: Iterator[Example], out: Path) -> None:
    with (out / "data.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)


def _write_llamafactory(examples: Iterator[Example], out: Path) -> None:
    with (out / "data.json").open("w", encoding="utf-8") as file:
        for number, example in enumerate(examples):
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(example, ensure_ascii=False))
        file.write("\n]\n")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    entry = {"file_name": "data.json", "formatting": "sharegpt", "columns": columns}
    entry["tags"] = tags | {"system_tag": "system"}
    (out / "dataset_info.json").write_text(json.dumps({"icons_selection": entry}, indent=1) + "\n")


def _write_dataset(examples: Iterator[Example], out: Path) -> None:
    """
    Raises:
        ValueError: the package `datasets` is not installed.
    """
    datasets, lines = library("format datasets: needs"), out / "data.jsonl"
    _write_lines(examples, out)
    with without_bars():  # two flashes of a second each, over what this command prints
        datasets.Dataset.from_json(str(lines), cache_dir=str(out / ".cache")).save_to_disk(out / "dataset")
    lines.unlink()


def facts_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """A selection's manifest as a data-set card's table."""
    made = SelectionManifest.read(manifest, "selection")
    trained: dict[str, Any] = next(iter(made.scores.get("train") or []), {})
    facts = {
        "selected": f"{made.num_selected:,} of {made.num_rows:,} rows of {made.data.path}",
        "data fingerprint": str(made.data.fingerprint),
        "rule": f"{made.method} at {100 * made.fraction:.4g} %",
        "tasks": ", ".join(made.thresholds),
        "model": str((trained.get("model") or {}).get("path", "unknown")),
        "adapter": str((trained.get("adapter") or {}).get("path", "unknown")),
        "projection": str(trained.get("projector") or "none"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions("icons-lightning", "numpy").items()),
    }
    return facts | ({"certain": str(made.border["verdict"])} if made.border else {})


def _data_card(num_rows: int, form: str, facts: Mapping[str, str]) -> str:
    """A data-set card: what the rows are, what they were selected from, and by what."""
    table = "".join(f"| {name} | {' '.join(value.split()).replace('|', ' ')} |\n" for name, value in facts.items())
    return (
        "---\ntags:\n- icons\n- data-selection\n---\n\n# A selected part of a training set\n\n"
        f"{counted(num_rows, 'row')}, selected with [icons](https://arxiv.org/abs/2501.00654) and written for "
        f"`{form}`. `rows.npy` holds their positions in the data file, `ids.txt` their ids.\n\n"
        f"| | |\n|---|---|\n{table}"
    )


FORMATS: dict[str, TrainingFormat] = {
    "llamafactory": TrainingFormat(
        "LLaMA-Factory's ShareGPT form, with dataset_info.json", _as_text, _write_llamafactory
    ),
    "trl": TrainingFormat("TRL's messages with lists of parts", _as_parts, _write_lines),
    "swift": TrainingFormat("ms-swift's messages", _as_text, _write_lines),
    "datasets": TrainingFormat("a data set saved for datasets.load_from_disk", _as_parts, _write_dataset),
}
