"""Exact answers to compare with, written down in torch and without smcdiff.

Data are x_0 and their noised versions x_t = alpha_t x_0 + sqrt(1 - alpha_t^2) eps. Everything is
float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BETAS = (0.05, 0.10, 0.20, 0.35, 0.50)


def alphas(betas: Sequence[float] = BETAS) -> list[float]:
    """alpha_0 = 1, ..., alpha_T."""
    kept = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0).sqrt()
    return [1.0, *kept.tolist()]


# --------------------------------------------------------------------------------- Gaussian data


@dataclass(frozen=True)
class Gaussian:
    """N(mean, covariance), with shapes (d,) and (d, d)."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Affine:
    """The transition x_{t-1} = slope x_t + offset + N(0, covariance)."""

    slope: Tensor
    offset: Tensor
    covariance: Tensor


def normal(
    mean: float | Sequence[float], covariance: float | Sequence[Sequence[float]]
) -> Gaussian:
    """A Gaussian from numbers."""
    return Gaussian(
        torch.tensor(mean, dtype=torch.float64).reshape(-1),
        torch.atleast_2d(torch.tensor(covariance, dtype=torch.float64)),
    )


def noised(data: Gaussian, alpha: float) -> Gaussian:
    """The law of x_t."""
    eye = torch.eye(len(data.mean)).double()
    return Gaussian(alpha * data.mean, alpha**2 * data.covariance + (1 - alpha**2) * eye)


def exact_kernel(data: Gaussian, before: float, now: float) -> Affine:
    """The law of x_{t-1} given x_t, at alpha_{t-1} = before and alpha_t = now."""
    near, far = noised(data, before), noised(data, now)
    slope = now / before * near.covariance @ far.covariance.inverse()
    offset = near.mean - slope @ far.mean
    return Affine(slope, offset, near.covariance - slope @ far.covariance @ slope.T)


def ddpm_kernel(data: Gaussian, before: float, now: float, large: bool = False) -> Affine:
    """Ho et al. (2020): x_{t-1} given x_t and E[x_0 | x_t], with variance beta-tilde or beta."""
    far = noised(data, now)
    eye = torch.eye(len(data.mean)).double()
    gain = now * data.covariance @ far.covariance.inverse()
    beta = 1 - (now / before) ** 2
    to_data = before * beta / (1 - now**2)
    to_now = now / before * (1 - before**2) / (1 - now**2)
    variance = beta if large else beta * (1 - before**2) / (1 - now**2)
    offset = to_data * (data.mean - gain @ far.mean)
    return Affine(to_data * gain + to_now * eye, offset, variance * eye)


def propagate(start: Gaussian, kernels: Sequence[Affine]) -> Gaussian:
    """The law of x_0 for x_T ~ start and kernels in the order t = T, ..., 1."""
    for each in kernels:
        mean = each.slope @ start.mean + each.offset
        start = Gaussian(mean, each.slope @ start.covariance @ each.slope.T + each.covariance)
    return start


def observed(prior: Gaussian, operator: Tensor, noise: Tensor, y: Tensor) -> tuple[Gaussian, float]:
    """The posterior given y = A x + N(0, noise), and log p(y)."""
    spread = operator @ prior.covariance @ operator.T + noise
    gain = prior.covariance @ operator.T @ spread.inverse()
    residual = y - operator @ prior.mean
    square = residual @ spread.inverse() @ residual
    log_evidence = -0.5 * (square + spread.logdet() + len(y) * math.log(2 * math.pi))
    covariance = prior.covariance - gain @ operator @ prior.covariance
    return Gaussian(prior.mean + gain @ residual, covariance), float(log_evidence)


def log_normal(y: Tensor | float, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    """log N(y; mean, variance), elementwise."""
    y, mean, variance = (torch.as_tensor(v, dtype=torch.float64) for v in (y, mean, variance))
    return -0.5 * ((y - mean) ** 2 / variance + variance.log() + math.log(2 * math.pi))


# ------------------------------------------------------------------------------- mixtures, in 1-D


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians on the line, with shape (K,) each."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def tilted(self, slope: float) -> tuple["Mixture", float]:
        """The law proportional to p(x) exp(slope x), and the logarithm of its normaliser."""
        logs = self.weights.log() + slope * self.means + 0.5 * slope**2 * self.variances
        means = self.means + slope * self.variances
        return Mixture(logs.softmax(0), means, self.variances), float(logs.logsumexp(0))

    def given(self, x: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
        """log responsibilities, means and variances of x_0 by component, given x_t = x."""
        spread = alpha**2 * self.variances + 1 - alpha**2
        logs = self.weights.log() + log_normal(x[..., None], alpha * self.means, spread)
        gain = alpha * self.variances / spread
        means = self.means + gain * (x[..., None] - alpha * self.means)
        return logs.log_softmax(-1), means, self.variances * (1 - alpha**2) / spread


def mixture(
    weights: Sequence[float], means: Sequence[float], variances: Sequence[float]
) -> Mixture:
    """A mixture from numbers."""
    parts = [torch.tensor(part, dtype=torch.float64) for part in (weights, means, variances)]
    return Mixture(*parts)


def backward_on_grid(
    points: Tensor, terminal: Tensor, log_kernels: Sequence[Callable[[Tensor, Tensor], Tensor]]
) -> list[Tensor]:
    """log psi_0, ..., log psi_T at the points, where log psi_t(x) = log E[psi_{t-1} | x].

    Args:
        points: an even grid, with shape (G,).
        terminal: log psi_0 on it.
        log_kernels: log p(x' | x) in the order t = 1, ..., T, broadcast over both.
    """
    tables = [terminal]
    step = (points[1] - points[0]).log()
    for log_kernel in log_kernels:
        into = log_kernel(points[None, :], points[:, None])
        tables.append((into + tables[-1] + step).logsumexp(-1))
    return tables


def quadrature(
    log_f: Callable[[Tensor], Tensor], low: float, high: float, num: int = 20001
) -> float:
    """The logarithm of the integral of exp(log_f) from low to high, by Simpson's rule."""
    points = torch.linspace(low, high, num, dtype=torch.float64)
    weights = torch.full_like(points, 2.0)
    weights[1::2], weights[0], weights[-1] = 4.0, 1.0, 1.0
    return float((log_f(points) + (weights * (high - low) / (num - 1) / 3).log()).logsumexp(0))
