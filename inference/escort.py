r"""The escort path: how far log-weights may be believed at once.

Paths drawn from a law P, with log-weights :math:`\ell = \log \gamma / P`, represent the target only
as far as there are enough of them. The law nearest to the target within a trust region,

.. math:: q^* = \arg\min_q \mathrm{KL}(q \,\|\, \gamma / Z) \quad \text{subject to} \quad
          \mathrm{KL}(q \,\|\, P) \le \epsilon,

is the *escort* :math:`q^* \propto P\, e^{\tau \ell}` (Blessing et al. 2025, arXiv 2508.12511,
eq. 13-14). Its exponent solves :math:`K(\tau) = \epsilon`, or is 1 where :math:`K(1) \le \epsilon`:

.. math:: K(\tau) = E_{q_\tau}[\tau \ell] - \log E_P[e^{\tau \ell}], \qquad
          K'(\tau) = \tau\, \mathrm{Var}_{q_\tau}(\ell) \ge 0 .

Samples are the last axis; every leading axis is a problem of its own. Base log-weights b, where
there are any, say that samples stand for P by the weights :math:`e^{b}` only (they were drawn from
something else). A sample of log-weight -inf belongs to no escort, and does not count.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from smcdiff.arguments import check_number
from smcdiff.weights import check_log_weights, effective_sample_size, normalise

HALVINGS = 60
NODES = 201  # of the integral in predict_iterations: dense where the tilt sets in

LogWeights = Float[Tensor, "*problems sample"]
PerProblem = Float[Tensor, "*problems"]


@dataclass(frozen=True)
class TrustRegion:
    """How large a step may be: a bound on its divergence, or on what it costs in samples.

    Args:
        epsilon: the largest KL(q || P), in nats.
        ess_target: the effective sample size that q must keep, as a share of that of P (None:
            epsilon decides). A divergence bounds the effective sample size from above only.

    Raises:
        ValueError: epsilon is not positive, or the share is not between 0 and 1.
    """

    epsilon: float = 0.5
    ess_target: float | None = None

    def __post_init__(self) -> None:
        check_number("epsilon, a divergence in nats,", self.epsilon, 0, math.inf, "(]")
        share = "ess_target, a share of the samples,"
        check_number(share, self.ess_target, 0, 1, "()", or_none="epsilon decides")

    def never_binds(self, num_samples: int) -> bool:
        """Whether so many samples cannot diverge enough: K is at most log N."""
        return self.ess_target is None and self.epsilon >= math.log(num_samples)

    def exponent(
        self, log_weights: LogWeights, log_base: LogWeights | None = None, where: str = "escort"
    ) -> PerProblem:
        """tau in (0, 1], by bisection.

        Args:
            log_weights: l, with shape ``(*problems, sample)``.
            log_base: b, with the same shape (None: zero).
            where: the place to name when log-weights are refused.

        Raises:
            ValueError: a log-weight is NaN or +inf.
            DegenerateWeights: all samples of a problem have weight zero.
        """
        logs, base = _prepare(log_weights, log_base, where)
        low, high = torch.zeros_like(logs[..., 0]), torch.ones_like(logs[..., 0])
        within = self._within(logs, base, high)
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            good = self._within(logs, base, middle)
            low, high = torch.where(good, middle, low), torch.where(good, high, middle)
        return torch.where(within, 1.0, 0.5 * (low + high))

    def _within(self, logs: Tensor, base: Tensor, tau: Tensor) -> Tensor:
        if self.ess_target is None:
            return _divergence(logs, base, tau) <= self.epsilon
        ess = effective_sample_size(base + tau[..., None] * logs)
        return ess >= self.ess_target * effective_sample_size(base)


def divergence(
    log_weights: LogWeights, tau: PerProblem | float, log_base: LogWeights | None = None
) -> PerProblem:
    """K(tau), the divergence of the escort from the law of the samples."""
    logs, base = _prepare(log_weights, log_base, "divergence")
    return _divergence(logs, base, torch.as_tensor(tau, dtype=logs.dtype, device=logs.device))


def escort_weights(
    log_weights: LogWeights, tau: PerProblem | float, log_base: LogWeights | None = None
) -> LogWeights:
    """The normalised weights of the escort."""
    logs, base = _prepare(log_weights, log_base, "escort_weights")
    tau = torch.as_tensor(tau, dtype=logs.dtype, device=logs.device)
    return normalise(base + tau[..., None] * logs)


def predict_iterations(
    log_weights: LogWeights, epsilon: float, log_base: LogWeights | None = None
) -> PerProblem:
    r"""About how many steps of divergence epsilon lead along the escort path to the target,

    .. math:: \frac{1}{\sqrt{2\epsilon}} \int_0^1 \sqrt{\mathrm{Var}_{q_s}(\ell)}\, ds

    (its length in Fisher-Rao distance over that of a step; exact projections take this number,
    rounded to one of its neighbours). Few samples underestimate it: they do not reach the target.
    """
    logs, base = _prepare(log_weights, log_base, "predict_iterations")
    nodes = torch.linspace(0, 1, NODES, dtype=logs.dtype, device=logs.device).square()
    speeds = torch.stack([_variance(logs, normalise(base + s * logs)).sqrt() for s in nodes], -1)
    return torch.trapezoid(speeds, nodes, dim=-1) / math.sqrt(2 * epsilon)


def _prepare(logs: Tensor, base: Tensor | None, where: str) -> tuple[Tensor, Tensor]:
    """Centred log-weights, finite, and base log-weights that are -inf where they were not."""
    check_log_weights(logs, where)
    logs = logs.double()
    base = torch.zeros_like(logs) if base is None else base.double()
    base = torch.where(logs.isneginf(), -torch.inf, base)
    check_log_weights(base, where)
    peak = logs.amax(-1, keepdim=True)
    return torch.where(base.isneginf(), 0.0, logs - peak), base


def _divergence(logs: Tensor, base: Tensor, tau: Tensor) -> Tensor:
    tilt = tau[..., None] * logs
    log_mean = (base + tilt).logsumexp(-1) - base.logsumexp(-1)
    return (normalise(base + tilt) * tilt).sum(-1) - log_mean


def _variance(logs: Tensor, weights: Tensor) -> Tensor:
    mean = (weights * logs).sum(-1, keepdim=True)
    return (weights * (logs - mean).square()).sum(-1)
