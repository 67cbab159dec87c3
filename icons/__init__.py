"""ICONS: pick the training data a vision-language model really needs (influence consensus, arXiv 2501.00654).

The pipeline by name, in the order of the method:

    modules/warmup.py       LoRA warm-up on a small part of the data; Adam's moments are kept
    gradients/              per-sample gradients from one batched backward pass, streamed through
    preconditioner.py         the step Adam would take (or kronecker.py, what a curvature divides by), and
    projection.py             a seeded random projection P -> K, into
    store/                  one Zarr array per data set: row i is record i, always
    scores/                 influence: per task, each training row's mean cosine similarity with the validation rows
    consensus/              each task votes for its top share; the rows with most votes are the selection

Around them: datamodules/ (records, images, conversations), models/ (folders, loading, LoRA, Adam's state, export),
validation/ (does influence predict?), report/ (pictures and the page), cli/ (the `icons` command), demo/.

Names are loaded when they are first used, so that `import icons` imports neither torch nor anything else that is slow.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icons.consensus import Selection as Selection
    from icons.consensus import select as select
    from icons.datamodules.datamodule import ConversationDataModule as ConversationDataModule
    from icons.gradients import exact_influence as exact_influence
    from icons.gradients import per_sample_gradients as per_sample_gradients
    from icons.gradients import projected_gradients as projected_gradients
    from icons.kronecker import KroneckerPreconditioner as KroneckerPreconditioner
    from icons.models.adam_state import load_adam_state as load_adam_state
    from icons.models.saved_factors import load_factors as load_factors
    from icons.modules.extractor import GradientExtractor as GradientExtractor
    from icons.modules.gradient_writer import GradientWriter as GradientWriter
    from icons.modules.metrics import ConsensusVotes as ConsensusVotes
    from icons.modules.metrics import RelativePerformance as RelativePerformance
    from icons.modules.metrics import TaskOverlap as TaskOverlap
    from icons.modules.warmup import WarmupModule as WarmupModule
    from icons.preconditioner import AdamPreconditioner as AdamPreconditioner
    from icons.projection import CountSketch as CountSketch
    from icons.projection import Gaussian as Gaussian
    from icons.projection import Identity as Identity
    from icons.projection import Rademacher as Rademacher
    from icons.scores import influence as influence
    from icons.store import GradientStore as GradientStore
    from icons.store import ScoreStore as ScoreStore

_HOME = {
    "AdamPreconditioner": "icons.preconditioner",
    "ConsensusVotes": "icons.modules.metrics",
    "ConversationDataModule": "icons.datamodules.datamodule",
    "CountSketch": "icons.projection",
    "Gaussian": "icons.projection",
    "GradientExtractor": "icons.modules.extractor",
    "GradientStore": "icons.store",
    "GradientWriter": "icons.modules.gradient_writer",
    "Identity": "icons.projection",
    "KroneckerPreconditioner": "icons.kronecker",
    "Rademacher": "icons.projection",
    "RelativePerformance": "icons.modules.metrics",
    "ScoreStore": "icons.store",
    "Selection": "icons.consensus",
    "TaskOverlap": "icons.modules.metrics",
    "WarmupModule": "icons.modules.warmup",
    "exact_influence": "icons.gradients",
    "influence": "icons.scores",
    "load_adam_state": "icons.models.adam_state",
    "load_factors": "icons.models.saved_factors",
    "per_sample_gradients": "icons.gradients",
    "projected_gradients": "icons.gradients",
    "select": "icons.consensus",
}
__all__ = [*_HOME]
logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent until somebody listens


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'icons' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
