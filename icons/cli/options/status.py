"""Options of `icons status`."""

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Prints the rows done, failed (with reasons) and missing, and the manifest.

    $ icons status train.zarr
    $ sbatch --array=$(icons status train.zarr --missing) gradients.sh
    """

    positional: ClassVar = ("store",)
    store: str
    """gradient or score store: a folder, or a URL"""
    missing: bool = False
    """print only the indices I for which `--shard I/N` still has work, as SLURM's --array takes them (0-3,7);
    nothing if all is done"""
    shards: int | None = field(default=None, metadata={"least": 1})
    """N of these array jobs; default: as in the run that made the store, or else one job per unit"""
    as_json: bool = False
    """print all of it as JSON"""
