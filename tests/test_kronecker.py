"""Kronecker factors against one gradient per sample and explicit inverses in numpy."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_models import llama, one_by_one, text_batch, trainable, with_lora
from torch import Tensor, nn

from icons.gradients import exact_influence, projected_gradients, scored_gradients
from icons.gradients.covariances import CovarianceSums, covariance_sums
from icons.gradients.per_sample import TaskMatrix
from icons.kronecker import KroneckerFactors, KroneckerPreconditioner
from icons.projection import CountSketch, Gaussian, Identity


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.named_parameters() if value.requires_grad}


def factors_of(model: nn.Module, width: int = 1024) -> KroneckerFactors:
    return KroneckerFactors.of(covariance_sums(model, text_batch((14, 11, 8, 13)), width), shapes_of(model))


def slow(model: nn.Module, batch: dict[str, Tensor], factors: KroneckerFactors, damping: float) -> Tensor:
    """Row by row, parameter by parameter, with `np.linalg.inv`."""
    shapes, rows = shapes_of(model), []
    for row in one_by_one(model, batch).double().numpy():
        parts, begin = [], 0
        for name, shape in shapes.items():
            block = row[begin : begin + shape.numel()].reshape(shape)
            begin += shape.numel()
            if name in factors.silent:
                parts.append(block.reshape(-1))
                continue
            if name in factors.left:
                for side in (factors.left[name], factors.right[name]):
                    moment = side.double().numpy() if side.ndim == 2 else np.diag(side.double().numpy())
                    mean = np.linalg.eigvalsh(moment).mean()
                    inverse = np.linalg.inv(moment / mean + damping * np.eye(len(moment)))
                    block = inverse @ block if side is factors.left[name] else block @ inverse
            parts.append((block / factors.square[name]).reshape(-1))
        rows.append(np.concatenate(parts))
    return torch.from_numpy(np.stack(rows))


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert ((found.double() - expected).norm(dim=1) <= tolerance * expected.norm(dim=1)).all()


@pytest.mark.parametrize("width", [1024, 32, 0])
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_an_update_is_the_gradient_divided_by_both_factors(width: int, damping: float) -> None:
    model, batch = with_lora(llama()), text_batch()
    factors = factors_of(model, width)
    found = projected_gradients(model, batch, Identity(), KroneckerPreconditioner(factors, damping))
    expected = slow(model, batch, factors, damping)
    assert_near(found.gradient, expected)
    torch.testing.assert_close(found.norm.double(), expected.norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("width", [1024, 32, 0])
def test_products_of_roots_are_those_of_a_whole_update_with_a_plain_gradient(width: int) -> None:
    model, batch = with_lora(llama()), text_batch()
    factors = factors_of(model, width)
    root = projected_gradients(model, batch, Identity(), KroneckerPreconditioner(factors, 0.1, root=True)).gradient
    expected = slow(model, batch, factors, 0.1) @ one_by_one(model, batch).double().mT
    products = root.double() @ root.double().mT
    assert (products - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("projector", [CountSketch(64), Gaussian(64)], ids=["count_sketch", "gaussian"])
def test_projections_are_those_of_the_update(projector: CountSketch | Gaussian) -> None:
    model, batch = with_lora(llama()), text_batch()
    kfac = KroneckerPreconditioner(factors_of(model))
    updates, shapes = slow(model, batch, kfac.factors, kfac.damping).float(), shapes_of(model)
    expected = projector.start(3, shapes, torch.device("cpu"))
    blocks = updates.split([shape.numel() for shape in shapes.values()], dim=1)
    for (name, shape), block in zip(shapes.items(), blocks, strict=True):
        signs = projector.sign(name, shape, torch.device("cpu"))
        projector.add(expected, name, block.unflatten(1, shape) * (1 if signs is None else signs))
    assert_near(projected_gradients(model, batch, projector, kfac).gradient, expected.double())


def test_exact_scores_are_those_of_the_update() -> None:
    model, batch = with_lora(llama()), text_batch()
    kfac, generator = KroneckerPreconditioner(factors_of(model)), torch.Generator().manual_seed(4)
    vector = {name: torch.randn(shape, generator=generator) for name, shape in shapes_of(model).items()}
    updates = slow(model, batch, kfac.factors, kfac.damping)
    flat = torch.cat([value.flatten() for value in vector.values()]).double()
    product, norm, _ = scored_gradients(model, batch, TaskMatrix(model, [vector]), kfac)
    torch.testing.assert_close(product[:, 0].double(), updates @ flat, rtol=1e-3, atol=1e-3 * float(norm.max()))
    cosine = exact_influence(model, batch, [vector], kfac)[:, 0].double()
    torch.testing.assert_close(cosine, updates @ flat / updates.norm(dim=1), rtol=1e-3, atol=1e-4)


def test_what_is_no_linear_layer_is_divided_by_its_mean_square_alone() -> None:
    model, batch = trainable(llama(), "v_proj layernorm"), text_batch()
    factors = factors_of(model)
    assert factors.unfactored == [name for name in shapes_of(model) if "norm" in name]
    found = projected_gradients(model, batch, Identity(), KroneckerPreconditioner(factors))
    assert_near(found.gradient, slow(model, batch, factors, 0.1))


def test_a_weight_that_is_an_embedding_too_has_no_factors() -> None:
    """What the output layer shows of it is not all that its gradient is made of."""
    model, batch = trainable(llama(tie_word_embeddings=True), "embed_tokens v_proj"), text_batch()
    factors = factors_of(model)
    assert factors.unfactored == [name for name in shapes_of(model) if "embed_tokens" in name]
    found = projected_gradients(model, batch, Identity(), KroneckerPreconditioner(factors))
    assert_near(found.gradient, slow(model, batch, factors, 0.1))


def test_a_weight_that_one_batch_has_not_shown_has_no_factors() -> None:
    model = trainable(llama(), "v_proj")
    sums, shapes = covariance_sums(model, text_batch()), shapes_of(model)
    first = next(iter(shapes))
    sums.unseen[first] = torch.tensor(1)
    assert KroneckerFactors.of(sums, shapes).unfactored == [first]


def test_rows_with_a_gradient_where_the_factors_have_none_are_not_finite() -> None:
    factors = KroneckerFactors({}, {}, {"w": 0.0}, rows=1)
    assert factors.silent == ["w"]
    found = KroneckerPreconditioner(factors).apply("w", torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    assert found[0].tolist() == [0.0, 0.0]
    assert found[1].isnan().any()


def test_layers_without_any_gradient_stay_without() -> None:
    """A fresh adapter's A has none, since its B is zero."""
    model, batch = with_lora(llama()), text_batch()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    factors = factors_of(model)
    assert factors.silent == [name for name in shapes_of(model) if "lora_A" in name]
    found = projected_gradients(model, batch, Identity(), KroneckerPreconditioner(factors))
    assert_near(found.gradient, slow(model, batch, factors, 0.1))


def test_a_factor_of_all_blocks_makes_no_difference_between_them() -> None:
    """Where a block's gradients are ten times as large, its updates are a tenth: units cancel as in an inverse."""
    model, batch = with_lora(llama()), text_batch()
    factors = factors_of(model)
    larger = KroneckerFactors(
        {name: 10 * value for name, value in factors.left.items()},
        {name: 10 * value for name, value in factors.right.items()},
        {name: 100 * value for name, value in factors.square.items()},
        factors.rows,
    )
    one, other = (
        projected_gradients(model, batch, Identity(), KroneckerPreconditioner(each)).gradient
        for each in (factors, larger)
    )
    torch.testing.assert_close(one, 100 * other, rtol=1e-4, atol=1e-4 * float(one.abs().max()))


def test_a_file_holds_the_same_bits_and_the_manifest(tmp_path: Path) -> None:
    factors = factors_of(with_lora(llama()), 32)
    factors = KroneckerFactors(factors.left, factors.right, factors.square, factors.rows, {"labels": "drawn"})
    factors.save(tmp_path / "factors.safetensors")
    found = KroneckerFactors.load(tmp_path / "factors.safetensors")
    assert found.fingerprint == factors.fingerprint
    assert found.manifest == {"labels": "drawn"}
    assert KroneckerPreconditioner(found).describe() == KroneckerPreconditioner(factors).describe()
    assert all(torch.equal(found.left[name], value) for name, value in factors.left.items())


def test_files_of_another_kind_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "factors.safetensors"
    with pytest.raises(ValueError, match=r"is not there; expected a file that `icons factors` wrote"):
        KroneckerFactors.load(file)
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"cannot be read \(.*\); expected a file that `icons factors` wrote"):
        KroneckerFactors.load(file)
    save_file({"w": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match="holds no Kronecker factors"):
        KroneckerFactors.load(file)
    factors_of(with_lora(llama())).save(file)
    content = bytearray(file.read_bytes())
    content[-3] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"has|have the fingerprint \w{16}, and were written with \w{16}"):
        KroneckerFactors.load(file)


def test_factors_of_no_row_and_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="none of 2 rows has a finite gradient"):
        KroneckerFactors.of(CovarianceSums(left_out=2), {})
    factors = KroneckerFactors({}, {}, {"a": 1.0}, rows=1)
    for damping in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=re.escape(f"damping {damping}; expected a number above 0")):
            KroneckerPreconditioner(factors, damping=damping)
    singular = KroneckerFactors({"a": torch.ones(2, 2)}, {}, {"a": 1.0}, rows=1)
    with pytest.raises(ValueError, match="damping 1e-20 is too small for factors of few rows, which have no inverse"):
        KroneckerPreconditioner(singular, damping=1e-20).apply("a", torch.ones(1, 2, 2))
    with pytest.raises(ValueError, match="no factors for the trainable parameter b; got those of 1 others"):
        KroneckerPreconditioner(factors).apply("b", torch.zeros(1, 2))


def test_a_sample_never_changes_the_factors() -> None:
    factors = factors_of(with_lora(llama()))
    kfac, before = KroneckerPreconditioner(factors), factors.fingerprint
    for name in factors.left:
        kfac.apply(name, torch.randn(2, len(factors.left[name]), len(factors.right[name])))
    assert factors.fingerprint == before
