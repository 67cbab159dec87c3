"""Ids that are no tokens: refused in one line, where a GPU would end the process from inside a kernel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from icons.batch import id_bounds


@contextmanager
def tokens_alone(model: nn.Module) -> Iterator[None]:
    """Around a forward pass: looks at the ids that the input embeddings are asked for. A batch's own ids may have
    others, which a model puts images in place of.

    Raises:
        ValueError: there is no embedding of one.
    """
    embeddings = _input_embeddings(model)
    known = getattr(embeddings, "num_embeddings", None)
    if embeddings is None or not isinstance(known, int):
        yield
        return

    def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
            strange = next((one for one in id_bounds(args[0]) if not 0 <= one < known), None)
            if strange is not None:
                raise ValueError(
                    f"input_ids: {type(model).__name__} looks up {strange}; expected ids from 0 to {known - 1}, for "
                    "which it has embeddings: give it the tokenizer it was made with"
                )

    handle = embeddings.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that looks tokens up, if the model names it."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        found = find() if callable(find) else None
    except (AttributeError, NotImplementedError):  # what transformers' models say that have none
        return None
    return found if isinstance(found, nn.Module) else None
