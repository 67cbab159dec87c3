"""Options of `icons select`."""

from dataclasses import dataclass, field
from pathlib import Path

_BUDGET, SOURCES, PAIRS = {"group": "budget"}, {"group": "sources"}, {"group": "gradients to look at"}


@dataclass(frozen=True, kw_only=True)
class SelectOptions:
    """Selects the rows that help most tasks at once, and writes them in the data file's own form and order.

    $ icons select --scores scores.zarr --data train.json --fraction 0.2 --out selected.json

    Beside --out lies its manifest (OUT.manifest.json), with the selected rows and what they were selected by. Rows
    that failed are never selected. Exit status: 0; 1 something you can mend, said in one line; 2 wrong usage.
    """

    scores: str
    """score store made by `icons influence` or `icons score`"""
    data: Path
    """the data that the scores belong to, in any form that --data takes"""
    dialect: str = field(default="auto", metadata={"choices": "dialects"})
    """how the records are written, for --format and the composition. {dialects}"""
    out: Path
    """the selected records in the data's own form (of JSON byte for byte), with their rows (OUT.rows.npy) and ids
    (OUT.ids.txt) beside them"""
    fraction: float | None = None
    """share of the rows to select; default: 0.2"""
    method: str = field(default="vote", metadata={"choices": "rules", "or": r"[\w.]+:\w+"})
    """the rule. {rules}. Or MODULE:FUNCTION, a function of your own that takes the score store and gives rows, the best
    first"""
    option: list[str] | None = None
    """NAME=NUMBER, an option of the rule; repeat it for each. {rule options}"""
    seed: int = 0
    """seed of the rules that draw at random"""
    table: Path | None = None
    """also write a table of all rows (.csv or .parquet), the selected first and the best first among them: rank, row,
    id, selected, status, votes, score, each task's influence"""
    format: str | None = field(default=None, metadata={"choices": "training formats"})
    """write --out as a folder for another tool, with a data-set card, instead of in the data file's own form.
    {training formats}"""
    images: Path | None = None
    """with --format, the folder that relative image names start from; without it they stay relative"""
    num_rows: int | None = field(default=None, metadata=_BUDGET)
    """rows to select, in place of --fraction"""
    vote_fraction: float | None = field(default=None, metadata=_BUDGET)
    """share of the rows that each task votes for; default: the selected share"""
    weight: list[str] | None = field(default=None, metadata=_BUDGET)
    """TASK=NUMBER, the weight of a task; repeat it for each"""
    task_quota: list[str] | None = field(default=None, metadata=_BUDGET)
    """TASK=SHARE, at least this share of the selection from rows the task votes for; repeat it for each"""
    max_tokens: int | None = field(default=None, metadata=_BUDGET)
    """supervised tokens of the whole selection, at most"""
    include: Path | None = field(default=None, metadata=_BUDGET)
    """file of rows that are always in: row numbers, one a line (.txt), or a JSON list of row numbers, of ids, or of
    records with ids"""
    exclude: Path | None = field(default=None, metadata=_BUDGET)
    """file of rows that are never in, in the same forms"""
    source_field: str | None = field(default=None, metadata=SOURCES)
    """field of the records that names their source; a dotted name looks inside. Default: the first folder of the
    image's path"""
    source_weight: list[str] | None = field(default=None, metadata=SOURCES)
    """SOURCE=NUMBER, factor on the votes of a source's rows; repeat it for each"""
    source_quota: list[str] | None = field(default=None, metadata=SOURCES)
    """SOURCE=SHARE, at most this share of the selection from a source; repeat it for each"""
    near_duplicates: float | None = field(default=None, metadata=PAIRS)
    """leave out rows whose gradient has at least this cosine with a better selected row's"""
    train: list[str] | None = field(default=None, metadata=PAIRS)
    """gradient store of the training data, for --near-duplicates and rules that read single validation rows; repeat it
    for each checkpoint; default: those the scores were made from"""
    task: list[str] | None = field(default=None, metadata=PAIRS)
    """NAME=STORE, gradient store of a task's validation rows, for rules that read single ones; several checkpoints:
    NAME=STORE1,STORE2; default: those the scores were made from"""
    health: bool = True
    """say what the scores themselves tell of the selection: validation rows it hurts, redundancy, composition, each
    against random rows; one pass over the gradients"""
    overwrite: bool = False
    """write --out and --table even if they hold something other than an earlier selection, unedited"""
