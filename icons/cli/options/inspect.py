"""Options of `icons inspect`."""

from dataclasses import dataclass
from typing import ClassVar

from icons.cli.options.groups import CheckpointOptions, DataOptions, PreprocessingOptions


@dataclass(frozen=True, kw_only=True)
class InspectOptions(DataOptions, PreprocessingOptions, CheckpointOptions):
    """Shows samples as the model sees them: which tokens are learned, where images stand, and which rows fail and why.

    $ icons inspect train.json --images images/ --model llava-1.5-7b-hf/
    $ icons inspect train.json --images images/ --checkpoint warmup/ --row 17 --row 4711

    Reads no weights. Exit status: 0 a sample could be made; 1 none could, or something you can mend, said in one line;
    2 wrong usage.
    """

    positional: ClassVar = ("data",)
    row: list[int] | None = None
    """show this row; repeat it for more. Default: --samples rows, evenly spaced"""
    samples: int = 3
    """how many rows to show"""
    scan: int = 100
    """how many rows, evenly spaced, to try for the counts of failures and lengths"""
