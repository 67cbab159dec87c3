"""Shared by all tests: no network, one thread (bit-exact sums), no Lightning advertising; tiny LLaVAs.

One of them the original code made, with its ids, losses and gradients; one transformers.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from icons.cli.console import ConsoleHandler, console
from icons.models.folder import ModelFolder

DATA = Path(__file__).parent / "data" / "original_llava"

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell leaves it for what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# a busy machine fails nothing, and one commit has one result
settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def of_the_process() -> dict[str, Any]:
    """What belongs to the whole process, and so to every test that comes later."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    return {
        "working directory": Path.cwd(),
        "signal handlers": [signal.getsignal(one) for one in signals],
        "default dtype": torch.get_default_dtype(),
        "gradient mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "process group": torch.distributed.is_initialized(),
        "root logger": (logging.root.level, list(logging.root.handlers)),
    }


@pytest.fixture(autouse=True)
def leaves_the_process_as_it_was() -> Iterator[None]:
    """No test depends on those before it: the order in which workers take them is not ours.

    What a command sets for its process, which ends with it, is put back: the environment, its console on the library's
    log. What only a fault leaves behind fails.
    """
    before, environment, logger = of_the_process(), dict(os.environ), logging.getLogger("icons")
    told = logger.level, list(logger.handlers), console.quiet
    yield
    left = [one for one in logger.handlers if one not in told[1] and not isinstance(one, ConsoleHandler)]
    logger.setLevel(told[0])
    logger.handlers, console.quiet = told[1:]
    os.environ.clear()
    os.environ.update(environment)
    assert of_the_process() == before
    assert not left, f"left on the library's log: {left}"


@pytest.fixture
def original() -> Path:
    """Folder with `vicuna-tiny`, `clip`, `mm_projector.bin`, `llava-tiny-lora`, images and data."""
    return DATA


@pytest.fixture
def llava() -> ModelFolder:
    return ModelFolder.open(DATA / "vicuna-tiny", DATA / "clip", DATA / "mm_projector.bin")


@pytest.fixture
def adapter() -> Path:
    return DATA / "llava-tiny-lora"


@pytest.fixture(scope="session")
def expected() -> dict[str, Tensor]:
    """`<sample>.input_ids`, `.labels`, `.images`, `.loss` and `.grad.<name>`, as the original code computed them."""
    return load_file(DATA / "expected.safetensors")


@pytest.fixture
def make_batch(expected: dict[str, Tensor]) -> Callable[..., dict[str, Any]]:
    """The original's samples as one batch: images expanded, right-padded."""

    def make(samples: Sequence[int], image_token: int = -200, features: int = 16) -> dict[str, Any]:
        rows, pixels = [], []
        for sample in samples:
            ids, labels = expected[f"{sample}.input_ids"][0], expected[f"{sample}.labels"][0]
            wide = [[image_token] * features if token == -200 else [token] for token in ids.tolist()]
            marked = [
                [-100] * len(part) if len(part) > 1 else [label]
                for part, label in zip(wide, labels.tolist(), strict=True)
            ]
            rows.append((list(chain(*wide)), list(chain(*marked))))
            if -200 in ids:
                pixels.append(expected[f"{sample}.images"])
        length = max(len(ids) for ids, _ in rows)
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
            "row": torch.tensor(list(samples)),
        }
        return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})

    return make


@pytest.fixture
def huggingface_llava(tmp_path: Path) -> Path:
    """A tiny LLaVA as transformers saves it, with its image token (id 99) in the vocabulary."""
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=100,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
        image_token_index=99,
        image_seq_length=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "hf-llava")
    return tmp_path / "hf-llava"
