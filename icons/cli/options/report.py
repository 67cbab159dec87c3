"""Options of `icons report`."""

from dataclasses import dataclass
from pathlib import Path

from icons.cli.options.groups import ReadingOptions


@dataclass(frozen=True, kw_only=True)
class ReportOptions(ReadingOptions):
    """Writes one self-contained HTML page about a selection: no script, nothing loaded from a network.

    $ icons report --scores scores.zarr --selection selected.json --data train.json --images images/

    Votes, scores per task with their thresholds, overlap of tasks, what the consensus keeps of each task's own
    selection, composition by source, the border with its error bars, the highest and lowest rows per task with text
    and image, and where everything came from. Needs the extra `report`.
    """

    scores: str
    """score store made by `icons influence` or `icons score`"""
    selection: Path
    """the selected data, or its manifest, made by `icons select` from these scores"""
    data: Path
    """the data file that the scores belong to"""
    out: Path = Path("report.html")
    """the page to write"""
    images: Path | None = None
    """folder (or .tar or .zip) of the records' images; without it the page shows texts only"""
    source_field: list[str] | None = None
    """field of the records to compare pool and selection by (a dotted name looks inside); repeat it for further
    ones. Default: the first folder of the image's path"""
    comparison: Path | None = None
    """JSON file with accuracies after fine-tuning, as `icons demo` writes it"""
    validation: Path | None = None
    """JSON file about whether influence predicts, as `icons validate` writes it"""
    rows_shown: int = 4
    """highest and lowest rows shown for each task"""
    title: str = "Selection report"
    """the page's headline"""
    png: bool = False
    """also write every figure as a PNG, to the folder OUT_figures"""
    overwrite: bool = False
    """write --out, and OUT_figures, even if they hold something other than an earlier report"""
