r"""Log-weights: the arithmetic that every particle algorithm shares.

A run of N particles carries unnormalised log-weights :math:`\ell_1 \dots \ell_N`. They stay
logarithms until the last line, in float64, and :math:`-\infty` means weight zero:

.. math:: \hat Z = \frac{1}{N} \sum_i e^{\ell_i}, \qquad
          W_i = \frac{e^{\ell_i}}{\sum_j e^{\ell_j}}, \qquad
          \mathrm{ESS} = \frac{1}{\sum_i W_i^2}.

Particles are the last axis; any number of axes (runs, problems) may stand before it. Nothing here
changes its input.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SHOWN = 8  # runs named in a message before it says "and ... more"


class DegenerateWeights(ValueError):
    """Every particle of a run has weight zero, so nothing can be drawn from it."""


def log_mean_exp(log_weights: Float[Tensor, "..."], dim: int = -1) -> Float[Tensor, "..."]:
    r"""Logarithm of the mean weight, :math:`m + \log \frac{1}{N} \sum_i e^{\ell_i - m}`, m = max.

    Equal inputs give that value exactly, and inputs that are all -inf give -inf.

    Args:
        log_weights: logarithms, with shape ``(*, n, *)``.
        dim: the axis of size n that is averaged.

    Returns:
        The logarithms of the means, with shape ``(*, *)``.
    """
    peak = log_weights.amax(dim, keepdim=True)
    peak = torch.where(peak.isfinite(), peak, 0.0)
    return peak.squeeze(dim) + (log_weights - peak).exp().mean(dim).log()


def normalise(log_weights: Float[Tensor, "*runs particle"]) -> Float[Tensor, "*runs particle"]:
    """Probabilities :math:`W_i`; zeros throughout a run that is all -inf.

    Args:
        log_weights: unnormalised log-weights, with shape ``(*runs, particle)``.

    Returns:
        Non-negative numbers that add to one over the last axis, with shape ``(*runs, particle)``.
    """
    weights = _scaled(log_weights)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)


def effective_sample_size(
    log_weights: Float[Tensor, "*runs particle"],
) -> Float[Tensor, "*runs"]:
    r"""Kish's effective sample size :math:`1 / \sum_i W_i^2`, a count in [1, N].

    Args:
        log_weights: unnormalised log-weights, with shape ``(*runs, particle)``.

    Returns:
        Numbers of particles (not fractions), with shape ``(*runs)``; 0 for a run that is all -inf.

    References:
        A Note on Importance Sampling using Standardized Weights (Kong, 1992)
    """
    weights = _scaled(log_weights)
    total, squares = weights.sum(-1), weights.square().sum(-1)
    size = (total.square() / squares).clamp(1, log_weights.shape[-1])
    return torch.where(total == 0, 0.0, size)


def check_log_weights(log_weights: Float[Tensor, "*runs particle"], where: str) -> None:
    """Refuse log-weights that are no logarithms of weights; some -inf in a run are fine.

    Args:
        log_weights: unnormalised log-weights, with shape ``(*runs, particle)``.
        where: the place to name in the message, such as ``"step 3"``.

    Raises:
        ValueError: there is no particle, or a log-weight is NaN or +inf.
        DegenerateWeights: every particle of a run has log-weight -inf.
    """
    count = log_weights.shape[-1]
    if count == 0:
        raise ValueError(f"{where}: expected at least one particle per run, got none.")
    peak = log_weights.amax(-1)  # NaN, +inf or -inf exactly where something is wrong
    if bool(peak.isfinite().all()):
        return
    wrong = log_weights.isnan() | log_weights.isposinf()
    if bool(wrong.any()):
        raise ValueError(
            f"{where}: {int(wrong.sum())} log-weights are NaN or +inf, in {_runs(wrong.any(-1))} "
            f"({count} particles per run); expected numbers, or -inf for weight zero. Check what "
            "the network, the likelihood and the factors return there."
        )
    raise DegenerateWeights(
        f"{where}: all {count} particles have weight zero in {_runs(peak.isneginf())}. Use more "
        "particles, a proposal nearer to the data, or a factor that falls off smoothly instead of "
        "a hard constraint (-inf)."
    )


def _scaled(log_weights: Float[Tensor, "*runs particle"]) -> Float[Tensor, "*runs particle"]:
    """Weights, the largest of each run being one (or all of them zero)."""
    peak = log_weights.amax(-1, keepdim=True)
    return (log_weights - torch.where(peak.isfinite(), peak, 0.0)).exp()


def _runs(mask: Bool[Tensor, "*runs"]) -> str:
    """Where the mask holds, in words: "run 2", "runs (0, 1), (3, 0)"; "the run" without axes."""
    if mask.ndim == 0:
        return "the run"
    indices = [tuple(index) for index in mask.nonzero().tolist()]
    named = [str(index[0]) if len(index) == 1 else str(index) for index in indices[:SHOWN]]
    more = f" and {len(indices) - SHOWN} more" if len(indices) > SHOWN else ""
    return f"run{'s' * (len(indices) > 1)} {', '.join(named)}{more}"
