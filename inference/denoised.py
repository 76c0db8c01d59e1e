r"""The denoised likelihood: a twist from what the network already says about x_0.

Given x_t, the data is about :math:`x_0 \sim N(\hat x_0(x_t), C_t)`. A Gaussian observation with
residual r, operator A and noise D (``observations.py``) then looks ahead by

.. math:: \log \psi_t(x_t) = \log N(r; 0, D + A C_t A^\top),

and everything else by the log-mean-exp of the program over draws of x_0. Leaving out C_t makes the
twist overconfident: its weights may have infinite variance (Wu et al. 2023, arXiv 2306.17775, is
the case C_t = 0; Boys et al. 2024, arXiv 2310.06721, the case of a full Jacobian).

A network's estimate of a noisy state is a blurred mean of many images, and what a likelihood says
of it, a classifier above all, is too sure. So the look-ahead is *damped*: raised to a power of

.. math:: R_t^2 = \frac{\alpha_t^2 s^2}{\alpha_t^2 s^2 + \sigma_t^2},

the share of the data's variance that x_t explains (``benchmarks/damping.py``).

C_t is that of the *discretised* chain: with K the slope of the observations in the next state and R
the covariance that remains given it, :math:`D + A C_t A^\top = R + K V K^\top`, so that twist,
kernel and proposal agree exactly wherever the model is linear and Gaussian.
"""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from smcdiff.arguments import check_number, check_option, check_whole
from smcdiff.process import is_deterministic
from smcdiff.program import Program
from smcdiff.twist import Twist, TwistValue, View

from .linear_gaussian import (
    Covariance,
    law_covariance,
    log_normal,
    plated,
    stack,
    stack_covariances,
)
from .observations import Observations, constant_operator, observe, operator, stacked_levels

CovarianceName = Literal["auto", "none", "scalar", "diagonal", "jacobian"]
FEW_OBSERVATIONS = 4  # up to here a backward pass per observation is worth its price
DAMPING = 0.5  # benchmarks/damping.py
# The share of the usual variance that is left to every direction: at high noise half of the
# eigenvalues that a network's Jacobian suggests are negative, and a look-ahead that takes these for
# certainty is off by a hundred nats (48 sharp observations of an 8x8 digit).
LEAST_VARIANCE = 0.1
TINY = 1e-12  # a Gaussian to the power 0 has no finite covariance


class DenoisedLikelihood(Twist):
    r"""The program's likelihood at the denoised estimate.

    Args:
        covariance: C_t. ``"none"``: zero. ``"scalar"``: :math:`c_t I`, for data of the process's
            scale. ``"diagonal"``: the elements' own variances, from one backward pass (row sums of
            the Jacobian). ``"jacobian"``: :math:`(\sigma_t^2/\alpha_t)\, d\hat x_0/d x_t` in full:
            in closed form where the process has it, else by one backward pass per observation.
            ``"auto"``: the Jacobian where it is closed-form or there are few observations, else
            scalar.
        num_draws: draws of x_0 for sites that are not Gaussian (0: evaluate at the mean).
        gradient: whether the proposal will want gradients.
        curvature: whether it will want curvatures (None: where the Jacobian is known and the
            observations are linear; a scalar one may well be too narrow for data that is not
            Gaussian).
        damping: the power of R_t^2 above; 0 for none (None: 0.5, and 0 for Gaussian observations
            where the denoiser is exact).
    """

    def __init__(
        self,
        covariance: CovarianceName = "auto",
        num_draws: int = 8,
        gradient: bool = True,
        curvature: bool | None = None,
        damping: float | None = None,
    ) -> None:
        check_option("covariance", covariance, get_args(CovarianceName))
        check_whole("num_draws", num_draws, 0)
        check_number("damping", damping, 0, math.inf, "[)", or_none="as the program needs it")
        self.covariance, self._draws, self.gradient = covariance, num_draws, gradient
        self.curvature, self.damping = curvature, damping

    def prepare(self, program: Program) -> None:
        noised = {n for n, p in program.processes.items() if p.signal(program.num_steps)}
        self.names = tuple(n for n in program.processes if not program.sources[n].discrete)
        linear = noised == set(self.names)
        self.sites = tuple(
            n for n in program.gaussian_sites if linear and self._follows(program, n)
        )
        upstream = set(program.latents) - program.downstream
        self.others = tuple(
            n for n in program.likelihoods if n not in self.sites and n not in upstream
        )
        followed = set().union(*(program.likelihoods[n].parents for n in self.others))
        # What depends on tokens may have looked constant at those that the program was tried with.
        discrete = any(source.discrete for source in program.sources.values())
        self._averages = bool(followed & set(program.processes)) or (discrete and bool(self.others))
        self.operator, size = None, 0
        if self.sites:
            self.operator, size = constant_operator(program, self.sites, self.names)
        self._gram = None if self.operator is None else self.operator @ self.operator.mT
        self.closed = all(program.processes[n].closed_form for n in self.names)
        self.mode = self._choose(size)
        self._by_slope = self.mode == "jacobian" or (self.mode == "diagonal" and self.closed)
        affine = self.operator is not None  # elsewhere what holds at one state misleads at others
        self._curved = self._by_slope and affine if self.curvature is None else self.curvature
        self.offers_start = self._curved and affine
        through_network = bool(followed & set(self.names)) or (self.sites and not self._by_slope)
        self.measures_network = self.mode in ("diagonal", "jacobian") and not self.closed
        self.needs_gradient = bool(self.gradient and through_network) or self.measures_network
        self.needs_program_gradient = bool(self.sites) and self.operator is None

    def _follows(self, program: Program, site: str) -> bool:
        return program.likelihoods[site].parents & set(program.processes) <= set(self.names)

    def _choose(self, num_observations: int) -> CovarianceName:
        if not self.sites:
            return "none"
        if self.covariance != "auto":
            return self.covariance
        return "jacobian" if self.closed or num_observations <= FEW_OBSERVATIONS else "scalar"

    @property
    def num_draws(self) -> int:
        return self._draws if self._averages else 0

    def evaluate(self, view: View) -> TwistValue:
        others = self._average(view) * self._power(view, DAMPING)
        log_psi, surrogate, cache = others, others, {}
        if self.sites:
            seen = observe(view.execution, self.sites, view.batch)
            matrix = self._matrix(view, seen)
            slope, noise = self.linearise(view, matrix, seen, view.t - 1)
            spread = self._spread(view, matrix, seen, slope, noise)
            factor = torch.linalg.cholesky(spread)
            likelihood, solved = log_normal(seen.residual, factor)
            power = self._power(view, 0.0 if self.closed else DAMPING)
            solved = power * solved.detach()
            log_psi = log_psi + power * likelihood  # differentiable in the latents: rejuvenation
            if self._curved:
                local = {"slope": slope, "noise": noise, "total": factor.detach()}
                if power < 1:
                    local = {"slope": slope, "noise": noise / max(power, TINY)}
                cache = {name: _rows(part, view.batch) for name, part in local.items()}
            if self._by_slope or self._in_pure_noise(view):
                cache["direction"] = (slope.mT @ solved[..., None])[..., 0]
            else:
                surrogate = surrogate - (solved * seen.residual).sum(-1)
            if self._curved and view.t == view.program.num_steps:
                cache |= self._for_the_start(view, matrix, seen, power)
        if self.gradient and view.tracked and surrogate.requires_grad and self._moves(view):
            gradient = stack(view.gradient(surrogate.sum())) * self._advance(view)
            cache["direction"] = cache.get("direction", 0.0) + gradient
        return TwistValue(log_psi, cache)

    def _spread(
        self, view: View, matrix: Tensor, seen: Observations, slope: Tensor, noise: Tensor
    ) -> Tensor:
        """The covariance of the residuals given x_t: R + K V K', where the kernel is Gaussian."""
        laws = {n: view.kernels[n].law for n in self.names}
        variance = law_covariance(laws)
        if variance is not None and self.mode in ("none", "scalar") and variance.common:
            level = stacked_levels(view.program, self.names, view.x, view.t - 1, "slope")
            return noise + self._weighed(matrix, level**2 * variance.diagonal[0])
        if variance is not None:
            return noise + variance.between(slope)
        if all(is_deterministic(law) for law in laws.values()):
            return noise
        return self.linearise(view, matrix, seen, view.t)[1]

    def _power(self, view: View, usual: float) -> float:
        """What a look-ahead is raised to, if its usual damping is this."""
        damping = usual if self.damping is None else self.damping
        signals = [view.processes[n].signal(view.t) for n in self.names]
        if damping == 0 or not signals or None in signals:
            return 1.0
        explained = [
            stacked_levels(view.program, self.names, view.x, view.t, field)
            for field in ("alpha", "slope")
        ]
        return float((explained[0] * explained[1]).mean()) ** damping

    def _average(self, view: View) -> Float64[Tensor, " particle"]:
        """Log-mean-exp over draws of everything that is not linearised."""
        log_prob = view.log_prob(*self.others)
        if view.num_estimates == 1:
            return log_prob[0]
        draws = log_prob[1:] if self.names else log_prob
        return torch.logsumexp(draws, 0) - math.log(len(draws))

    def _moves(self, view: View) -> bool:
        """Whether a gradient at x_t says where x_{t-1} should go."""
        processes = [view.processes[n] for n in self.names]
        alike = all(p.shape_at(view.t) == p.shape_at(view.t - 1) for p in processes)
        return alike and not all(is_deterministic(view.kernels[n].law) for n in self.names)

    def _advance(self, view: View) -> Tensor | float:
        """d x_t / d x_{t-1} along the denoiser's level sets: turns gradients at t into t - 1."""
        if any(view.processes[n].signal(view.t) is None for n in self.names):
            return 1.0
        after, now = (
            stacked_levels(view.program, self.names, view.x, t, "slope")
            for t in (view.t - 1, view.t)
        )
        return torch.where(now > 0, after / now, 0.0)  # pure noise points nowhere

    def _in_pure_noise(self, view: View) -> bool:
        """Whether x_t says nothing about x_0: gradients in it are zero, wherever x_0 should go."""
        alpha = stacked_levels(view.program, self.names, view.x, view.t, "alpha")
        return not bool(alpha.any())

    def _for_the_start(
        self, view: View, matrix: Tensor, seen: Observations, power: float
    ) -> dict[str, Tensor]:
        """What a twisted start needs: the look-ahead from x_T itself."""
        slope, noise = self.linearise(view, matrix, seen, view.t)
        noise = noise / max(power, TINY)
        parts = {"start_slope": slope, "start_noise": noise, "start_residual": seen.residual}
        return {k: _rows(v, view.batch) for k, v in parts.items()}

    def _matrix(self, view: View, seen: Observations) -> Tensor:
        if self.operator is not None:
            return self.operator
        return operator(view.execution, seen.mean, view.batch, self.names).detach()

    # ---------------------------------------------------------------- K and R of the next state

    def linearise(
        self, view: View, matrix: Tensor, seen: Observations, t: int
    ) -> tuple[Tensor, Tensor]:
        """The slope and the noise of the observations in a state at t <= view.t."""
        if t == 0:
            return matrix, seen.noise

        def level(field: str, at: int = t) -> Tensor:
            return stacked_levels(view.program, self.names, view.x, at, field)

        slope, variance = level("slope"), level("variance")
        if self.mode == "none":
            return matrix * slope, seen.noise
        if self.mode == "scalar":
            return matrix * slope, seen.noise + self._weighed(matrix, variance)
        ratio = variance / level("spread").clamp(min=1e-300)
        closed = self._closed_form(view)
        if closed is not None:
            after = closed.given(self._gain(view, t)) if t < view.t else closed
            gain = level("alpha") / level("sigma") ** 2
            kept = after.between(matrix * ratio.sqrt())
            return after.times(matrix) * gain, seen.noise + kept
        if self.mode == "diagonal":
            return self._diagonal(view, matrix, seen, t, ratio)
        return self._by_backward(view, matrix, seen, t, ratio)

    def _weighed(self, matrix: Tensor, weights: Float64[Tensor, " d"]) -> Tensor:
        """A diag(w) A': from A A', where that is known and all weights are alike."""
        if self._gram is not None and bool((weights == weights[0]).all()):
            return weights[0] * self._gram
        return (matrix * weights) @ matrix.mT

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
        now, then = (
            stacked_levels(view.program, self.names, view.x, at, "precision") for at in (view.t, t)
        )
        return then - now

    def _diagonal(
        self, view: View, matrix: Tensor, seen: Observations, t: int, ratio: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Row sums of the Jacobian in place of its diagonal (Boys et al. 2024, section 3.3)."""
        estimates = [view.execution.states[n][: view.batch].flatten(1) for n in self.names]
        (sums,) = (stack(each) for each in view.measure([torch.cat(estimates, 1)]))
        covariance = self._tweedie(view, sums, torch.ones_like(sums)).clamp(min=self._least(view))
        after = covariance / (1 + self._gain(view, t) * covariance)
        gain = stacked_levels(view.program, self.names, view.x, t, "alpha")
        gain = gain / stacked_levels(view.program, self.names, view.x, t, "sigma") ** 2
        weighted = matrix * (after * ratio)[:, None, :]
        return matrix * (after * gain)[:, None, :], seen.noise + weighted @ matrix.mT

    def _least(self, view: View) -> float:
        """The least variance of x_0 given x_t that a network is believed."""
        spread = stacked_levels(view.program, self.names, view.x, view.t, "spread")
        return LEAST_VARIANCE * float(spread.mean())

    def _tweedie(self, view: View, slopes: Tensor, rows: Tensor) -> Tensor:
        """Covariances from slopes, by sigma_t^2 / alpha_t; from the data's scale in pure noise."""
        alpha, sigma, spread = (
            stacked_levels(view.program, self.names, view.x, view.t, field)
            for field in ("alpha", "sigma", "spread")
        )
        return torch.where(alpha > 0, slopes * (sigma**2 / alpha), rows * spread)

    def _by_backward(
        self, view: View, matrix: Tensor, seen: Observations, t: int, ratio: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One backward pass per observation; one step on in the space of the observations."""
        slopes = [stack(each) for each in view.measure(list(seen.mean.unbind(-1)))]
        rows = self._tweedie(view, torch.stack(slopes, 1), matrix)
        factor, inverse = _root(matrix @ matrix.mT)
        inner = _at_least(self._least(view), inverse @ rows @ matrix.mT @ inverse.mT)
        eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
        step = eye + self._gain(view, t).mean() * inner if t < view.t else eye.expand_as(inner)
        after = factor @ torch.linalg.solve(step, inverse @ rows)
        level = stacked_levels(view.program, self.names, view.x, t, "alpha")
        gain = level / stacked_levels(view.program, self.names, view.x, t, "sigma") ** 2
        kept = factor @ torch.linalg.solve(step, inner) @ factor.mT * ratio.mean()
        return after * gain, seen.noise + 0.5 * (kept + kept.mT)


def _at_least(variance: float, matrix: Tensor) -> Tensor:
    """The nearest symmetric matrix without smaller eigenvalues."""
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    return (vectors * values.clamp(min=variance)[..., None, :]) @ vectors.mT


def _root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """L with L L' = matrix, and its pseudo-inverse: observations may depend on each other."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > 1e-12 * values[..., -1:]
    root = torch.where(kept, values, 1.0).sqrt() * kept
    inverse = torch.where(kept, 1 / root, 0.0)
    return vectors * root[..., None, :], inverse[..., :, None] * vectors.mT


def _rows(matrix: Tensor, batch: int) -> Tensor:
    return matrix.expand(batch, *matrix.shape[1:])
