"""`icons report`: score store and selection -> one HTML page with pictures."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from PIL import Image

from icons.batch import Status
from icons.cli.console import console
from icons.cli.options.report import ReportOptions
from icons.consensus.selection_file import manifest_path, open_selection
from icons.datamodules.conversation import ImageRef
from icons.datamodules.dialects import dialect_named
from icons.datamodules.failed_row import FailedRowError
from icons.datamodules.images import ImageSource
from icons.datamodules.records import RecordError, RecordSource, open_records
from icons.output import check_output, is_marked, mark, put
from icons.report.build import Chosen, Pool, build
from icons.report.page import is_page, render, write_pictures
from icons.store import ScoreStore
from icons.terminal import counted


def report(options: ReportOptions) -> int:
    """Writes one self-contained HTML page about a selection: no script, nothing loaded from a network."""
    if options.rows_shown < 1:
        raise ValueError(f"--rows-shown {options.rows_shown}: expected at least 1")
    figures = options.out.with_name(f"{options.out.stem}_figures") if options.png else None
    inputs = {
        "--scores": options.scores,
        "--selection": [options.selection, manifest_path(options.selection)],
        "--data": options.data,
    }
    inputs |= {"--comparison": options.comparison or [], "--validation": options.validation or []}
    common: dict[str, Any] = {
        "inputs": inputs,
        "searched": {"--images": options.images},
        "overwrite": options.overwrite,
    }
    check_output(options.out, kind="file", ours=is_page, **common)
    if figures is not None:
        own = partial(is_marked, command="report")
        check_output(figures, "--png", kind="folder", ours=own, **common)
    source = ImageSource(options.images, options.allow_paths or (), options.web_images)
    store, index = ScoreStore.open(options.scores), open_records(options.data)
    chosen = Chosen.of(open_selection(options.selection), store)
    check_data(chosen, index)
    page = build(
        store,
        chosen,
        Pool(
            options.data.name,
            lambda row: record(index, row),
            lambda image: open_image(source, image),
            options.images is not None,
            dialect_named(options.dialect),
        ),
        title=options.title,
        source_fields=options.source_field or [],
        num_ends=options.rows_shown,
        comparison_file=options.comparison,
        validation_file=options.validation,
    )
    put(options.out, render(page))
    console.print(f"{options.out}: {options.out.stat().st_size / 1e6:.1f} MB", soft_wrap=True)
    if figures is not None:
        mark(figures, "report")
        console.print(f"{figures}: {counted(len(write_pictures(page, figures)), 'figure')}", soft_wrap=True)
    return 0


def check_data(chosen: Chosen, index: RecordSource) -> None:
    """Refuses a data file that the selection was not made from: its rows would be other records."""
    made_from = chosen.facts.data
    for what, expected, got in (
        ("{:,} records", made_from.num_rows, len(index)),
        ("the fingerprint {}", made_from.fingerprint, index.fingerprint),
    ):
        if got != expected:
            raise ValueError(
                f"data {index.path}: has {what.format(got)}, the selection was made from {made_from.path} with "
                f"{what.format(expected)}; expected that file, unchanged"
            )


def record(index: RecordSource, row: int) -> Mapping[str, Any] | None:
    """A row's record; None for one that is not a JSON object."""
    try:
        content = index[row]
    except RecordError:
        return None
    return content if isinstance(content, Mapping) else None


def open_image(images: ImageSource, image: ImageRef) -> Image.Image:
    """An image as training sees it. One that is missing raises `FileNotFoundError`, a broken one `ValueError`."""
    try:
        return images.open(image)
    except FailedRowError as error:
        kind = FileNotFoundError if error.status == Status.IMAGE_MISSING else ValueError
        raise kind(str(error)) from error
