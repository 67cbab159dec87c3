"""Validation tasks from public benchmarks: each one's published files -> LLaVA JSON (`icons tasks`)."""

from icons.datamodules.benchmarks.benchmark import Benchmark, BuiltTask, build
from icons.datamodules.benchmarks.conversation import CONVERSATION
from icons.datamodules.benchmarks.documents import DOCUMENTS
from icons.datamodules.benchmarks.natural_images import NATURAL_IMAGES
from icons.datamodules.benchmarks.options import OPTIONS
from icons.datamodules.benchmarks.yes_no import YES_NO

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (*NATURAL_IMAGES, *OPTIONS, *YES_NO, *CONVERSATION, *DOCUMENTS)
}
"""By name. The paper's ten tasks, and its unseen ones."""

__all__ = ["BENCHMARKS", "Benchmark", "BuiltTask", "build"]
