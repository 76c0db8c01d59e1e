r"""The conjugate proposal: a Gaussian transition twisted by a locally Gaussian look-ahead.

All processes of a program are stacked into one vector e = x - m of offsets from the kernel's mean.
With kernel :math:`e \sim N(0, V)` and look-ahead :math:`\psi(e) = N(r; K e, R)` (residual r of the
observations, their slope K, and the covariance R that x_0 keeps given the next state),

.. math::
    q(e) = N(e; s, (V^{-1} + K^\top R^{-1} K)^{-1}), \qquad s = V K^\top S^{-1} r, \qquad
    S = R + K V K^\top .

Any other shift s is corrected by the weight, computed in difference form:

.. math::
    \log \frac{p(e)}{q(e)} = \tfrac12 \left( e^\top H e - 2 e^\top \Lambda s + s^\top \Lambda s
    \right)
    - \tfrac12 \log\frac{|S|}{|R|}, \qquad H = K^\top R^{-1} K, \quad \Lambda = V^{-1} + H .
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float64
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from smcdiff.laws import CovariantNormal, base_law, capacitance, thin_product
from smcdiff.process import is_deterministic


@dataclass(frozen=True)
class Covariance:
    """A covariance diag(a) + F F' of stacked offsets.

    Attributes:
        diagonal: a, with shape ``(particle or 1, d)``.
        factor: F, with shape ``(particle, d, r)``; None for independent elements.
    """

    diagonal: Float64[Tensor, "rows d"]
    factor: Tensor | None = None

    @property
    def common(self) -> bool:
        """Whether elements are independent, with the same variances for all particles."""
        return self.factor is None and len(self.diagonal) == 1

    def times(self, rows: Tensor) -> Tensor:
        """V a for every row a of ``(particle or 1, n, d)``."""
        product = rows * self.diagonal[:, None, :]
        if self.factor is None:
            return product
        return product + thin_product(rows @ self.factor, self.factor)

    def between(self, rows: Tensor) -> Tensor:
        """a' V b for all pairs of rows of ``(particle or 1, n, d)``."""
        alike = bool((self.diagonal == self.diagonal[:1]).all())  # then once for all particles
        diagonal = self.diagonal[:1] if alike else self.diagonal
        product = (rows * diagonal[:, None, :]) @ rows.mT
        if self.factor is None:
            return product
        seen = rows @ self.factor
        return product + seen @ seen.mT

    def given(self, precision: Tensor) -> "Covariance":
        """What remains once every element is measured: :math:`(V^{-1} + diag(precision))^{-1}`.

        With D = (I + diag(a) diag(precision))^-1 it is
        D diag(a) + D F (I + F' precision D F)^-1 F' D.
        """
        kept = 1 / (1 + self.diagonal * precision)
        if self.factor is None:
            return Covariance(kept * self.diagonal)
        small = capacitance(1 / (kept * precision), self.factor)
        seen = (self.factor * kept[..., None]).mT
        factor = torch.linalg.solve_triangular(small, seen, upper=False).mT
        return Covariance(kept * self.diagonal, factor)

    def sample(self, batch: int) -> Float64[Tensor, "particle d"]:
        """A draw per particle."""
        own = torch.randn_like(self.diagonal.expand(batch, -1)) * self.diagonal.sqrt()
        if self.factor is None:
            return own
        common = torch.randn_like(self.factor[:, :1, :].expand(batch, -1, -1))
        return own + thin_product(common, self.factor)[:, 0]


@dataclass(frozen=True)
class LocalTwist:
    """The look-ahead as the proposal sees it, in float64.

    Attributes:
        direction: :math:`V^{-1} s`, the gradient of the look-ahead, with shape ``(particle, d)``.
        slope: K, with shape ``(particle or 1, d_y, d)``, or None for no curvature.
        noise: R, with shape ``(particle or 1, d_y, d_y)``.
        total: the Cholesky factor of S, if it is known already.
    """

    direction: Float64[Tensor, "particle d"]
    slope: Tensor | None = None
    noise: Tensor | None = None
    total: Tensor | None = None


@dataclass(frozen=True)
class TwistedStep:
    """The proposal q above, around a kernel with covariance V."""

    covariance: Covariance
    local: LocalTwist

    @cached_property
    def shift(self) -> Float64[Tensor, "particle d"]:
        """s."""
        return self.covariance.times(self.local.direction[:, None])[:, 0]

    @cached_property
    def _curvature(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """K, and the Cholesky factors of R and of S."""
        slope, noise, total = self.local.slope, self.local.noise, self.local.total
        if slope is None or noise is None:
            return None
        if total is None:
            total = torch.linalg.cholesky(noise + self.covariance.between(slope))
        return slope, torch.linalg.cholesky(noise), total

    def sample(self) -> Float64[Tensor, "particle d"]:
        """Offsets e ~ q."""
        e = self.covariance.sample(len(self.shift))
        if self._curvature is None:
            return e + self.shift
        slope, factor, total = self._curvature
        white = torch.randn(len(e), slope.shape[-2], 1, dtype=e.dtype, device=e.device)
        miss = torch.cholesky_solve(slope @ e[..., None] + factor @ white, total)
        return self.shift + e - self.covariance.times((slope.mT @ miss).mT)[:, 0]

    def log_ratio(self, e: Float64[Tensor, "particle d"]) -> Float64[Tensor, " particle"]:
        """log p(e) / q(e)."""
        plain = (self.local.direction * (0.5 * self.shift - e)).sum(-1)
        if self._curvature is None:
            return plain
        slope, factor, total = self._curvature
        miss = slope @ (e - self.shift)[..., None]
        white = torch.linalg.solve_triangular(factor, miss, upper=False)
        log_det = log_diagonal(total) - log_diagonal(factor)
        return plain + 0.5 * white.square().sum((-2, -1)) - log_det

    def expansion(
        self, e: Float64[Tensor, "particle d"], rows: Float64[Tensor, "some k d"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log p(e) / q(e) as a function of c, where the direction is moved by c' rows.

        Returns:
            its value, gradient ``(particle, k)`` and Hessian ``(particle, k, k)`` at c = 0; it is
            quadratic.
        """
        moved = self.covariance.times(rows)
        gradient = (rows @ (self.shift - e)[..., None])[..., 0]
        hessian = moved @ rows.mT
        if self._curvature is not None:
            slope, factor, _ = self._curvature
            miss, seen = slope @ (e - self.shift)[..., None], slope @ moved.mT
            white = torch.linalg.solve_triangular(factor, miss, upper=False)
            seen = torch.linalg.solve_triangular(factor, seen, upper=False)
            gradient = gradient - (seen.mT @ white)[..., 0]
            hessian = hessian + seen.mT @ seen
        return self.log_ratio(e), gradient, hessian


def log_diagonal(factor: Tensor) -> Tensor:
    """log |L| of a triangular factor."""
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def log_normal(
    residual: Float64[Tensor, "particle y"], factor: Tensor
) -> tuple[Float64[Tensor, " particle"], Float64[Tensor, "particle y"]]:
    """log N(r; 0, S) and S^{-1} r, for the Cholesky factor of S, ``(particle or 1, y, y)``."""
    # one covariance for all particles: they are the columns of one right-hand side
    columns = residual.mT[None] if len(factor) == 1 else residual[..., None]
    white = torch.linalg.solve_triangular(factor, columns, upper=False)
    solved = torch.linalg.solve_triangular(factor.mT, white, upper=True)
    white, solved = (v[0].mT if len(factor) == 1 else v[..., 0] for v in (white, solved))
    constant = 0.5 * residual.shape[-1] * math.log(2 * math.pi)
    return -0.5 * white.square().sum(-1) - log_diagonal(factor) - constant, solved


def log_independent(
    residual: Float64[Tensor, "particle y"], variances: Float64[Tensor, "#particle y"]
) -> tuple[Float64[Tensor, " particle"], Float64[Tensor, "particle y"]]:
    """The same where S = diag(variances)."""
    solved = residual / variances
    logs = (2 * math.pi * variances).log()
    return -0.5 * (residual * solved + logs).sum(-1), solved


def at_least(variance: float, matrix: Tensor) -> Tensor:
    """The nearest symmetric matrix without smaller eigenvalues."""
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    return (vectors * values.clamp(min=variance)[..., None, :]) @ vectors.mT


def root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """L with L L' = matrix, and its pseudo-inverse: observations may depend on each other."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > 1e-12 * values[..., -1:]
    scale = torch.where(kept, values, 1.0).sqrt() * kept
    inverse = torch.where(kept, 1 / scale, 0.0)
    return vectors * scale[..., None, :], inverse[..., :, None] * vectors.mT


def stack(values: dict[str, Tensor]) -> Float64[Tensor, "particle d"]:
    """All processes' tensors side by side, one row per particle."""
    return torch.cat([v.double().flatten(1) for v in values.values()], -1)


def unstack(rows: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`stack`, in the dtypes of ``like``."""
    parts = rows.split([v[0].numel() for v in like.values()], -1)
    return {
        n: p.reshape(v.shape).to(v.dtype) for (n, v), p in zip(like.items(), parts, strict=True)
    }


def law_covariance(laws: Mapping[str, Distribution]) -> Covariance | None:
    """V of all laws together; None where some law has no Gaussian density."""
    if not laws or any(is_deterministic(law) for law in laws.values()):
        return None
    if not all(_is_gaussian(law) for law in laws.values()):
        return None
    return stack_covariances([_covariance(law) for law in laws.values()])


def _is_gaussian(law: Distribution) -> bool:
    return isinstance(base_law(law), torch.distributions.Normal | CovariantNormal)


def _covariance(law: Distribution) -> Covariance:
    """The covariance of one law, with its plates stacked."""
    if not isinstance(law, CovariantNormal):
        return Covariance(once(law.variance.double().flatten(1)))
    return plated(law.diagonal.double(), law.factor.double())


def plated(diagonal: Tensor, factor: Tensor) -> Covariance:
    """One covariance of shape ``(particle, *plates, d)``, with its plates stacked."""
    if diagonal.dim() == 2:
        return Covariance(diagonal, factor)
    parts = zip(diagonal.flatten(1, -2).unbind(1), factor.flatten(1, -3).unbind(1), strict=True)
    return stack_covariances([Covariance(a, f) for a, f in parts])


def stack_covariances(parts: list[Covariance]) -> Covariance:
    """Independent blocks side by side."""
    if len(parts) == 1:
        return parts[0]
    size = max(len(p.diagonal if p.factor is None else p.factor) for p in parts)
    diagonal = torch.cat([p.diagonal.expand(size, -1) for p in parts], -1)
    if all(p.factor is None for p in parts):
        return Covariance(diagonal)
    empty = diagonal.new_zeros(len(diagonal), 1, 1)
    factors = [
        p.factor if p.factor is not None else empty.expand(-1, p.diagonal.shape[-1], 1)
        for p in parts
    ]
    return Covariance(diagonal, block_diagonal(factors))


def once(rows: Tensor) -> Tensor:
    """The first row alone where all particles have the same."""
    return rows[:1] if bool((rows == rows[:1]).all()) else rows


def block_diagonal(blocks: list[Tensor]) -> Tensor:
    """Batched block-diagonal matrix of ``(particle or 1, d_i, r_i)`` blocks."""
    if len(blocks) == 1:
        return blocks[0]
    size = max(len(b) for b in blocks)
    shape = (size, sum(b.shape[1] for b in blocks), sum(b.shape[2] for b in blocks))
    out = blocks[0].new_zeros(shape)
    row = column = 0
    for block in blocks:
        out[:, row : row + block.shape[1], column : column + block.shape[2]] = block
        row, column = row + block.shape[1], column + block.shape[2]
    return out
