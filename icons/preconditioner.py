"""Adam state -> per-sample update direction: what a sample's gradient becomes before it is projected.

Training rows hold the step that Adam would take on the sample alone, starting from the warm-up's moments; validation
rows hold the plain gradient (LESS, Xia et al. 2024, section 3.2; arXiv 2501.00654, section 3). A sample never changes
the state, so that a row depends on no other row.
"""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

FORMS = ("adam", "diagonal", "sign")
UNCOMPILED: set[str] = set()  # kinds of device for which `torch.compile` found no compiler


@runtime_checkable
class Preconditioner(Protocol):
    """Turns per-sample gradients of one parameter into update directions."""

    def apply(
        self, name: str, gradient: Float[Tensor, " batch *shape"], sign: Float[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, " batch *shape"]:
        """The update direction times `sign`; may overwrite `gradient`."""
        ...

    def describe(self) -> dict[str, Any]:
        """This preconditioner's part of the manifest."""
        ...


@dataclass(frozen=True)
class Sign:
    """The sign of each gradient entry: +1, -1, or 0 where the gradient is 0 (`sign` in the original's options)."""

    def apply(
        self, name: str, gradient: Float[Tensor, " batch *shape"], sign: Float[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, " batch *shape"]:
        """The signs of `gradient`, in place.

        >>> Sign().apply("w", torch.tensor([[-3.0, 0.0, 2.0]])).tolist()
        [[-1.0, 0.0, 1.0]]
        """
        gradient = gradient.sign_()
        return gradient if sign is None else gradient.mul_(sign)

    def describe(self) -> dict[str, Any]:
        return {"form": "sign"}


@dataclass
class AdamPreconditioner:
    """Adam's step on one sample, from a fixed state.

    `form="adam"` (LESS, section 3.2): with t = step + 1 and the state m, v of the warm-up,

        m' = beta1 m + (1 - beta1) g,  v' = beta2 v + (1 - beta2) g^2
        update = (m' / (1 - beta1^t)) / (sqrt(v' / (1 - beta2^t)) + eps)

    `form="diagonal"`: update = g / (sqrt(v / (1 - beta2^step)) + eps), linear in g.

    `form="sign"`: the sign of g; the state is not used (`Sign` needs none).

    Neither learning rate nor weight decay enters: cosines do not see the first, and the second is no gradient.

    Args:
        exp_avg: first moment per parameter name, any float dtype; kept as float32.
        exp_avg_sq: second moment per parameter name, same shapes.
        step: optimizer steps taken; one number, or one per name.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
        form: "adam", "diagonal" or "sign".
        compiled: fuse the steps of "adam" into one pass over memory with `torch.compile`. On 2 CPU cores it halves the
            step's time, about 3 % of a whole pass, for 20 s of compiling: for long runs.

    Raises:
        ValueError: names or shapes of the moments differ, step is below 1, or the form is unknown.
    """

    exp_avg: Mapping[str, Tensor]
    exp_avg_sq: Mapping[str, Tensor]
    step: int | Mapping[str, int]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    form: str = "adam"
    compiled: bool = False
    ready: dict[tuple[str, torch.device], tuple[Tensor | None, tuple[Tensor, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"AdamPreconditioner: form {self.form!r}; expected one of {', '.join(FORMS)}")
        if set(self.exp_avg) != set(self.exp_avg_sq):
            odd = sorted(set(self.exp_avg) ^ set(self.exp_avg_sq))
            raise ValueError(f"AdamPreconditioner: exp_avg and exp_avg_sq name different parameters: {odd[:3]}")
        for name, moment in self.exp_avg.items():
            if moment.shape != self.exp_avg_sq[name].shape:
                raise ValueError(
                    f"AdamPreconditioner: {name}: exp_avg has shape {tuple(moment.shape)}, exp_avg_sq "
                    f"{tuple(self.exp_avg_sq[name].shape)}; expected the same"
                )
            if self.step_of(name) < 1:
                raise ValueError(
                    f"AdamPreconditioner: {name}: step {self.step_of(name)}; expected at least 1: the optimizer has "
                    "not moved yet, so there are no moments to precondition with"
                )

        self.made = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Only `compiled` may be set later: of everything else, prepared constants would keep the old value.

        Raises:
            AttributeError: another attribute is set.
        """
        if getattr(self, "made", False) and name != "compiled":
            raise AttributeError(
                f"AdamPreconditioner: {name} is fixed once it is made; expected a new one: dataclasses.replace(state, "
                f"{name}=...)"
            )
        object.__setattr__(self, name, value)

    def step_of(self, name: str) -> int:
        return int(self.step if not isinstance(self.step, Mapping) else self.step[name])

    def moments(self, name: str, sign: Tensor | None, device: torch.device) -> tuple[Tensor, ...]:
        """The constants of `apply` for one parameter, prepared once per device with the projector's signs folded in."""
        made_for, constants = self.ready.get((name, device), (None, ()))
        if not constants or made_for is not sign:
            if name not in self.exp_avg:
                raise ValueError(
                    f"AdamPreconditioner: no moments for the trainable parameter {name}; got moments for "
                    f"{len(self.exp_avg)} others, the first {next(iter(self.exp_avg), None)}: load the optimizer state "
                    "of this very model, or freeze the parameter"
                )
            (beta1, beta2), step = self.betas, self.step_of(name)
            second = self.exp_avg_sq[name].to(device, torch.float32)
            if self.form == "diagonal":
                multiplier = 1 / ((second / (1 - beta2**step)).sqrt() + self.eps)
                constants = (multiplier if sign is None else multiplier * sign,)
            else:
                first = self.exp_avg[name].to(device, torch.float32) * (beta1 / (1 - beta1))
                constants = (
                    first if sign is None else first * sign,
                    second * (beta2 / (1 - beta2 ** (step + 1)) / self._scale(name) ** 2),
                )
            self.ready[name, device] = (sign, constants)  # the sign itself: an id could be another tensor's later
        return constants

    def apply(
        self, name: str, gradient: Float[Tensor, " batch *shape"], sign: Float[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, " batch *shape"]:
        """The update direction of each sample, times `sign`; overwrites `gradient`.

        Args:
            name: the parameter's name in `model.named_parameters()`.
            gradient: per-sample gradients, float32.
            sign: +1 and -1 per entry, of the projector; folded into the constants, at no extra pass.

        Raises:
            ValueError: there are no moments under this name.

        >>> state = {"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}
        >>> adam = AdamPreconditioner(*state, step=10**6, form="diagonal")
        >>> round(adam.apply("w", torch.tensor([[6.0]])).item(), 4)
        3.0
        """
        if self.form == "sign":
            return Sign().apply(name, gradient, sign)
        constants = self.moments(name, sign, gradient.device)
        if self.form == "diagonal":
            return gradient.mul_(constants[0])
        first, second = constants
        share, eps = self.scalars(name)
        if self.compiled and sign is not None:
            return fused_step(gradient, sign, first, second, share, eps)
        denominator = torch.addcmul(second, gradient, gradient, value=share).sqrt_().add_(eps)
        numerator = gradient.add_(first) if sign is None else torch.addcmul(first, gradient, sign, out=gradient)
        return numerator.div_(denominator)

    def scalars(self, name: str) -> tuple[float, float]:
        """Of the form "adam" with `moments` first, second and signs s: (s g + first) / (sqrt(second + share g^2) + eps)
        is the step. Returns share and eps."""
        beta2, step, scale = self.betas[1], self.step_of(name) + 1, self._scale(name)
        return (1 - beta2) / (1 - beta2**step) / scale**2, self.eps / scale

    def _scale(self, name: str) -> float:
        """What the numerator `beta1 / (1 - beta1) m + g` lacks; the denominator is divided by it instead."""
        beta1 = self.betas[0]
        return (1 - beta1) / (1 - beta1 ** (self.step_of(name) + 1))

    def describe(self) -> dict[str, Any]:
        """The manifest's part: form, settings, and a fingerprint of the moments (SHA-256, 16 hex digits)."""
        if self.form == "sign":
            return Sign().describe()
        digest = hashlib.sha256()
        for name in sorted(self.exp_avg):
            digest.update(f"{name}{self.step_of(name)}".encode())
            for moment in (self.exp_avg[name], self.exp_avg_sq[name]):
                digest.update(moment.detach().float().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        steps = [self.step_of(name) for name in self.exp_avg] or [0]
        return {
            "form": self.form,
            "betas": list(self.betas),
            "eps": self.eps,
            "step": max(steps),
            "fingerprint": digest.hexdigest()[:16],
        }


class UnfusedWarning(UserWarning):
    """Fusing was asked for, and there is no compiler: the same steps run one by one."""


def step(gradient: Tensor, sign: Tensor, first: Tensor, second: Tensor, share: float, eps: float) -> Tensor:
    """What `AdamPreconditioner` computes, on `[batch, entries]`."""
    return (gradient * sign + first) / ((second + share * gradient * gradient).sqrt() + eps)


def fused_step(
    gradient: Float[Tensor, " batch *shape"],
    sign: Float[Tensor, "*shape"],
    first: Float[Tensor, "*shape"],
    second: Float[Tensor, "*shape"],
    share: float,
    eps: float,
) -> Float[Tensor, " batch *shape"]:
    """Adam's step with the projector's signs; compiled once for all weights, once for biases."""
    flat = gradient[:, None].flatten(1), sign.flatten(), first.flatten(), second.flatten()
    device = gradient.device.type
    if device in UNCOMPILED:
        return step(*flat, share, eps).view_as(gradient)
    try:
        return compiled()(*flat, share, eps).view_as(gradient)
    except RuntimeError as error:  # what torch.compile raises where a compiler is missing or broken
        if isinstance(error, torch.OutOfMemoryError):
            raise
        UNCOMPILED.add(device)
        reason = str(error).strip().splitlines()[0]
        warnings.warn(f"torch.compile: runs unfused on {device}: {reason}", UnfusedWarning, stacklevel=2)
        return step(*flat, share, eps).view_as(gradient)


@cache
def compiled() -> Callable[..., Tensor]:
    return torch.compile(step, dynamic=True)


def described(preconditioner: Preconditioner | None) -> dict[str, Any]:
    """The preconditioner's part of a manifest; None is none."""
    return {"form": "none"} if preconditioner is None else preconditioner.describe()
