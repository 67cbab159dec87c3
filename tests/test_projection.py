"""Projections: fixed by (seed, name, position), unbiased, with the variance of dense signs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from icons.projection import ConcatProjector, CountSketch, Gaussian, Identity, Rademacher

KINDS = [CountSketch, Rademacher, Gaussian]
SHAPES = {"q.lora_A": torch.Size([8, 48]), "q.lora_B": torch.Size([96, 8]), "bias": torch.Size([40])}


def project(projector: Any, blocks: dict[str, Tensor]) -> Tensor:
    shapes = {name: block.shape[1:] for name, block in blocks.items()}
    total = projector.start(len(next(iter(blocks.values()))), shapes, torch.device("cpu"))
    for name, block in blocks.items():
        sign = projector.sign(name, block.shape[1:], block.device)
        projector.add(total, name, block.clone() if sign is None else block * sign)
    return total


def matrix(projector: Any, shapes: dict[str, torch.Size]) -> Tensor:
    """The map as a `[P, K]` matrix, from the projections of all unit vectors."""
    count = sum(shape.numel() for shape in shapes.values())
    pieces = torch.eye(count).split([shape.numel() for shape in shapes.values()], dim=1)
    blocks = {name: piece.reshape(-1, *shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
    return project(projector, blocks)


PINNED = {
    "count_sketch": [-2817.0, -3336.0, -2660.0, -1133.0, -4588.0, 757.0, 1420.0, -4321.0],
    "rademacher": [8110.5161, -3868.582, -1362.5946, 2078.8945, -801.8586, 3474.0151, -3565.231, 1219.0511],
    "gaussian": [397.5394, 6769.8325, 4637.3857, -14008.3496, -193.1684, 6621.9609, -6342.4673, -30.2149],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_is_pinned(kind: Any) -> None:
    """Stores outlive versions: a row written today must be comparable with one written by a later release."""
    blocks = {name: torch.arange(1.0, shape.numel() + 1).reshape(1, *shape) for name, shape in SHAPES.items()}
    found = project(kind(8, seed=3), blocks)[0]
    torch.testing.assert_close(found, torch.tensor(PINNED[kind.kind]), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_is_linear_and_the_same_whatever_the_batch_and_the_order(kind: Any) -> None:
    rows = {name: torch.randn(5, *shape) for name, shape in SHAPES.items()}
    whole = project(kind(64), rows)
    single = project(kind(64), {name: block[2:3] for name, block in reversed(rows.items())})
    torch.testing.assert_close(whole[2:3], single, rtol=1e-4, atol=1e-5)
    flat = torch.cat([block.flatten(1) for block in rows.values()], dim=1)
    torch.testing.assert_close(whole, flat @ matrix(kind(64), SHAPES), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_or_name_is_another_map(kind: Any) -> None:
    block = torch.randn(1, 8, 48)
    maps = [project(kind(64, seed), {name: block}) for seed, name in ((0, "a"), (1, "a"), (0, "b"))]
    assert not torch.allclose(maps[0], maps[1])
    assert not torch.allclose(maps[0], maps[2])


@pytest.mark.parametrize("kind", [Rademacher, Gaussian])
def test_dense_matrices_do_not_depend_on_how_rows_are_batched(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import icons.projection

    monkeypatch.setattr(icons.projection, "DENSE_BLOCK", 64 * 10)  # ten rows of the matrix at a time
    found = matrix(kind(64), {"w": torch.Size([7, 9])})
    assert len(found.unique(dim=0)) == 63


def test_the_signs_of_a_count_sketch_are_one_per_entry_of_the_map() -> None:
    found = matrix(CountSketch(64), SHAPES)
    assert torch.equal((found != 0).sum(dim=1), torch.ones(len(found), dtype=torch.int64))
    assert torch.equal(found.abs().sum(dim=1), torch.ones(len(found)))


def plain_pair(generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    shapes = {"a": (16, 96), "b": (96, 16), "c": (16, 256), "d": (256, 16)}
    one = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    two = {name: 0.5 * value + torch.randn(value.shape, generator=generator) for name, value in one.items()}
    return one, two


def outlier_pair(generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Four columns, the same in every row, carry nearly all of the weight, as features of large language models do."""
    one, two = plain_pair(generator)
    for pair in (one, two):
        for name in ("a", "c"):
            pair[name][:, [3, 17, 40, 90]] *= 30
    return one, two


def low_rank_pair(generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of linear layers: sums of few outer products, the two sharing inputs."""
    left, right = plain_pair(generator)
    one, two = {}, {}
    for name, value in left.items():
        x = torch.randn(4, value.shape[1], generator=generator)
        near = x + 0.5 * torch.randn(x.shape, generator=generator)
        one[name], two[name] = value[:, :4] @ x, right[name][:, :4] @ near
    return one, two


@pytest.mark.parametrize("make", [plain_pair, outlier_pair, low_rank_pair])
def test_a_count_sketch_is_unbiased_with_the_variance_of_dense_signs(make: Callable[..., Any]) -> None:
    """Over seeds: mean <a, b>, variance within 10 % (and the error of its estimate) of (|a|^2|b|^2 + <a,b>^2) / K."""
    dim, num_seeds, errors = 256, 1500, []
    one, two = make(torch.Generator().manual_seed(0))
    both = {name: torch.stack([one[name], two[name]]) for name in one}
    a, b = torch.cat([block.flatten(1) for block in both.values()], dim=1)
    inner, size = float(a @ b), float(a @ a) * float(b @ b)
    for seed in range(num_seeds):
        rows = project(CountSketch(dim, seed), both)
        errors.append((float(rows[0] @ rows[1]) - inner) / ((size + inner**2) / dim) ** 0.5)
    error = torch.tensor(errors)
    assert abs(error.mean()) < 4 / num_seeds**0.5
    assert error.square().mean() < 1.1 + 2 * (2 / num_seeds) ** 0.5


def test_identity_lays_parameters_one_after_the_other() -> None:
    rows = {name: torch.randn(2, *shape) for name, shape in SHAPES.items()}
    assert torch.equal(project(Identity(), rows), torch.cat([block.flatten(1) for block in rows.values()], dim=1))


def test_several_projections_are_each_as_if_alone() -> None:
    rows = {name: torch.randn(2, *shape) for name, shape in SHAPES.items()}
    parts = [CountSketch(16), CountSketch(64, seed=2), Rademacher(8), Identity()]
    several = ConcatProjector(parts)
    found = several.split(project(several, rows))
    for projector, part in zip(parts, found, strict=True):
        torch.testing.assert_close(part, project(projector, rows))
    assert several.dim == 16 + 64 + 8 + 1192
    assert [part["kind"] for part in several.describe()["parts"]][:2] == ["count_sketch", "count_sketch"]


def test_a_projector_describes_itself() -> None:
    assert CountSketch(512, seed=7).describe() == {"kind": "count_sketch", "dim": 512, "seed": 7}
    assert repr(Gaussian(4)) == "Gaussian(dim=4, seed=0)"
    identity = Identity()
    identity.start(1, SHAPES, torch.device("cpu"))
    assert identity.describe() == {"kind": "identity", "dim": 8 * 48 + 96 * 8 + 40, "seed": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_dim_below_one_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"dim 0; expected at least 1"):
        kind(0)
