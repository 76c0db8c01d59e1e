r"""The evidence log Z: from independent runs, and from the genealogy of one.

Every run estimates Z without bias, its logarithm not:
:math:`\mathbb{E} \log \hat Z \approx \log Z - \tfrac12 \mathrm{Var} \log \hat Z`. Runs are
therefore averaged before the logarithm is taken,

.. math:: \log \hat Z = \log \frac{1}{R} \sum_r \hat Z_r .

What keeps :math:`\hat Z_r` unbiased: resampling when the effective sample size asks for it, by any
unbiased scheme; proposals chosen from earlier particles of the same sweep; a twist or a temperature
chosen from the particles at hand, if the value that was added to the log-weights is the one
subtracted later. **What forfeits it**: moves (rejuvenation) whose step, covariance or target is
tuned on the particles of the same sweep; dropping or repeating runs that look bad; stopping, or
choosing the number of particles or steps, by what a run has shown. Learn in one sweep, then
estimate in a fresh one.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int, Int64
from torch import Tensor

from .resampling import check_scheme
from .weights import log_mean_exp, normalise

TOLERATED_SPREAD = 1.0  # sd of log Z over runs, beyond which few runs make the average
TOLERATED_ERROR = 0.5  # of a single run: beyond it, fewer than four roots carry the weight


@dataclass(frozen=True)
class Evidence:
    r"""The evidence of one or many problems, and how far to trust it.

    Attributes:
        log_evidence: log-mean-exp of the runs, with shape ``(*problems)``.
        standard_error: of ``log_evidence``, by the delta method from the runs' :math:`\hat Z_r`,
            with shape ``(*problems)``; nan for one run. It cannot exceed 1: look at ``spread`` too.
        spread: standard deviation of log Z over the runs, with shape ``(*problems)``; nan for one
            run, inf where some runs have no weight at all.
        single_run_standard_error: of the log Z of *one* run, from ``relative_variance``, root mean
            square over the runs, with shape ``(*problems)``; nan where unknown. It cannot exceed 1
            either.
        num_runs: R.
    """

    log_evidence: Float64[Tensor, "*problems"]
    standard_error: Float64[Tensor, "*problems"]
    spread: Float64[Tensor, "*problems"]
    single_run_standard_error: Float64[Tensor, "*problems"]
    num_runs: int

    @property
    def reliable(self) -> Bool[Tensor, "*problems"]:
        """Where the spread is at most 1, or the standard error of a lone run at most 1/2.

        False where that is unknown.
        """
        if self.num_runs > 1:
            return self.spread <= TOLERATED_SPREAD
        return self.single_run_standard_error <= TOLERATED_ERROR

    @property
    def message(self) -> str:
        """One sentence on what is wrong and what to do; empty if all is well."""
        wrong = int((~self.reliable).sum())
        if wrong == 0:
            return ""
        where = f" in {wrong} of {self.reliable.numel()} problems" if self.reliable.ndim else ""
        if self.num_runs == 1:
            return (
                f"log Z comes from one run whose error is above {TOLERATED_ERROR} or unknown"
                f"{where}: use four or more runs, and more particles."
            )
        worst = float(self.spread.max())
        return (
            f"log Z differs between runs by {worst:.2g} (standard deviation; tolerated: "
            f"{TOLERATED_SPREAD}){where}: the largest runs make the average, which is likely to be "
            "too low. Use more particles or a better twist."
        )


def combine_runs(
    log_evidence: Float64[Tensor, "*problems run"],
    variances: Float64[Tensor, "*problems run"] | None = None,
) -> Evidence:
    r"""Pool independent runs of each problem; problems are never pooled.

    Args:
        log_evidence: :math:`\log \hat Z_r`, with shape ``(*problems, run)``; -inf is an estimate of
            zero.
        variances: ``relative_variance`` of each run, with shape ``(*problems, run)``.

    Returns:
        The evidence, each field with shape ``(*problems)``.

    Raises:
        ValueError: there is no run, or an estimate is NaN or +inf.
    """
    runs = log_evidence.shape[-1]
    if runs == 0:
        raise ValueError("the evidence needs at least one run, got none.")
    if bool((log_evidence.isnan() | log_evidence.isposinf()).any()):
        raise ValueError(
            "the log-evidence of a run is NaN or +inf; expected a number, or -inf for an "
            f"estimate of zero, got {log_evidence.tolist()}."
        )
    peak = log_evidence.amax(-1, keepdim=True)
    centred = log_evidence - torch.where(peak.isfinite(), peak, 0.0)
    spread = torch.where(centred.isneginf().any(-1), math.inf, _deviation(centred))
    estimates = centred.exp()
    error = _deviation(estimates) / math.sqrt(runs) / estimates.mean(-1)
    unknown = torch.full_like(spread, math.nan)
    single = unknown if variances is None else variances.mean(-1).clamp(min=0).sqrt()
    if runs == 1:
        spread = error = unknown
    return Evidence(log_mean_exp(log_evidence), error, spread, single, runs)


def root_shares(
    log_weights: Float64[Tensor, "*runs particle"], roots: Int64[Tensor, "*runs particle"]
) -> Float64[Tensor, "*runs particle"]:
    r"""Final weight :math:`S_j = \sum_{i: r_i = j} W_i` that descends from particle j at the start.

    :math:`1 / \sum_j S_j^2` is the effective number of surviving roots.

    Args:
        log_weights: final log-weights, with shape ``(*runs, particle)``.
        roots: index in the first generation of each particle's ancestor, with shape
            ``(*runs, particle)``.

    Returns:
        Shares that add to one, with shape ``(*runs, particle)``.
    """
    weights = normalise(log_weights)
    return torch.zeros_like(weights).scatter_add(-1, roots, weights)


def relative_variance(
    log_weights: Float64[Tensor, "*runs particle"],
    roots: Int64[Tensor, "*runs particle"],
    num_resamplings: Int[Tensor, "*runs"] | int,
    scheme: str = "systematic",
) -> Float64[Tensor, "*runs"]:
    r"""Relative variance of :math:`\hat Z`, from one run, by who descends from whom.

    With :math:`S_j` the share of the final weight that descends from the j-th particle of the first
    generation,

    .. math:: V = 1 - \left(\frac{N}{N - 1}\right)^{m + 1} \Big(1 - \sum_j S_j^2\Big), \qquad
              \mathbb{E}[\hat Z^2 V] = \mathrm{Var}(\hat Z),

    where m is the number of *multinomial* resamplings: each lets a pair of particles meet in one
    ancestor with probability 1/N by chance alone, and the power takes this out again; the one more
    is the first draw. Without resampling V is the variance of importance weights,
    :math:`(N \sum_i W_i^2 - 1) / (N - 1)`, exactly.

    The identity is exact for multinomial resampling at fixed steps, and holds in the limit of many
    particles where the effective sample size decides. Pairs rarely meet by chance under the other
    schemes. Taking m = ``num_resamplings`` there would be far too low (measured: -0.82 for 0.001
    after 19 resamplings of nearly equal weights), so m = 0 is taken, which is conservative.
    Measured excess, resampled where the effective sample size is below N/2: about 5 % for
    systematic and SSP, 10 % for residual and stratified; it grows where nearly equal weights are
    resampled at every step, to 1/(4N) per resampling (residual: 1/N).

    V is at most 1, reached when one root is left: the run then knows of its error only that it is
    large. It can fall below zero by chance.

    Args:
        log_weights: final log-weights since the last resampling, with shape ``(*runs, particle)``.
        roots: index in the first generation of each particle's ancestor, with shape
            ``(*runs, particle)``.
        num_resamplings: how often each run was resampled, with shape ``(*runs)``, or one number for
            all.
        scheme: the key of ``RESAMPLERS`` that was used.

    Returns:
        The estimates of :math:`\mathrm{Var}(\hat Z) / Z^2`, with shape ``(*runs)``; nan for one
        particle, or if all weights are zero.

    Raises:
        ValueError: the scheme is unknown.

    References:
        Variance estimation in the particle filter (Lee, Whiteley, 2018)
        https://arxiv.org/abs/1509.00394

        A general theory of particle filters in hidden Markov models and some applications (Chan,
        Lai, 2013)
        https://arxiv.org/abs/1312.5114
    """
    check_scheme(scheme)
    count = log_weights.shape[-1]
    met = root_shares(log_weights, roots).square().sum(-1)
    known = (met > 0) & (count > 1)
    by_chance = num_resamplings if scheme == "multinomial" else 0
    growth = (1 + by_chance * torch.ones_like(met)) * -math.log1p(-1 / max(count, 2))
    return torch.where(known, 1 - growth.exp() * (1 - met), math.nan)


def _deviation(values: Float64[Tensor, "*problems run"]) -> Float64[Tensor, "*problems"]:
    """Standard deviation over runs, exactly zero for equal ones; nan, unwarned, for one run."""
    values = values - values[..., :1]
    centred = values - values.mean(-1, keepdim=True)
    return (centred.square().sum(-1) / (values.shape[-1] - 1)).sqrt()
