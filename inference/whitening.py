"""Gaussian laws of flattened states, seen in units of their own deviation."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

Rows = Float64[Tensor, "path k"]


@dataclass(frozen=True)
class Whitened:
    """A Gaussian law of one process's states, seen in its own units.

    Attributes:
        mean, scale: of the flattened states, with shape ``(path, d)``.
        features: orthonormal rows, with shape ``(k, event)``, or None for all elements.
    """

    mean: Float64[Tensor, "path d"]
    scale: Float64[Tensor, "#path d"]
    features: Tensor | None

    def noise(self, x: Tensor) -> Float64[Tensor, "path d"]:
        """e, in all elements."""
        return (x.double().flatten(1) - self.mean) / self.scale

    @property
    def width(self) -> Tensor:
        """sigma of the coordinates."""
        return self.scale if self.features is None else self.scale[:, :1]

    def moved(self, shift: Rows, width: Tensor) -> Tensor:
        """A draw whose coordinates have the law N(shift, width^2)."""
        e = torch.randn_like(self.mean)
        c = coordinates(e, self.features)
        change = shift + (width - 1) * c
        if self.features is not None:
            change = change.reshape(len(e), -1, len(self.features)) @ self.features
        return self.mean + self.scale * (e + change.reshape(e.shape))


def coordinates(x: Tensor, features: Tensor | None) -> Rows:
    """The coordinates of states, in float64."""
    flat = x.double().flatten(1)
    if features is None:
        return flat
    return (flat.reshape(len(x), -1, features.shape[1]) @ features.mT).flatten(1)


def log_normaliser(a: Tensor, b: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log E[exp(-a c^2 / 2 + b c)] for c ~ N(mean, variance)."""
    spread = 1 + a * variance
    exponent = 2 * mean * b + variance * b.square() - a * mean.square()
    return 0.5 * (exponent / spread - spread.log())


def check_features(name: str, features: Tensor | None, size: int) -> None:
    """Refuses rows that are no orthonormal coordinates of an event with so many elements."""
    if features is None:
        return
    fits = features.dim() == 2 and features.shape[1] == size
    eye = torch.eye(len(features), dtype=features.dtype, device=features.device)
    if not fits or not torch.allclose(features @ features.mT, eye, atol=1e-5):
        raise ValueError(
            f"features of process {name!r} must be orthonormal rows with {size} columns, one per "
            f"element of an event, but have shape {tuple(features.shape)}: take Q of "
            "torch.linalg.qr(matrix.T), transposed"
        )
