"""Update directions against torch's own Adam, one step from the same state."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from icons.preconditioner import AdamPreconditioner, Sign


def warmed_up(steps: int, betas: tuple[float, float], eps: float) -> tuple[nn.Parameter, torch.optim.Adam]:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 5))
    optimizer = torch.optim.Adam([weight], lr=1e-3, betas=betas, eps=eps)
    for _ in range(steps):
        weight.grad = torch.randn(6, 5)
        optimizer.step()
    return weight, optimizer


def state_of(weight: nn.Parameter, optimizer: torch.optim.Adam) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    state = optimizer.state[weight]
    return {"w": state["exp_avg"].clone()}, {"w": state["exp_avg_sq"].clone()}, int(state["step"])


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize(("betas", "eps"), [((0.9, 0.999), 1e-8), ((0.8, 0.95), 1e-3), ((0.0, 0.9), 1e-8)])
def test_the_adam_form_is_the_step_that_adam_takes(steps: int, betas: tuple[float, float], eps: float) -> None:
    gradients = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1))
    adam = AdamPreconditioner(*state_of(*warmed_up(steps, betas, eps)), betas=betas, eps=eps)
    found = adam.apply("w", gradients.clone())
    for sample in range(3):
        weight, optimizer = warmed_up(steps, betas, eps)
        before = weight.detach().double().clone()
        optimizer.param_groups[0]["lr"] = 1.0
        weight.grad = gradients[sample]
        optimizer.step()
        torch.testing.assert_close(found[sample], (before - weight.detach()).float(), rtol=1e-4, atol=1e-5)


def test_the_diagonal_form_divides_by_the_root_of_the_second_moment() -> None:
    first, second, step = state_of(*warmed_up(20, (0.9, 0.999), 1e-8))
    gradient = torch.randn(3, 6, 5)
    expected = gradient / ((second["w"] / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(
        AdamPreconditioner(first, second, step, form="diagonal").apply("w", gradient.clone()), expected
    )


@pytest.mark.parametrize("form", ["adam", "diagonal", "sign"])
def test_signs_of_a_projector_are_folded_in(form: Any) -> None:
    state = state_of(*warmed_up(5, (0.9, 0.999), 1e-8))
    preconditioner = Sign() if form == "sign" else AdamPreconditioner(*state, form=form)
    gradient, sign = torch.randn(3, 6, 5), torch.randn(6, 5).sign()
    plain = preconditioner.apply("w", gradient.clone())
    for projector_sign in (sign, -sign, sign):  # one after the other: constants of one must not serve another
        found = preconditioner.apply("w", gradient.clone(), projector_sign)
        torch.testing.assert_close(found, plain * projector_sign)


def test_the_sign_form_is_the_sign_of_the_gradient() -> None:
    adam = AdamPreconditioner(*state_of(*warmed_up(5, (0.9, 0.999), 1e-8)), form="sign")
    gradient = torch.randn(3, 6, 5)
    assert torch.equal(adam.apply("w", gradient.clone()), gradient.sign())
    assert adam.describe() == Sign().describe()


def test_a_sample_never_changes_the_state() -> None:
    first, second, step = state_of(*warmed_up(5, (0.9, 0.999), 1e-8))
    adam = AdamPreconditioner(first, second, step)
    before, described = (first["w"].clone(), second["w"].clone()), adam.describe()
    adam.apply("w", torch.randn(3, 6, 5))
    assert torch.equal(first["w"], before[0])
    assert torch.equal(second["w"], before[1])
    assert adam.describe() == described


def test_bfloat16_moments_are_computed_with_in_float32() -> None:
    first, second, step = state_of(*warmed_up(5, (0.9, 0.999), 1e-8))
    half = [{"w": moment["w"].bfloat16()} for moment in (first, second)]
    whole = [{"w": moment["w"].float()} for moment in half]
    gradient = torch.randn(3, 6, 5)
    found = AdamPreconditioner(*half, step).apply("w", gradient.clone())
    assert torch.equal(found, AdamPreconditioner(*whole, step).apply("w", gradient.clone()))


def test_the_fingerprint_tells_states_apart() -> None:
    first, second, step = state_of(*warmed_up(5, (0.9, 0.999), 1e-8))
    described = AdamPreconditioner(first, second, step).describe()
    assert (described["form"], described["step"], described["betas"]) == ("adam", 5, [0.9, 0.999])
    other = AdamPreconditioner(first, {"w": second["w"] * 1.001}, step).describe()
    assert other["fingerprint"] != described["fingerprint"]
    assert Sign().describe() == {"form": "sign"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "sgd"}, "form 'sgd'; expected one of adam, diagonal, sign"),
        ({"step": 0}, "w: step 0; expected at least 1"),
        ({"exp_avg": {}}, r"name different parameters: \['w'\]"),
        ({"exp_avg": {"w": torch.zeros(2)}}, r"w: exp_avg has shape \(2,\), exp_avg_sq \(6, 5\)"),
    ],
)
def test_a_state_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    first, second, step = state_of(*warmed_up(5, (0.9, 0.999), 1e-8))
    with pytest.raises(ValueError, match=message):
        AdamPreconditioner(**{"exp_avg": first, "exp_avg_sq": second, "step": step} | changes)


def test_a_parameter_without_moments_is_refused_by_name() -> None:
    adam = AdamPreconditioner(*state_of(*warmed_up(5, (0.9, 0.999), 1e-8)))
    with pytest.raises(ValueError, match="no moments for the trainable parameter other"):
        adam.apply("other", torch.zeros(1, 2))


@pytest.mark.parametrize("name", ["form", "step", "betas", "exp_avg"])
def test_what_constants_are_made_from_cannot_be_changed_afterwards(name: str) -> None:
    adam = AdamPreconditioner({"w": torch.ones(2)}, {"w": torch.ones(2)}, step=3)
    with pytest.raises(AttributeError, match=rf"{name} is fixed once it is made; expected a new one"):
        setattr(adam, name, getattr(adam, name))
    adam.compiled = True
    other = dataclasses.replace(adam, form="diagonal")
    assert not torch.equal(other.apply("w", torch.ones(1, 2)), adam.apply("w", torch.ones(1, 2)))
