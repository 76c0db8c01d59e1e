r"""A few Gaussians seen through noise: the arithmetic under the exact denoisers.

x_0 is data with shape (d,), and x_t = alpha x_0 + sigma eps. The K Gaussians N(m_k, C_k) are laws
of x_0. Noise acts on every eigendirection of C_k alone: where its eigenvalue is lambda,

.. math:: \mathrm{Var}[x_t] = \alpha^2\lambda + \sigma^2, \qquad
          E[x_0 | x_t] = \mathrm{keep}\, m + \mathrm{gain}\, x_t, \qquad
          \mathrm{Var}[x_0 | x_t] = \mathrm{keep}\, \lambda,

with gain = alpha lambda / Var[x_t] and keep = sigma^2 / Var[x_t]. So the C_k are diagonalised once,
and every noise level is cheap. Computed in float64, whatever the dtype of the buffers.

Covariances come in three forms: isotropic with shape (k,), diagonal with shape (k, d), and matrices
with shape (k, d, d), where k is K, or 1 if all components share one.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn import functional

from smcdiff.arguments import check_kind

Level: TypeAlias = float | int | Float[Tensor, ""]
Points: TypeAlias = Float64[Tensor, "*batch d"]
PerComponent: TypeAlias = Float64[Tensor, "*batch K"]
Spectrum: TypeAlias = Float64[Tensor, "k e"]  # e is d, or 1 where isotropic


class Gaussians(nn.Module, ABC):
    """K Gaussians over x_0, asked at a noise level (alpha, sigma)."""

    means: Tensor

    def __init__(self, means: Float[Tensor, "K d"]) -> None:
        super().__init__()
        self.register_buffer("means", means)

    @abstractmethod
    def log_normal(self, x: Points, alpha: Level, sigma: Level) -> PerComponent:
        """The log-densities of x_t at x."""

    @abstractmethod
    def denoised(self, x: Points, alpha: Level, sigma: Level) -> Float64[Tensor, "*batch K d"]:
        """E[x_0 | x_t = x] for each component."""

    @abstractmethod
    def average(self, x: Points, weights: PerComponent, alpha: Level, sigma: Level) -> Points:
        """E[x_0 | x_t = x], averaged over the components."""

    @abstractmethod
    def covariances(self, alpha: Level, sigma: Level) -> Float64[Tensor, "k *form"]:
        """Cov[x_0 | x_t]."""

    @abstractmethod
    def draw(self, index: Int64[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """One draw of x_0 from every component named in `index`."""


class Aligned(Gaussians):
    """Isotropic or diagonal covariances: no matrix with shape (d, d) is ever formed."""

    spectrum: Tensor

    def __init__(
        self, means: Float[Tensor, "K d"], spectrum: Float[Tensor, "k e"], isotropic: bool
    ) -> None:
        super().__init__(means)
        self.register_buffer("spectrum", spectrum)
        self.isotropic = isotropic

    def log_normal(self, x: Points, alpha: Level, sigma: Level) -> PerComponent:
        centres = alpha * self.means.double()
        variance = (alpha**2 * self.spectrum.double() + sigma**2).expand_as(centres)
        constant = (centres**2 / variance + torch.log(2 * math.pi * variance)).sum(-1)
        linear = functional.linear(x, centres / variance, -0.5 * constant)
        if self.isotropic:
            return linear - 0.5 * (x * x).sum(-1, keepdim=True) / variance[:, 0]
        return linear - 0.5 * functional.linear(x * x, 1 / variance)

    def denoised(self, x: Points, alpha: Level, sigma: Level) -> Float64[Tensor, "*batch K d"]:
        gain, keep = _gain_and_keep(self.spectrum.double(), alpha, sigma)
        return keep * self.means.double() + gain * x[..., None, :]

    def average(self, x: Points, weights: PerComponent, alpha: Level, sigma: Level) -> Points:
        gain, keep = _gain_and_keep(self.spectrum.double(), alpha, sigma)
        slope = gain[0] if len(gain) == 1 else weights @ gain
        return weights @ (keep * self.means.double()) + slope * x

    def covariances(self, alpha: Level, sigma: Level) -> Float64[Tensor, "k *form"]:
        variance = _left(self.spectrum.double(), alpha, sigma)
        return variance[:, 0] if self.isotropic else variance

    def draw(self, index: Int64[Tensor, " n"]) -> Float[Tensor, "n d"]:
        centres = self.means[index]
        scale = self.spectrum.sqrt()[index % len(self.spectrum)]
        return centres + scale * torch.randn_like(centres)


class Rotated(Gaussians):
    """One matrix shared by all components: diagonal in the coordinates x @ basis."""

    basis: Tensor

    def __init__(
        self,
        means: Float[Tensor, "K d"],
        spectrum: Float[Tensor, "1 d"],
        basis: Float[Tensor, "d d"],
    ) -> None:
        super().__init__(means)
        self.register_buffer("basis", basis)
        self.aligned = Aligned(means @ basis, spectrum, isotropic=False)

    def log_normal(self, x: Points, alpha: Level, sigma: Level) -> PerComponent:
        return self.aligned.log_normal(x @ self.basis.double(), alpha, sigma)

    def denoised(self, x: Points, alpha: Level, sigma: Level) -> Float64[Tensor, "*batch K d"]:
        basis = self.basis.double()
        return self.aligned.denoised(x @ basis, alpha, sigma) @ basis.mT

    def average(self, x: Points, weights: PerComponent, alpha: Level, sigma: Level) -> Points:
        basis = self.basis.double()
        return self.aligned.average(x @ basis, weights, alpha, sigma) @ basis.mT

    def covariances(self, alpha: Level, sigma: Level) -> Float64[Tensor, "k *form"]:
        basis = self.basis.double()
        return (basis * self.aligned.covariances(alpha, sigma)[:, None]) @ basis.mT

    def draw(self, index: Int64[Tensor, " n"]) -> Float[Tensor, "n d"]:
        return self.aligned.draw(index) @ self.basis.mT


class Separate(Gaussians):
    """One matrix per component: component k is diagonal in the coordinates x @ basis[k]."""

    spectrum: Tensor
    basis: Tensor

    def __init__(
        self,
        means: Float[Tensor, "K d"],
        spectrum: Float[Tensor, "K d"],
        basis: Float[Tensor, "K d d"],
    ) -> None:
        super().__init__(means)
        self.register_buffer("spectrum", spectrum)
        self.register_buffer("basis", basis)

    def _offsets(self, x: Points, alpha: Level) -> Float64[Tensor, "*batch K d"]:
        """x - alpha m_k in the coordinates of component k."""
        basis = self.basis.double()
        centres = torch.einsum("kd,kde->ke", self.means.double(), basis)
        return torch.einsum("...d,kde->...ke", x, basis) - alpha * centres

    def log_normal(self, x: Points, alpha: Level, sigma: Level) -> PerComponent:
        variance = alpha**2 * self.spectrum.double() + sigma**2
        squares = self._offsets(x, alpha) ** 2
        return -0.5 * (squares / variance + torch.log(2 * math.pi * variance)).sum(-1)

    def denoised(self, x: Points, alpha: Level, sigma: Level) -> Float64[Tensor, "*batch K d"]:
        gain, _ = _gain_and_keep(self.spectrum.double(), alpha, sigma)
        shift = torch.einsum(
            "...ke,kde->...kd", gain * self._offsets(x, alpha), self.basis.double()
        )
        return self.means.double() + shift

    def average(self, x: Points, weights: PerComponent, alpha: Level, sigma: Level) -> Points:
        return (weights[..., None] * self.denoised(x, alpha, sigma)).sum(-2)

    def covariances(self, alpha: Level, sigma: Level) -> Float64[Tensor, "k *form"]:
        basis = self.basis.double()
        return (basis * _left(self.spectrum.double(), alpha, sigma)[:, None]) @ basis.mT

    def draw(self, index: Int64[Tensor, " n"]) -> Float[Tensor, "n d"]:
        centres = self.means[index]
        noise = self.spectrum.sqrt()[index] * torch.randn_like(centres)
        for k, basis in enumerate(self.basis):
            noise[index == k] = noise[index == k] @ basis.mT
        return centres + noise


class Conditioned(NamedTuple):
    """The components given y, and log p(y) for each."""

    means: Float64[Tensor, "K d"]
    covariances: Float64[Tensor, "k d d"]
    log_evidence: Float64[Tensor, " K"]


def condition(
    prior: Gaussians,
    operator: Float64[Tensor, "d_y d"],
    noise: Float64[Tensor, "d_y d_y"],
    y: Float64[Tensor, " d_y"],
) -> Conditioned:
    r"""Every component of x_0 given y = A x_0 + N(0, R), A the operator and R the noise:

    .. math:: m' = m + G (y - A m), \quad C' = (I - G A) C (I - G A)^T + G R G^T, \quad
              G = C A^T (A C A^T + R)^{-1}.
    """
    means, given = prior.means.double(), prior.covariances(0.0, 1.0)
    covariances = matrices(given, given.ndim - 1, means.shape[-1])
    seen = operator @ covariances
    total = seen @ operator.mT + noise
    gain = torch.linalg.solve(total, seen).mT
    residual = y - means @ operator.mT
    log_evidence = MultivariateNormal(torch.zeros_like(y), total).log_prob(residual)
    rest = torch.eye(means.shape[-1]).to(means) - gain @ operator
    narrowed = rest @ covariances @ rest.mT + gain @ noise @ gain.mT
    moved = means + (gain @ residual[..., None])[..., 0]
    return Conditioned(moved, (narrowed + narrowed.mT) / 2, log_evidence)


def matrices(
    covariances: Float64[Tensor, "..."], form: int, d: int
) -> Float64[Tensor, "*batch {d} {d}"]:
    """Covariances as matrices; the last `form` axes tell their form: none, (d,) or (d, d)."""
    if form == 0:
        return covariances[..., None, None] * torch.eye(d).to(covariances)
    return covariances.diag_embed() if form == 1 else covariances


def gaussians(
    means: Float[Tensor, "K d"], covariances: Float[Tensor, "*form"] | float
) -> Gaussians:
    """The class that fits the shape of `covariances`, with buffers in the dtype of `means`."""
    means = _checked(means)
    check_kind("covariances", covariances, Tensor | float | int, "1.0 or torch.eye(2)")
    table = torch.as_tensor(covariances, dtype=torch.float64, device=means.device).detach()
    shape, (count, d) = tuple(table.shape), means.shape
    if shape in {(), (1,), (count,)}:
        return Aligned(means, _positive(table.reshape(-1, 1)).to(means), isotropic=True)
    if shape in {(1, d), (count, d)}:
        return Aligned(means, _positive(table.clone()).to(means), isotropic=False)
    if shape in {(1, d, d), (count, d, d)}:
        return _diagonalised(means, table)
    raise refused(
        f"covariances with shape (), ({count},), ({count}, {d}) or ({count}, {d}, {d})",
        f"shape {shape}",
        "Give one number, or a number, a diagonal or a matrix for each of the means.",
    )


def _diagonalised(means: Float[Tensor, "K d"], covariances: Float64[Tensor, "k d d"]) -> Gaussians:
    asymmetry = (covariances - covariances.mT).abs().max().item()
    if not asymmetry <= 1e-5 * covariances.abs().max().item():
        raise refused(
            "finite, symmetric covariances",
            f"C - C.mT up to {asymmetry:.3g}",
            "Symmetrise them: (C + C.mT) / 2.",
        )
    values, vectors = torch.linalg.eigh(covariances)
    spectrum, basis = _positive(values).to(means), vectors.to(means)
    if len(basis) == 1:
        return Rotated(means, spectrum, basis[0])
    return Separate(means, spectrum, basis)


def _gain_and_keep(spectrum: Spectrum, alpha: Level, sigma: Level) -> tuple[Spectrum, Spectrum]:
    variance = alpha**2 * spectrum + sigma**2
    return alpha * spectrum / variance, sigma**2 / variance


def _left(spectrum: Spectrum, alpha: Level, sigma: Level) -> Spectrum:
    _, keep = _gain_and_keep(spectrum, alpha, sigma)
    return keep * spectrum


def _checked(means: Float[Tensor, "*shape"]) -> Float[Tensor, "K d"]:
    check_kind("means", means, Tensor, "torch.tensor([[-1.0, 0.0], [1.0, 0.0]])")
    fine = means.ndim == 2 and means.numel() > 0 and means.is_floating_point()
    if not (fine and bool(means.isfinite().all())):
        raise refused(
            "finite means with shape (K, d), K and d at least 1",
            f"{means.dtype} with {described(means)}",
            "Give one row of floating-point numbers per component.",
        )
    return means.detach().clone()


def _positive(spectrum: Spectrum) -> Spectrum:
    if not (bool((spectrum > 0).all()) and bool(spectrum.isfinite().all())):
        raise refused(
            "positive definite covariances",
            f"eigenvalues from {spectrum.min().item():.3g} to {spectrum.max().item():.3g}",
            "Give variances, not their logarithms; where one is 0, add a small multiple of I.",
        )
    return spectrum


def described(table: Tensor) -> str:
    """What an error message says about a table."""
    shape = f"shape {tuple(table.shape)}"
    if table.numel() == 0:
        return shape
    return f"{shape} and values from {table.min().item():.4g} to {table.max().item():.4g}"


def refused(expected: str, got: str, fix: str) -> ValueError:
    """The error for bad input: what was expected, what came, what to do."""
    return ValueError(f"expected {expected}; got {got}. {fix}")
