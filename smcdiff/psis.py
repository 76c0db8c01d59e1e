r"""Pareto-smoothed importance sampling: how heavy is the tail of the weights?

The M largest of N weights are taken as draws from a generalised Pareto law above a cutoff c,

.. math:: p(w) = \frac{1}{\sigma} \left(1 + k \, \frac{w - c}{\sigma}\right)^{-1/k - 1},
          \qquad M = \lceil \min(N / 5, 3 \sqrt{N / r}) \rceil,

with r the relative efficiency of the draws (1 if independent). Its shape k says how many moments
the weights have, about 1/k of them: averages are reliable for k < 0.7, hopeless for k > 1.
Smoothing replaces the M largest weights by the quantiles of the fitted law.

Compute k *before* resampling: copies hide the tail.

References:
    Pareto Smoothed Importance Sampling (Vehtari, Simpson, Gelman, Yao, Gabry, 2024)
    https://jmlr.org/papers/v25/19-556.html

    A New and Efficient Estimation Method for the Generalized Pareto Distribution (Zhang, Stephens,
    2009)
"""

import math
import sys

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from .weights import check_log_weights

FEWEST = 25  # particles of non-zero weight, below which a fifth of them is no tail
DISTINCT = 5  # different values that a fit needs
EQUAL = 1e-9  # log-weights that differ by less than this are constant
SAME = 1e-12  # neighbours in the tail that differ by less than this are ties
UNDERFLOW = math.log(sys.float_info.min)


def khat(
    log_weights: Float64[Tensor, "*runs particle"], reff: float = 1.0
) -> Float64[Tensor, "*runs"]:
    """Shape k of the tail of the weights; arguments, cases and errors as in ``pareto_smooth``.

    Returns:
        The estimates, with shape ``(*runs)``.
    """
    return pareto_smooth(log_weights, reff)[1]


def pareto_smooth(
    log_weights: Float64[Tensor, "*runs particle"], reff: float = 1.0
) -> tuple[Float64[Tensor, "*runs particle"], Float64[Tensor, "*runs"]]:
    r"""Smooth the largest weights of every run, and estimate the shape of their tail.

    +-----------------------------------------------------------+----------+-----------------+
    | run                                                       | k        | weights         |
    +===========================================================+==========+=================+
    | fewer than 25 particles of non-zero weight                | nan      | unchanged       |
    +-----------------------------------------------------------+----------+-----------------+
    | weights that are not zero are equal: no tail              | -inf     | unchanged       |
    +-----------------------------------------------------------+----------+-----------------+
    | fewer than 5 different values above the cutoff (ties)     | nan      | unchanged       |
    +-----------------------------------------------------------+----------+-----------------+
    | any other; weights of zero count in N and stay zero       | a number | tail smoothed   |
    +-----------------------------------------------------------+----------+-----------------+

    nan says "not estimable": it is no verdict.

    Args:
        log_weights: unnormalised log-weights, with shape ``(*runs, particle)``; -inf is weight
            zero.
        reff: relative efficiency r in (0, ∞) of the draws.

    Returns:
        The smoothed log-weights on the scale of the input (not normalised, none above its largest),
        with shape ``(*runs, particle)``, and k, with shape ``(*runs)``.

    Raises:
        ValueError: reff is not positive, or a log-weight is NaN or +inf.
        DegenerateWeights: all weights of a run are zero.
    """
    if not reff > 0:
        raise ValueError(f"reff is a relative efficiency and must be positive; got {reff}.")
    check_log_weights(log_weights, "Pareto smoothing")
    smoothed, shape = log_weights.clone(), log_weights.new_full(log_weights.shape[:-1], math.nan)
    if log_weights.shape[-1] < FEWEST:  # thousands of small runs need no loop
        return smoothed, shape
    for run in range(shape.numel()):
        row = smoothed.view(-1, log_weights.shape[-1])[run]
        shape.view(-1)[run] = _smooth(row, reff)
    return smoothed, shape


def _smooth(row: Float64[Tensor, " particle"], reff: float) -> Tensor | float:
    """Smooth one run in place and return its k."""
    peak = row.max()
    known = row[row.isfinite()]
    if len(known) < FEWEST:
        return math.nan
    if peak - known.min() < EQUAL:
        return -math.inf
    tail, cutoff = _tail(row - peak, reff)
    excess = cutoff.exp() * (row[tail] - peak - cutoff).expm1()
    if 1 + int((row[tail].diff() > SAME).sum()) < DISTINCT:
        return math.nan
    shape, scale = _fit(excess)
    if not shape.isfinite():
        return math.nan
    quantiles = (torch.arange(len(tail), device=row.device, dtype=row.dtype) + 0.5) / len(tail)
    weights = cutoff.exp() + _quantile(quantiles, shape, scale)
    row[tail] = peak + weights.log().clamp(max=0)
    return shape


def _tail(
    row: Float64[Tensor, " particle"], reff: float
) -> tuple[Int64[Tensor, " tail"], Float64[Tensor, ""]]:
    """Where the largest log-weights are, from low to high, and the cutoff just below them."""
    count = len(row)
    size = math.ceil(min(count / 5, 3 * math.sqrt(count / reff)))
    values, places = row.sort()
    cutoff = values[-size - 1].clamp(min=UNDERFLOW)
    return places[values > cutoff], cutoff


def _fit(excess: Float64[Tensor, " tail"]) -> tuple[Float64[Tensor, ""], Float64[Tensor, ""]]:
    r"""Shape and scale by the rule of Zhang and Stephens, for ascending excesses over the cutoff.

    The profile likelihood of :math:`b = -k / \sigma` is averaged over a grid; the shape is then
    drawn towards 1/2 as by ten more observations.
    """
    count = len(excess)
    size = 30 + math.isqrt(count)
    grid = 1 - (size / (torch.arange(size, device=excess.device, dtype=excess.dtype) + 0.5)).sqrt()
    grid = grid / (3 * excess[int(count / 4 + 0.5) - 1]) + 1 / excess[-1]
    shapes = (-grid[:, None] * excess).log1p().mean(-1)
    weights = (count * ((-grid / shapes).log() - shapes - 1)).softmax(0)
    weights = weights.where(weights >= 10 * sys.float_info.epsilon, 0.0)
    slope = (grid * weights).sum() / weights.sum()
    shape = (-slope * excess).log1p().mean()
    return (count * shape + 10 * 0.5) / (count + 10), -shape / slope


def _quantile(
    probability: Float64[Tensor, " tail"], shape: Float64[Tensor, ""], scale: Float64[Tensor, ""]
) -> Float64[Tensor, " tail"]:
    """Quantiles of the generalised Pareto law; exponential where its shape is zero."""
    rate = -(-probability).log1p()
    if shape.abs() < sys.float_info.epsilon:
        return scale * rate
    return scale * (shape * rate).expm1() / shape
