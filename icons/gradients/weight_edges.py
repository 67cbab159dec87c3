"""Where the graph of a forward pass reads each weight: how uses outside a layer's own call are noticed."""

from collections import Counter

from torch import Tensor


def weight_edges(losses: Tensor) -> Counter[int] | None:
    """How often the graph of `losses` reads each leaf, by the leaf's id; None if parts of the graph are hidden.

    Reentrant gradient checkpoints hide their inside: it is recorded in the backward pass only.

    >>> weight = Tensor([1.0, 2.0]).requires_grad_()
    >>> weight_edges((weight * weight).sum() + weight.sum())[id(weight)]
    3
    """
    found: Counter[int] = Counter()
    waiting = [losses.grad_fn] if losses.grad_fn is not None else []
    known = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name() == "CheckpointFunctionBackward":
            return None
        for follower, _ in node.next_functions:
            leaf = getattr(follower, "variable", None)
            if leaf is not None:
                found[id(leaf)] += 1
            elif follower is not None and follower not in known:
                known.add(follower)
                waiting.append(follower)
    return found
