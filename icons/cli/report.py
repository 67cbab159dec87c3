"""`icons report`: score store and selection -> one HTML page with pictures."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from icons.batch import Status
from icons.consensus.selection_file import manifest_path, open_selection
from icons.datamodules.conversation import ImageRef
from icons.datamodules.failed_row import FailedRowError
from icons.datamodules.images import ImageSource
from icons.datamodules.records import RecordError, RecordSource, open_records
from icons.output import check_output, is_marked, mark, put
from icons.report.build import Chosen, Pool, build
from icons.report.page import is_page, render, write_pictures
from icons.store import ScoreStore

console = Console()


def report(
    scores: str,
    selection: Path,
    data: Path,
    out: Path = Path("report.html"),
    images: Path | None = None,
    source_field: list[str] | None = None,
    comparison: Path | None = None,
    validation: Path | None = None,
    rows_shown: int = 4,
    title: str = "Selection report",
    png: bool = False,
    overwrite: bool = False,
) -> int:
    """Writes one self-contained HTML page about a selection: no script, nothing loaded from a network.

    Votes, scores per task with their thresholds, overlap of tasks, what the consensus keeps of each task's own
    selection, composition by source, the border with its error bars, the highest and lowest rows per task with text
    and image, and where everything came from.

    Args:
        scores: score store made by `icons influence` or `icons score`.
        selection: the selected data, or its manifest, made by `icons select` from these scores.
        data: the data file that the scores belong to.
        out: the page.
        images: folder (or .tar or .zip) of the records' images; without it the page shows texts only.
        source_field: field of the records to compare pool and selection by (a dotted name looks inside); again for
            further ones. Default: the first folder of the image's path.
        comparison: JSON file with accuracies after fine-tuning, as `icons demo` writes it.
        validation: JSON file about whether influence predicts, as `icons validate` writes it.
        rows_shown: highest and lowest rows shown for each task.
        title: the page's headline.
        png: also write every figure as a PNG, to the folder OUT_figures.
        overwrite: write --out, and OUT_figures, even where something lies that is no former report.
    """
    if rows_shown < 1:
        raise ValueError(f"--rows-shown {rows_shown}: expected at least 1")
    figures = out.with_name(f"{out.stem}_figures") if png else None
    inputs = {"--scores": scores, "--selection": [selection, manifest_path(selection)], "--data": data}
    inputs |= {"--comparison": comparison or [], "--validation": validation or []}
    common: dict[str, Any] = {"inputs": inputs, "searched": {"--images": images}, "overwrite": overwrite}
    check_output(out, kind="file", ours=is_page, **common)
    if figures is not None:
        own = partial(is_marked, command="report")
        check_output(figures, "--png", kind="folder", ours=own, **common)
    source = ImageSource(images)
    store, index = ScoreStore.open(scores), open_records(data)
    chosen = Chosen.of(open_selection(selection), store)
    check_data(chosen, index)
    page = build(
        store,
        chosen,
        Pool(data.name, lambda row: record(index, row), lambda image: open_image(source, image), images is not None),
        title=title,
        source_fields=source_field or [],
        num_ends=rows_shown,
        comparison_file=comparison,
        validation_file=validation,
    )
    put(out, render(page))
    console.print(f"{out}: {out.stat().st_size / 1e6:.1f} MB", soft_wrap=True)
    if figures is not None:
        mark(figures, "report")
        console.print(f"{figures}: {len(write_pictures(page, figures))} figures", soft_wrap=True)
    return 0


def check_data(chosen: Chosen, index: RecordSource) -> None:
    """Refuses a data file that the selection was not made from: its rows would be other records."""
    made_from = chosen.manifest["data"]
    for what, expected, got in (
        ("records", made_from["num_rows"], len(index)),
        ("the fingerprint", made_from["fingerprint"], index.fingerprint),
    ):
        if got != expected:
            raise ValueError(
                f"data {index.path}: has {what} {got}, the selection was made from {made_from['path']} with "
                f"{expected}; expected that file, unchanged"
            )


def record(index: RecordSource, row: int) -> Mapping[str, Any] | None:
    """A row's record; None for one that is not a JSON object."""
    try:
        found = index[row]
    except RecordError:
        return None
    return found if isinstance(found, Mapping) else None


def open_image(images: ImageSource, image: ImageRef) -> Image.Image:
    """An image as training sees it. One that is missing raises `FileNotFoundError`, a broken one `ValueError`."""
    try:
        return images.open(image)
    except FailedRowError as error:
        kind = FileNotFoundError if error.status == Status.IMAGE_MISSING else ValueError
        raise kind(str(error)) from error
