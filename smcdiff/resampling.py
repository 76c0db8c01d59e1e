r"""Resampling: particles are copied or dropped so that all weights become equal again.

A scheme turns the probabilities :math:`W_i` of N particles into numbers of offspring :math:`O_i`
with

.. math:: \sum_i O_i = N, \qquad \mathbb{E}\, O_i = N W_i, \qquad W_i = 0 \Rightarrow O_i = 0.

``RESAMPLERS`` holds the schemes by name. A new one is one function from probabilities to offspring,
with any axes in front of the particles, and one entry there; the contract tests then apply to it.
Random numbers come from torch's global stream on the device of the weights.

Cumulative weights are counted in units of 2⁻⁵³ as integers. Integer sums do not round: a particle
of weight zero has an interval of length exactly zero, the last interval ends where the sum does,
and a parallel scan on another device gives the same result in any order.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from .arguments import check_kind
from .weights import check_log_weights, normalise

Resampler = Callable[[Tensor], Tensor]
UNIT = 2.0**53  # grid points in [0, 1]: the resolution of a float64 just below one
SNAP = 1e-12  # N W_i this near (relatively) to a whole number is that number


def resample(
    log_weights: Float[Tensor, "*runs particle"], scheme: str = "systematic"
) -> Int64[Tensor, "*runs particle"]:
    """Draw ancestors in proportion to the weights, in every run by itself.

    A particle that survives keeps its place (``ancestors[..., i] == i``); further copies of
    survivors fill the places of those that did not.

    Args:
        log_weights: unnormalised log-weights, with shape ``(*runs, particle)``.
        scheme: a key of ``RESAMPLERS``.

    Returns:
        The index of each particle's ancestor in its own run, with shape ``(*runs, particle)``.

    Raises:
        ValueError: the scheme is unknown, or a log-weight is NaN or +inf.
        DegenerateWeights: all weights of a run are zero.
    """
    check_scheme(scheme)
    check_kind("log_weights", log_weights, Tensor, "torch.zeros(1, 256)")
    check_log_weights(log_weights, "resampling")
    weights = normalise(log_weights.detach().double().contiguous())
    return arrange(RESAMPLERS[scheme](weights))


def check_scheme(scheme: str) -> None:
    """Refuse a name that is no key of ``RESAMPLERS``.

    Raises:
        ValueError: the scheme is unknown.
    """
    if not isinstance(scheme, str) or scheme not in RESAMPLERS:
        known = ", ".join(RESAMPLERS)
        raise ValueError(f"unknown resampling scheme {scheme!r}; expected one of {known}.")


def arrange(offspring: Int64[Tensor, "*runs particle"]) -> Int64[Tensor, "*runs particle"]:
    """Ancestors with the given numbers of offspring, survivors in their own places.

    Args:
        offspring: non-negative, adding to N over the last axis, with shape ``(*runs, particle)``.

    Returns:
        Indices with shape ``(*runs, particle)``.
    """
    place = torch.arange(offspring.shape[-1], device=offspring.device).expand_as(offspring)
    spare = (offspring - 1).clamp(min=0)  # a run has as many spare copies as empty places
    copies = place.flatten().repeat_interleave(spare.flatten())
    return place.masked_scatter(offspring == 0, copies)


def multinomial(
    probabilities: Float64[Tensor, "*runs particle"],
) -> Int64[Tensor, "*runs particle"]:
    """N independent draws: the noisiest scheme, and the one that theory is written for."""
    return _count(probabilities, torch.rand_like(probabilities).sort(-1).values)


def stratified(
    probabilities: Float64[Tensor, "*runs particle"],
) -> Int64[Tensor, "*runs particle"]:
    """One uniform draw in each of N equal strata: Kitagawa (1996)."""
    return _count(probabilities, _strata(probabilities, torch.rand_like(probabilities)))


def systematic(
    probabilities: Float64[Tensor, "*runs particle"],
) -> Int64[Tensor, "*runs particle"]:
    """One uniform draw shared by all strata: offspring are ⌊N W⌋ or ⌈N W⌉.

    Carpenter, Clifford, Fearnhead (1999).
    """
    return _count(probabilities, _strata(probabilities, torch.rand_like(probabilities[..., :1])))


def residual(probabilities: Float64[Tensor, "*runs particle"]) -> Int64[Tensor, "*runs particle"]:
    """⌊N W⌋ copies for certain, the rest by independent draws: Liu, Chen (1998)."""
    certain, fraction = _split(probabilities)
    missing = probabilities.shape[-1] - certain.sum(-1, keepdim=True)
    place = torch.arange(probabilities.shape[-1], device=probabilities.device)
    uniform = torch.rand_like(probabilities)
    points = torch.where(place < missing, uniform, 2.0).sort(-1).values  # beyond one: not drawn
    total = fraction.sum(-1, keepdim=True)
    return certain + _count(fraction / torch.where(total > 0, total, 1.0), points)


def ssp(probabilities: Float64[Tensor, "*runs particle"]) -> Int64[Tensor, "*runs particle"]:
    r"""Srinivasan's sampling process: offspring are ⌊N W⌋ or ⌈N W⌉ and negatively associated.

    The fractions :math:`f_i = N W_i - \lfloor N W_i \rfloor` meet in pairs. Each meeting keeps the
    pair's sum and both means and settles one of the two at 0 or 1; the other goes on. The pairs are
    those of a knockout tournament, so that N particles take :math:`\lceil \log_2 N \rceil` rounds,
    each for all pairs and runs at once; tournaments keep the negative association of the chain of
    meetings in the paper.

    References:
        Negative association, ordering and convergence of resampling methods (Gerber, Chopin,
        Whiteley, 2019)
        https://arxiv.org/abs/1707.01845

        Negative Dependence and Srinivasan's Sampling Process (Kramer, Cutler, Radcliffe, 2011)
    """
    certain, fraction = _split(probabilities)
    size = probabilities.shape[-1]
    padding = (0, (1 << (size - 1).bit_length()) - size)
    place = torch.arange(size, device=probabilities.device).expand_as(certain)
    place, fraction = (torch.nn.functional.pad(part, padding) for part in (place, fraction))
    while fraction.shape[-1] > 1:
        settled, won, place, fraction = _meet(place, fraction)
        certain = certain.scatter_add(-1, settled, won)
    return certain.scatter_add(-1, place, fraction.round().long())


def _meet(
    place: Int64[Tensor, "*runs player"], fraction: Float64[Tensor, "*runs player"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One round of ``ssp``: (place settled, its 0 or 1, place that goes on, its fraction)."""
    one, two = fraction.unflatten(-1, (-1, 2)).unbind(-1)
    total = one + two
    full = total >= 1  # somebody gets one; otherwise somebody gets zero
    gap, whole = torch.where(full, 1 - two, one), torch.where(full, 2 - total, total)
    first = torch.rand_like(one) * whole < gap  # the first gets one, or takes all
    left, right = place.unflatten(-1, (-1, 2)).unbind(-1)
    goes_on = torch.where(first == full, right, left)
    settled = torch.where(first == full, left, right)
    return settled, full.long(), goes_on, torch.where(full, total - 1, total)


def _split(
    probabilities: Float64[Tensor, "*runs particle"],
) -> tuple[Int64[Tensor, "*runs particle"], Float64[Tensor, "*runs particle"]]:
    """Whole part and fraction of the expected offspring N W, whole where it is but for rounding.

    Without this, N · (1/N) = 1 - 2⁻⁵³ (N = 49) would leave equal weights entirely to chance.
    """
    expected = probabilities * probabilities.shape[-1]
    nearest = expected.round()
    expected = torch.where((expected - nearest).abs() <= SNAP * nearest, nearest, expected)
    return expected.floor().long(), expected.frac()


def _strata(
    probabilities: Float64[Tensor, "*runs particle"], uniform: Float64[Tensor, "*runs draw"]
) -> Float64[Tensor, "*runs particle"]:
    """One point per stratum, :math:`(k + u_k) / N`, ascending; a single draw is shared by all."""
    size = probabilities.shape[-1]
    return (torch.arange(size, device=uniform.device) + uniform) / size


def _count(
    probabilities: Float64[Tensor, "*runs particle"], points: Float64[Tensor, "*runs particle"]
) -> Int64[Tensor, "*runs particle"]:
    """How many of the ascending points fall in each particle's interval; those above 1 in none."""
    edges = (probabilities * UNIT).round().long().cumsum(-1)
    total = edges[..., -1:]
    inside = torch.minimum((points * total).long(), total - 1)
    ticks = torch.where(points <= 1, inside, total)
    below = torch.searchsorted(ticks, edges)  # ticks < edge
    return below.diff(dim=-1, prepend=torch.zeros_like(total))


RESAMPLERS: dict[str, Resampler] = {
    "multinomial": multinomial,
    "residual": residual,
    "stratified": stratified,
    "systematic": systematic,
    "ssp": ssp,
}
