r"""Gaussian observations, seen from x_t through what a denoiser says of x_0.

Given x_t, the data is about :math:`x_0 \sim N(\hat x_0(x_t), C_t)`, and residuals r of observations
with slope A and noise D have the law N(0, D + A C_t A'). C_t is that of the *discretised* chain:
with K the slope of the observations in the next state, R the covariance that remains given it and V
the kernel's covariance, :math:`D + A C_t A^\top = R + K V K^\top`, so that twist, kernel and
proposal agree exactly wherever the model is linear and Gaussian.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from smcdiff.process import is_deterministic
from smcdiff.program import Program
from smcdiff.twist import View

from .linear_gaussian import (
    Covariance,
    at_least,
    law_covariance,
    log_independent,
    log_normal,
    plated,
    root,
    stack,
    stack_covariances,
)
from .observations import Levels, Observations, Separate, constant_operator, operator

CovarianceName = Literal["auto", "none", "scalar", "diagonal", "jacobian"]
FEW_OBSERVATIONS = 4  # up to here a backward pass per observation is worth its price
# The share of the usual variance that is left to every direction: at high noise half of the
# eigenvalues that a network's Jacobian suggests are negative, and a look-ahead that takes these for
# certainty is off by a hundred nats (48 sharp observations of an 8x8 digit).
LEAST_VARIANCE = 0.1


@dataclass(frozen=True)
class Look:
    """What is seen from x_t: log N(r; 0, S), S^{-1} r, how to pull a back to K'a, and K, R, S."""

    log_prob: Float64[Tensor, " particle"]
    solved: Float64[Tensor, "particle y"]
    pull: Callable[[Tensor], Tensor]
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Linearised:
    """Looks at Gaussian sites from any state.

    Args:
        program: the program, whose continuous processes all are noised data.
        sites: its Gaussian sites; without any there is nothing to look at.
        names: the processes that they follow.
        covariance: C_t, as of :class:`DenoisedLikelihood`.

    Attributes:
        operator: A, where it is the same everywhere; observations that are not affine have none.
        mode: the covariance that was chosen.
        closed: whether every process knows its covariance.
        by_slope: whether K is more than A times a number for each element of x_0.
    """

    def __init__(
        self,
        program: Program,
        sites: tuple[str, ...],
        names: tuple[str, ...],
        covariance: CovarianceName,
    ) -> None:
        self.names, self.levels = names, Levels(program, names)
        self.operator, size = constant_operator(program, sites, names) if sites else (None, 0)
        self.closed = all(program.processes[n].closed_form for n in names)
        self.mode = covariance if sites else "none"
        if self.mode == "auto":
            few = self.closed or size <= FEW_OBSERVATIONS
            self.mode = "jacobian" if few else "scalar"
        self.by_slope = self.mode == "jacobian" or (self.mode == "diagonal" and self.closed)
        affine, self._separate = self.operator, None
        self._gram = None if affine is None else affine @ affine.mT
        if affine is not None and Separate.fits(affine) and not self.by_slope:
            self._separate = Separate(affine)

    def look(self, view: View, seen: Observations, curved: bool) -> Look:
        """What x_t says of the observations; with K, R and S if the proposal is to be curved."""
        apart = None if curved else self._apart(view, seen)
        return self._together(view, seen) if apart is None else apart

    def start(self, view: View, seen: Observations) -> tuple[Tensor, Tensor]:
        """K and R of the state itself."""
        return self._of_state(view, self._matrix(view, seen), seen, view.t)

    def deterministic(self, view: View) -> bool:
        """Whether no process has noise in this step."""
        return all(is_deterministic(view.kernels[n].law) for n in self.names)

    def _matrix(self, view: View, seen: Observations) -> Tensor:
        if self.operator is not None:
            return self.operator
        return operator(view.execution, seen.mean, view.batch, self.names).detach()

    def _apart(self, view: View, seen: Observations) -> Look | None:
        """The look-ahead where, whatever x_t is, the residuals are independent."""
        if self._separate is None or seen.variances is None:
            return None
        kernel, (slope, kept) = self._kernel_covariance(view), self._levels(view, view.t - 1)
        if kernel is None and not self.deterministic(view):
            kept = self._levels(view, view.t)[1]
        elif kernel is not None:
            if kernel.factor is not None:
                return None
            kept = kept + slope**2 * kernel.diagonal
        found = log_independent(seen.residual, seen.variances + self._separate.weighed(kept))
        matrix = self._separate.matrix
        return Look(*found, lambda solved: slope * (solved @ matrix))

    def _together(self, view: View, seen: Observations) -> Look:
        """The look-ahead by the covariance of the residuals."""
        matrix = self._matrix(view, seen)
        slope, noise = self._of_state(view, matrix, seen, view.t - 1)
        factor = torch.linalg.cholesky(self._spread(view, matrix, seen, slope, noise))
        parts = {"slope": slope, "noise": noise, "total": factor.detach()}
        found = log_normal(seen.residual, factor)
        return Look(*found, lambda solved: (slope.mT @ solved[..., None])[..., 0], parts)

    def _kernel_covariance(self, view: View) -> Covariance | None:
        return law_covariance({n: view.kernels[n].law for n in self.names})

    def _spread(
        self, view: View, matrix: Tensor, seen: Observations, slope: Tensor, noise: Tensor
    ) -> Tensor:
        """The covariance of the residuals given x_t: R + K V K', where the kernel is Gaussian."""
        variance = self._kernel_covariance(view)
        if variance is not None and self.mode in ("none", "scalar") and variance.common:
            level = self.levels(view.x, view.t - 1, "slope")
            return noise + self._weighed(matrix, level**2 * variance.diagonal)
        if variance is not None:
            return noise + variance.between(slope)
        if self.deterministic(view):
            return noise
        return self._of_state(view, matrix, seen, view.t)[1]

    # ---------------------------------------------------------------- K and R of the next state

    def _of_state(
        self, view: View, matrix: Tensor, seen: Observations, t: int
    ) -> tuple[Tensor, Tensor]:
        """The slope and the noise of the observations in a state at t <= view.t."""
        if t == 0:
            return matrix, seen.noise
        if not self.by_slope:
            levels, kept = self._levels(view, t)
            return matrix * levels[:, None, :], seen.noise + self._weighed(matrix, kept)
        alpha, sigma, spread, variance = (
            self.levels(view.x, t, field) for field in ("alpha", "sigma", "spread", "variance")
        )
        ratio, gain = variance / spread.clamp(min=1e-300), alpha / sigma**2
        closed = self._closed_form(view)
        if closed is None:
            slope, kept = self._by_backward(view, matrix, seen, t)
            return slope * gain, seen.noise + kept * ratio.mean()
        after = closed.given(self._gain(view, t)) if t < view.t else closed
        return after.times(matrix) * gain, seen.noise + after.between(matrix * ratio.sqrt())

    def _weighed(self, matrix: Tensor, weights: Float64[Tensor, "rows d"]) -> Tensor:
        """A diag(w) A': from A A', where that is known and all weights are alike."""
        if self._gram is not None and bool((weights == weights[0, 0]).all()):
            return weights[0, 0] * self._gram
        return (matrix * weights[:, None, :]) @ matrix.mT

    def _levels(self, view: View, t: int) -> tuple[Tensor, Tensor]:
        """How far the state at t <= view.t tells each element of x_0, and what variance it leaves.

        Both have shape ``(particle or 1, d)``.
        """
        slope, variance = (self.levels(view.x, t, field)[None] for field in ("slope", "variance"))
        if self.mode == "none" or t == 0:
            return slope, torch.zeros_like(variance)
        return (slope, variance) if self.mode == "scalar" else self._diagonal(view, t)

    def _closed_form(self, view: View) -> Covariance | None:
        """C_t, where every process knows it."""
        if not self.closed:
            return None
        parts = []
        for name in self.names:
            covariance = view.kernels[name].covariance
            assert covariance is not None
            diagonal, factor = covariance()
            parts.append(plated(diagonal.detach().double(), factor.detach().double()))
        whole = stack_covariances(parts)
        if self.mode == "diagonal" and whole.factor is not None:
            return Covariance(whole.diagonal + whole.factor.square().sum(-1))
        return whole

    def _gain(self, view: View, t: int) -> Tensor:
        """How much the signal-to-noise ratio rises from view.t to t."""
        now, then = (self.levels(view.x, at, "precision") for at in (view.t, t))
        return then - now

    def _diagonal(self, view: View, t: int) -> tuple[Tensor, Tensor]:
        """Row sums of the Jacobian in place of its diagonal (Boys et al. 2024, section 3.3)."""
        estimates = [view.execution.states[n][: view.batch].flatten(1) for n in self.names]
        (sums,) = (stack(each) for each in view.measure([torch.cat(estimates, 1)]))
        covariance = self._tweedie(view, sums, torch.ones_like(sums)).clamp(min=self._least(view))
        after = covariance / (1 + self._gain(view, t) * covariance)
        alpha, sigma, spread, variance = (
            self.levels(view.x, t, field) for field in ("alpha", "sigma", "spread", "variance")
        )
        return after * alpha / sigma**2, after * variance / spread.clamp(min=1e-300)

    def _least(self, view: View) -> float:
        """The least variance of x_0 given x_t that a network is believed."""
        spread = self.levels(view.x, view.t, "spread")
        return LEAST_VARIANCE * float(spread.mean())

    def _tweedie(self, view: View, slopes: Tensor, rows: Tensor) -> Tensor:
        """Covariances from slopes, by sigma_t^2 / alpha_t; from the data's scale in pure noise."""
        alpha, sigma, spread = (
            self.levels(view.x, view.t, field) for field in ("alpha", "sigma", "spread")
        )
        return torch.where(alpha > 0, slopes * (sigma**2 / alpha), rows * spread)

    def _by_backward(
        self, view: View, matrix: Tensor, seen: Observations, t: int
    ) -> tuple[Tensor, Tensor]:
        """One backward pass per observation; one step on in the space of the observations."""
        slopes = [stack(each) for each in view.measure(list(seen.mean.unbind(-1)))]
        rows = self._tweedie(view, torch.stack(slopes, 1), matrix)
        factor, inverse = root(matrix @ matrix.mT)
        inner = at_least(self._least(view), inverse @ rows @ matrix.mT @ inverse.mT)
        eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
        step = eye + self._gain(view, t).mean() * inner if t < view.t else eye.expand_as(inner)
        after = factor @ torch.linalg.solve(step, inverse @ rows)
        kept = factor @ torch.linalg.solve(step, inner) @ factor.mT
        return after, 0.5 * (kept + kept.mT)
