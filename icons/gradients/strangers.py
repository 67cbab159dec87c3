"""Strangers: modules that do not see the text, whatever they look like, since their rows are images.

A layer of a vision tower can look laid out as the batch is, and be so in one batch, while its rows are images. Its
input does not move when the text does. Whose its rows are is then for `icons.gradients.ownership` to say.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from icons.batch import IGNORE_INDEX, Batch
from icons.gradients.output_layer import SupervisedPositions
from icons.gradients.paths import Paths, is_text
from icons.gradients.structure import Members

_PIECE = 1 << 24  # numbers that are float64 at once


class Strangers:
    """What modules get when the text is moved by a token, or its embeddings are made longer; `compare` with what they
    get as it is writes down which see a difference."""

    def __init__(self, known: Paths, moved: dict[nn.Module, Tensor]) -> None:
        self.known, self.moved = known, moved
        self.still: dict[nn.Module, Tensor] = {}

    @classmethod
    def of(cls, model: nn.Module, batch: Batch, members: Members, known: Paths) -> "Strangers | None":
        """Runs the model over a text that is another. None if the batch is nothing but text, or all modules are known,
        or the text cannot be changed: then every parameter takes the slow path."""
        owners = [owner for owners in members.structure.owners.values() for owner in owners]
        modules = {members.modules[number] for owner in owners for number in (owner.module, owner.around)}
        if not known.kind[1] or all(module in known.sees_text for module in modules):
            return None
        try:
            return cls(known, _fingerprints(model, modules, _moved(batch)))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model says to a text whose last token is gone
            embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
            if embeddings is None:
                for name in members.trainable:
                    known.leave(name)
                return None
            handle = embeddings.register_forward_hook(lambda _module, _args, output: output * 1.5)
            try:
                return cls(known, _fingerprints(model, modules, batch))
            finally:
                handle.remove()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a forward pass over the batch as it is."""
        with _watching(self.moved) as self.still:
            yield

    def compare(self) -> None:
        for module, moved in self.moved.items():
            same = module in self.still and torch.allclose(self.still[module], moved, rtol=1e-6, atol=0)
            self.known.sees_text[module] = self.known.sees_text.get(module, True) and not same


def _moved(batch: Batch) -> Batch:
    """The batch with its text one place further right: another token at the beginning, none at the end."""
    shape, labels = batch["labels"].shape, batch["labels"]
    moved = dict(batch)
    for name, value in batch.items():
        if is_text(name, value, shape):
            moved[name] = torch.cat([value[:, :1], value[:, :-1]], dim=1)
    if "input_ids" in moved:
        moved["input_ids"][:, 0] = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX][0]
    return moved


def _fingerprints(model: nn.Module, modules: Iterable[nn.Module], batch: Batch) -> dict[nn.Module, Tensor]:
    with torch.no_grad(), _watching(modules) as prints:
        SupervisedPositions(model, batch["labels"]).run(model, batch)
    return prints


def _fingerprint(value: Tensor) -> Tensor:
    """In pieces, since a GPU's memory may be almost full."""
    total, begin = torch.zeros((), dtype=torch.float64, device=value.device), 0
    for piece in value.detach().flatten().split(_PIECE):
        ramp = torch.arange(begin, begin + len(piece), device=value.device, dtype=torch.float64) / value.numel() + 1
        total += piece.double().nan_to_num(0, 0, 0).abs() @ ramp
        begin += len(piece)
    return total


@contextmanager
def _watching(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """A number for what each module gets, in which the order of its numbers counts."""
    prints: dict[nn.Module, Tensor] = {}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((value for value in [*args, *kwargs.values()] if isinstance(value, Tensor)), None)
        if given is not None:
            prints[module] = prints.get(module, torch.zeros((), dtype=torch.float64)) + _fingerprint(given).cpu()

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(watch, with_kwargs=True).remove)
        yield prints
