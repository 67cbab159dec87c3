"""Validation tasks from public benchmarks: each one's published files -> LLaVA JSON (`icons tasks`)."""

from icons.datamodules.tasks.benchmark import Benchmark, BuiltTask, build
from icons.datamodules.tasks.conversation import CONVERSATION
from icons.datamodules.tasks.documents import DOCUMENTS
from icons.datamodules.tasks.natural_images import NATURAL_IMAGES
from icons.datamodules.tasks.options import OPTIONS
from icons.datamodules.tasks.yes_no import YES_NO

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (*NATURAL_IMAGES, *OPTIONS, *YES_NO, *CONVERSATION, *DOCUMENTS)
}
"""By name. The paper's ten tasks, and its unseen ones."""

__all__ = ["BENCHMARKS", "Benchmark", "BuiltTask", "build"]
