r"""What people ask of weighted particles: averages with their errors, and equally weighted draws.

With :math:`W_{r,i}` the weights of all runs r and particles i of a problem, adding to one,

.. math:: \hat\mu = \sum_{r,i} W_{r,i} f_{r,i}, \qquad
          \mathrm{se}^2 = \frac{G}{G - 1} \sum_g
                          \Big(\sum_{(r,i) \in g} W_{r,i} (f_{r,i} - \hat\mu)\Big)^2,

where the G groups g share nothing: particles of one run with one root, N R groups at the start.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from .arguments import check_whole
from .resampling import RESAMPLERS, check_scheme
from .weights import check_log_weights, normalise

FEWEST = 2.0  # effective roots, below which their scatter says nothing


@dataclass(frozen=True)
class Expectation:
    r"""A posterior mean.

    Attributes:
        mean, sd: of the posterior, with shape ``(*problems, *quantity)``.
        standard_error: the Monte Carlo error of the mean, with the same shape; on average no less
            than the truth (as :func:`~smcdiff.evidence.relative_variance`). nan where fewer than
            two roots (an effective number) carry the weight. What no particle has met, it does not
            know.
    """

    mean: Float64[Tensor, "*quantity"]
    sd: Float64[Tensor, "*quantity"]
    standard_error: Float64[Tensor, "*quantity"]


def expectation(
    values: Tensor,
    weights: Float64[Tensor, "*problems run particle"],
    roots: Int64[Tensor, "*problems run particle"],
) -> Expectation:
    """Mean, standard deviation and Monte Carlo error of weighted values.

    Args:
        values: one per particle, with shape ``(*problems, run, particle, *quantity)``.
        weights: adding to one over runs and particles.
        roots: the index in the first generation of each particle's ancestor.

    Raises:
        ValueError: the values do not begin with the shape of the weights.
    """
    lead = weights.dim()
    if values.shape[:lead] != weights.shape:
        raise ValueError(
            "a quantity has one value per particle, with shape "
            f"({', '.join(map(str, weights.shape))}, ...), but got {tuple(values.shape)}: reduce "
            f"over the dimensions behind the first {lead}"
        )
    shape = (*values.shape[: lead - 2], *values.shape[lead:])
    flat = values.double().reshape(*weights.shape, -1)
    mean = (weights[..., None] * flat).sum((-3, -2), keepdim=True)
    offsets = flat - mean
    variance = (weights[..., None] * offsets.square()).sum((-3, -2))
    error = _standard_error(weights[..., None] * offsets, weights, roots)
    parts = mean[..., 0, 0, :], variance.sqrt(), error
    return Expectation(*(part.reshape(shape) for part in parts))


def _standard_error(
    shares: Float64[Tensor, "*problems run particle k"],
    weights: Float64[Tensor, "*problems run particle"],
    roots: Int64[Tensor, "*problems run particle"],
) -> Float64[Tensor, "*problems k"]:
    index = roots[..., None].expand(shares.shape)
    groups = torch.zeros_like(shares).scatter_add(-2, index, shares).flatten(-3, -2)
    carried = torch.zeros_like(weights).scatter_add(-1, roots, weights).flatten(-2)
    effective = 1 / carried.square().sum(-1, keepdim=True)
    count = groups.shape[-2]
    error = (groups.square().sum(-2) * (count / max(count - 1, 1))).sqrt()
    return torch.where(effective < FEWEST, math.nan, error)


def draw(
    log_weights: Float64[Tensor, "*runs particle"], n: int, scheme: str = "systematic"
) -> Int64[Tensor, "*runs n"]:
    r"""Indices of equally weighted draws from every run, in random order.

    A scheme gives as many offspring as it is given particles. So a run is padded with particles of
    weight zero up to a multiple c n of n, and every c-th of the offspring in their order is kept,
    from a random one on: any scheme stays unbiased, and "systematic" is systematic with n points.

    Args:
        log_weights: unnormalised.
        n: draws per run, any positive number.
        scheme: a key of ``RESAMPLERS``.

    Raises:
        ValueError: n is not positive, the scheme is unknown, or a log-weight is NaN or +inf.
        DegenerateWeights: all weights of a run are zero.
    """
    check_whole("n, the number of draws per run,", n)
    check_scheme(scheme)
    check_log_weights(log_weights, "resampling")
    runs, size = log_weights.shape[:-1], log_weights.shape[-1]
    stride = -(-size // n)
    padded = torch.nn.functional.pad(normalise(log_weights), (0, n * stride - size))
    place = torch.arange(n * stride, device=padded.device).expand_as(padded)
    offspring = RESAMPLERS[scheme](padded.contiguous())
    ordered = place.flatten().repeat_interleave(offspring.flatten()).reshape(padded.shape)
    first = torch.randint(stride, (*runs, 1), device=padded.device)
    kept = ordered.gather(-1, first + stride * torch.arange(n, device=padded.device))
    return kept.gather(-1, torch.rand(*runs, n, device=padded.device).argsort(-1))
