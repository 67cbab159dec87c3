"""Kronecker factors of a curvature -> per-sample update direction: `(S + d)^-1 G (C + d)^-1`.

An influence function divides gradients by the loss's curvature. That of one linear layer is near the product of two
small matrices (K-FAC, Martens and Grosse 2015, arXiv 1503.05671): S of its output's gradients and C of its inputs. For
LoRA one of the two is r x r. Inner products of rows divided by it predict a task's loss better than Adam's step does;
see docs/peers.md.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from icons.gradients.covariances import CovarianceSums
from icons.output import whole_file

KIND = "icons kronecker factors"
ROOT = "kfac_root"
"""The form of rows that are divided by the root of a curvature."""


@dataclass(frozen=True)
class KroneckerFactors:
    """Second moments of a model's gradients, one mean over rows.

    Attributes:
        left: weight -> S, `[out, out]` or its diagonal `[out]`, float32; up to a factor.
        right: weight -> C, `[in, in]` or its diagonal `[in]`, float32; up to a factor.
        square: parameter -> mean squared gradient of a row, per entry of the parameter.
        rows: that they are the mean over.
        manifest: what they were made from.
    """

    left: Mapping[str, Tensor]
    right: Mapping[str, Tensor]
    square: Mapping[str, float]
    rows: int
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, sums: CovarianceSums, shapes: Mapping[str, torch.Size], manifest: Mapping[str, Any] | None = None
    ) -> "KroneckerFactors":
        """The means of sums. A weight that was unseen in some row has no factors, only its mean square.

        Args:
            sums: over all rows.
            shapes: of all trainable parameters, by name.
            manifest: what they were made from.

        Raises:
            ValueError: there is no row.
        """
        if not sums.rows:
            raise ValueError(
                f"Kronecker factors: none of {sums.left_out:,} rows has a finite gradient; expected at least one "
                "usable row: look at the failures that `icons inspect` names"
            )
        seen = [name for name in sums.left if not int(sums.unseen[name])]
        return cls(
            {name: (sums.left[name] / sums.rows).float() for name in seen},
            {name: (sums.right[name] / sums.rows).float() for name in seen},
            {name: float(sums.square[name]) / sums.rows / shape.numel() for name, shape in shapes.items()},
            sums.rows,
            dict(manifest or {}),
        )

    @property
    def unfactored(self) -> list[str]:
        """Parameters that have a gradient and no factors: what is no plain linear layer's weight."""
        return [name for name, square in self.square.items() if square and name not in self.left]

    @property
    def silent(self) -> list[str]:
        """Parameters without any gradient in these rows."""
        return [name for name, square in self.square.items() if not square]

    @property
    def num_bytes(self) -> int:
        """Of the covariances, and of what a preconditioner keeps on the device."""
        return sum(value.numel() * value.element_size() for side in (self.left, self.right) for value in side.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) over all names and numbers."""
        digest = hashlib.sha256()
        for name in sorted(self.square):
            digest.update(f"{name}{self.square[name]!r}".encode())
            for side in (self.left, self.right):
                if name in side:
                    digest.update(f"{tuple(side[name].shape)}".encode())
                    digest.update(side[name].cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, file: Path) -> None:
        """Writes one safetensors file, whole or not at all."""
        sides = {"left": self.left, "right": self.right}
        tensors = {
            f"{side}/{name}": value.contiguous() for side, factors in sides.items() for name, value in factors.items()
        }
        about = {"kind": KIND, "rows": self.rows, "square": dict(self.square), "fingerprint": self.fingerprint}
        with whole_file(file) as partial:
            save_file(tensors, partial, {"icons": json.dumps(about | {"manifest": dict(self.manifest)})})

    @classmethod
    def load(cls, file: Path) -> "KroneckerFactors":
        """What `save` wrote.

        Raises:
            ValueError: the file is none of these, or its numbers are not those that it was written with.
        """
        about, tensors = _read(file)
        sides: dict[str, dict[str, Tensor]] = {"left": {}, "right": {}}
        for name, value in tensors.items():
            side, _, rest = name.partition("/")
            sides[side][rest] = value
        factors = cls(**sides, square=about["square"], rows=about["rows"], manifest=about["manifest"])
        if factors.fingerprint != about["fingerprint"]:
            raise ValueError(
                f"{file}: its numbers have the fingerprint {factors.fingerprint}, and were written with "
                f"{about['fingerprint']}; expected the same: the file is damaged, make it again with --overwrite"
            )
        return factors


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's metadata and tensors."""
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {}).get("icons", "{}"))
            if about.get("kind") == KIND:
                return about, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise ValueError(f"{file}: is not there; expected a file that `icons factors` wrote") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); expected a file that `icons factors` wrote") from error
    raise ValueError(f"{file}: holds no Kronecker factors; expected a file that `icons factors` wrote")


def is_factors(file: Path) -> bool:
    """Whether a file holds Kronecker factors, whole or with other numbers than it was written with."""
    try:
        with safe_open(file, framework="pt") as opened:
            return json.loads((opened.metadata() or {}).get("icons", "{}")).get("kind") == KIND
    except (SafetensorError, OSError, ValueError):
        return False


@dataclass
class KroneckerPreconditioner:
    """A sample's gradient, divided by the curvature that the factors stand for.

    With s and c the means of the eigenvalues of S and C, and m the parameter's mean squared gradient per entry:

        update = (S / s + damping)^-1 G (C / c + damping)^-1 / m

    A side of which only the diagonal is known is a diagonal matrix. m makes the product as large as the gradients it
    stands for, so that parameters compare. A parameter without factors is divided by m alone. Where the factors' rows
    had no gradient at all, an update is 0 if the gradient is, and NaN otherwise: the row counts as not finite, since it
    cannot be weighed. Linear in the gradient; a sample never changes it.

    With `root` it is the square root of all that, for training rows and tasks alike: products of two updates are those
    of one whole update with a plain gradient. A projection needs it: whole updates are nearly all in directions that
    plain gradients do not have, and their product with these is lost in its noise.

    Args:
        factors: of the very model that is differentiated.
        damping: added to both factors, as a share of the mean of their eigenvalues.
        root: divide by the square root of the curvature.

    Raises:
        ValueError: damping is not a finite number above 0, or so small that a factor has no inverse.
    """

    factors: KroneckerFactors
    damping: float = 0.1
    root: bool = False
    ready: dict[tuple[str, torch.device], tuple[Tensor | None, Tensor | None, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not 0 < self.damping < math.inf:
            raise ValueError(f"KroneckerPreconditioner: damping {self.damping}; expected a number above 0")

    def _inverses(self, name: str, device: torch.device) -> tuple[Tensor | None, Tensor | None, float]:
        """What a block is multiplied by on the left, on the right, and all over; prepared once per device.

        Raises:
            ValueError: nothing is known of the parameter.
        """
        if (name, device) not in self.ready:
            square = self.factors.square.get(name)
            if square is None:
                raise ValueError(
                    f"KroneckerPreconditioner: no factors for the trainable parameter {name}; got those of "
                    f"{len(self.factors.square)} others: make them with this very model and --target"
                )
            sides = [
                None
                if name not in side or not square
                else _damped_inverse(side[name], self.damping, self.root).to(device)
                for side in (self.factors.left, self.factors.right)
            ]
            scale = square ** (-0.5 if self.root else -1) if square else 0.0
            self.ready[name, device] = (*sides, scale)  # type: ignore[assignment]
        return self.ready[name, device]

    def apply(
        self, name: str, gradient: Float[Tensor, " batch *shape"], sign: Float[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, " batch *shape"]:
        """The update direction of each sample, times `sign`; may overwrite `gradient`.

        Raises:
            ValueError: nothing is known of the parameter.

        >>> factors = KroneckerFactors({"w": torch.ones(1, 1)}, {"w": torch.tensor([1.0, 3.0])}, {"w": 0.5}, rows=1)
        >>> KroneckerPreconditioner(factors, damping=0.5).apply("w", torch.tensor([[[3.0, 3.0]]])).tolist()
        [[[4.0, 2.0]]]
        """
        left, right, scale = self._inverses(name, gradient.device)
        if not scale:
            return gradient.masked_fill_(gradient != 0, torch.nan)
        if left is not None:
            gradient = left @ gradient if left.ndim == 2 else gradient.mul_(left[:, None])
        if right is not None:
            gradient = gradient @ right if right.ndim == 2 else gradient.mul_(right)
        gradient = gradient.mul_(scale)
        return gradient if sign is None else gradient.mul_(sign)

    def describe(self) -> dict[str, Any]:
        """The manifest's part: form, damping, rows, and the factors' fingerprint."""
        made = {"rows": self.factors.rows, "fingerprint": self.factors.fingerprint}
        return {"form": ROOT if self.root else "kfac", "damping": self.damping, **made}


def _damped_inverse(moment: Tensor, damping: float, root: bool = False) -> Tensor:
    """`(M / mean + damping)^-1`, or its square root; mean is that of M's eigenvalues. Of a diagonal the diagonal.

    float32, computed in float64.

    Raises:
        ValueError: the matrix has no inverse to float64's precision.

    >>> _damped_inverse(torch.tensor([1.0, 3.0]), 0.5).tolist()
    [1.0, 0.5]
    """
    wide = moment.double().cpu()
    if wide.ndim == 1:
        return (wide / wide.mean() + damping).pow(-0.5 if root else -1).float()
    wide = wide / wide.diagonal().mean()
    if root:
        values, vectors = torch.linalg.eigh((wide + wide.T) / 2)
        return ((vectors * (values.clamp(min=0) + damping).rsqrt()) @ vectors.T).float()
    wide.diagonal().add_(damping)
    root_of, failed = torch.linalg.cholesky_ex((wide + wide.T) / 2)
    if failed:
        raise ValueError(
            f"KroneckerPreconditioner: damping {damping:g} is too small for factors of few rows, which have no "
            "inverse; expected a larger one: 0.1 is the default"
        )
    return torch.cholesky_inverse(root_of).float()
