"""Uses of weights counted in graphs that are written down by hand."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from icons.gradients.weight_edges import weight_edges


def test_every_read_of_a_leaf_counts() -> None:
    one, two, frozen = (torch.ones(2, requires_grad=wanted) for wanted in (True, True, False))
    shared = one * frozen
    found = weight_edges((shared * two).sum() + (shared + two * two).sum())
    assert found == {id(one): 1, id(two): 3}


def test_a_loss_without_a_graph_reads_nothing() -> None:
    assert weight_edges(torch.ones(3)) == {}


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpoints_hide_their_inside(reentrant: bool) -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
    found = weight_edges(checkpoint(layer, x, use_reentrant=reentrant).sum())
    assert found is None if reentrant else found is not None and found[id(layer.weight)] == 1
