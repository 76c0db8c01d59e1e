r"""The denoised likelihood: a twist from what the network already says about x_0.

Given x_t, the data is about :math:`x_0 \sim N(\hat x_0(x_t), C_t)`. A Gaussian observation with
residual r, operator A and noise D (``linearised.py``) then looks ahead by

.. math:: \log \psi_t(x_t) = \log N(r; 0, D + A C_t A^\top),

and everything else by the log-mean-exp of the program over draws of x_0. Leaving out C_t makes the
twist overconfident: its weights may have infinite variance (Wu et al. 2023, arXiv 2306.17775, is
the case C_t = 0; Boys et al. 2024, arXiv 2310.06721, the case of a full Jacobian).

A network's estimate of a noisy state is a blurred mean of many images, and what a likelihood says
of it, a classifier above all, is too sure. So the look-ahead is *damped*: raised to a power of

.. math:: R_t^2 = \frac{\alpha_t^2 s^2}{\alpha_t^2 s^2 + \sigma_t^2},

the share of the data's variance that x_t explains (``benchmarks/damping.py``).
"""

import math
from typing import get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from smcdiff.arguments import check_number, check_option, check_whole
from smcdiff.program import Program
from smcdiff.twist import Twist, TwistValue, View

from .linear_gaussian import stack
from .linearised import CovarianceName, Linearised, Look
from .observations import Observations, observe

DAMPING = 0.5  # benchmarks/damping.py
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
        self.gaussian = Linearised(program, self.sites, self.names, self.covariance)
        by_slope, closed = self.gaussian.by_slope, self.gaussian.closed
        affine = (
            self.gaussian.operator is not None
        )  # else what holds at one state misleads at others
        self._curved = by_slope and affine if self.curvature is None else self.curvature
        self.offers_start = self._curved and affine
        through_network = bool(followed & set(self.names)) or (self.sites and not by_slope)
        self.measures_network = self.gaussian.mode in ("diagonal", "jacobian") and not closed
        self.needs_gradient = bool(self.gradient and through_network) or self.measures_network
        self.needs_program_gradient = bool(self.sites) and not affine

    def _follows(self, program: Program, site: str) -> bool:
        return program.likelihoods[site].parents & set(program.processes) <= set(self.names)

    @property
    def num_draws(self) -> int:
        return self._draws if self._averages else 0

    def evaluate(self, view: View) -> TwistValue:
        others = self._average(view) * self._power(view, DAMPING)
        log_psi, surrogate, cache = others, others, {}
        if self.sites:
            seen = observe(view.execution, self.sites, view.batch)
            look = self.gaussian.look(view, seen, self._curved)
            power = self._power(view, 0.0 if self.gaussian.closed else DAMPING)
            solved = power * look.solved.detach()
            log_psi = log_psi + power * look.log_prob  # differentiable in latents: rejuvenation
            if self._curved:
                cache = self._curvature(view, seen, look, power)
            if self.gaussian.by_slope or self._in_pure_noise(view):
                cache["direction"] = look.pull(solved)
            else:
                surrogate = surrogate - (solved * seen.residual).sum(-1)
        if self.gradient and view.tracked and surrogate.requires_grad and self._moves(view):
            gradient = stack(view.gradient(surrogate.sum())) * self._advance(view)
            cache["direction"] = cache.get("direction", 0.0) + gradient
        return TwistValue(log_psi, cache)

    def _power(self, view: View, usual: float) -> float:
        """What a look-ahead is raised to, if its usual damping is this."""
        damping = usual if self.damping is None else self.damping
        signals = [view.processes[n].signal(view.t) for n in self.names]
        if damping == 0 or not signals or None in signals:
            return 1.0
        explained = [self.gaussian.levels(view.x, view.t, field) for field in ("alpha", "slope")]
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
        return alike and not self.gaussian.deterministic(view)

    def _advance(self, view: View) -> Tensor | float:
        """d x_t / d x_{t-1} along the denoiser's level sets: turns gradients at t into t - 1."""
        if any(view.processes[n].signal(view.t) is None for n in self.names):
            return 1.0
        after, now = (self.gaussian.levels(view.x, t, "slope") for t in (view.t - 1, view.t))
        return torch.where(now > 0, after / now, 0.0)  # pure noise points nowhere

    def _in_pure_noise(self, view: View) -> bool:
        """Whether x_t says nothing about x_0: gradients in it are zero, wherever x_0 should go."""
        alpha = self.gaussian.levels(view.x, view.t, "alpha")
        return not bool(alpha.any())

    def _curvature(
        self, view: View, seen: Observations, look: Look, power: float
    ) -> dict[str, Tensor]:
        """What a curved proposal needs; and a twisted start, the look-ahead from x_T itself."""
        parts = dict(look.parts)
        if power < 1:
            parts = {"slope": parts["slope"], "noise": parts["noise"] / max(power, TINY)}
        if view.t == view.program.num_steps:
            slope, noise = self.gaussian.start(view, seen)
            parts |= {"start_slope": slope, "start_noise": noise / max(power, TINY)}
            parts["start_residual"] = seen.residual
        return {name: _rows(part, view.batch) for name, part in parts.items()}


def _rows(matrix: Tensor, batch: int) -> Tensor:
    return matrix.expand(batch, *matrix.shape[1:])
