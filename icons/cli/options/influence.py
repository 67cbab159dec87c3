"""Options of `icons influence`."""

from dataclasses import dataclass, field

from icons.choices import Normalize
from icons.cli.options.groups import RUN, STORE, TaskOptions


@dataclass(frozen=True, kw_only=True)
class InfluenceOptions(TaskOptions):
    """Scores every training row on every task: the mean cosine of their gradients. The same line, run again, resumes.

    $ icons influence --train train.zarr --task gqa=gqa.zarr --task pope=pope.zarr --out scores.zarr

    Exit status: 0 all rows are scored; 1 something you can mend, said in one line; 2 wrong usage.
    """

    train: list[str]
    """gradient store of the training data; repeat it for further checkpoints"""
    task: list[str]
    """NAME=STORE, a task and the gradient store of its validation rows; repeat it for each task. Several
    checkpoints: NAME=STORE1,STORE2 in the order of --train"""
    out: str
    """the score store: a folder, or a URL (s3://bucket/name)"""
    normalize: Normalize = "projected"
    """divide each training row by its projected norm (the original, and LESS), by its exact norm, or by nothing"""
    task_normalize: Normalize | None = None
    """the same for validation rows; default: as for training rows"""
    weights: list[float] | None = None
    """a weight for each --train (LESS: the checkpoints' learning rates); default: the mean"""
    pairwise: bool = False
    """also store each training row's product with each single validation row"""
    top_pairs: int = 0
    """keep this many of the strongest validation rows for each training row and task, which show why it scores so"""
    preconditioned_tasks: bool = False
    """accept task rows that went through a preconditioner, as training rows do; otherwise they are refused"""
    chunk_rows: int | None = field(default=None, metadata=STORE)
    """rows per chunk of the score store, the unit of writing and resuming; default: about 16,000"""
    accelerator: str = field(default="auto", metadata=RUN)
    """where the products are computed (Lightning: auto, cpu, gpu, ...)"""
    devices: str = field(default="1", metadata=RUN)
    """number of devices or processes per machine, or a list of them"""
    num_nodes: int = field(default=1, metadata=RUN)
    """number of machines"""
    strategy: str = field(default="auto", metadata=RUN)
    """Lightning Fabric's strategy"""
    overwrite: bool = field(default=False, metadata=RUN)
    """write --out even if it holds something else; a score store made with other settings is replaced"""
