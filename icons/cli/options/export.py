"""Options of `icons export`."""

from dataclasses import dataclass
from pathlib import Path

from icons.choices import Layout, WrittenDtype
from icons.cli.options.groups import CheckpointOptions


@dataclass(frozen=True, kw_only=True)
class ExportOptions(CheckpointOptions):
    """Merges the adapter into the model and writes it as one folder.

    $ icons export --checkpoint final/ --out merged/
    $ icons export --checkpoint final/ --out llava-icons/ --format llava
    """

    out: Path
    """a new folder; for LLaVA's own scripts its name must contain `llava`"""
    format: Layout = "huggingface"
    """huggingface, for transformers, vLLM and lmms-eval; llava, for LLaVA's own evaluation scripts"""
    dtype: WrittenDtype = "stored"
    """number format of the written weights; stored: as in the base model"""
    overwrite: bool = False
    """write --out even if it holds something other than an earlier export; its weights are replaced"""
