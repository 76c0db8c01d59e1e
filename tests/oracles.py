"""The law of x_0 under a discretised chain, computed without sampling.

Processes with affine transitions x_{t-1} = A x_t + b + N(0, V) are followed by their moments,
masked ones by enumeration of their states. Integrals over one dimension are sums over a fine grid.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

from smcdiff.process import Process, is_deterministic

Moments = tuple[Tensor, Tensor]


def affine(process: Process, t: int, **context: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A, b and V of an affine transition of flattened states, with the batch of the context."""
    shape, after = process.shape_at(t), process.shape_at(t - 1)
    size = shape.numel()
    probes = torch.cat([torch.zeros(1, size), torch.eye(size)]).double()
    batch = next((v.shape for v in context.values()), torch.Size())
    rows = {
        name: value.double()[..., None].expand(*batch, size + 1) for name, value in context.items()
    }
    x = probes.expand(*batch, -1, -1).reshape(*batch, size + 1, *shape)
    law = process.kernel(x, t, **rows).law
    means = law.mean.reshape(*batch, size + 1, after.numel()).double()
    slope = (means[..., 1:, :] - means[..., :1, :]).mT
    return slope, means[..., 0, :], covariance(law, after.numel())[..., 0, :, :]


def covariance(law: Any, size: int) -> Tensor:
    """The covariance of a law's flattened event, with its batch in front."""
    if is_deterministic(law):
        return torch.zeros(*law.batch_shape, size, size, dtype=torch.float64)
    full = getattr(law, "covariance_matrix", None)
    if isinstance(full, Tensor):
        return full.double()
    return law.variance.double().reshape(*law.batch_shape, size).diag_embed()


def moments(process: Process, **context: Any) -> Moments:
    """Mean and covariance of the flattened x_0 of a process with affine Gaussian transitions."""
    start = process.initial(**context)
    size = process.shape_at(process.num_steps).numel()
    mean = start.mean.reshape(*start.batch_shape, size).double()
    spread = covariance(start, size)
    for t in range(process.num_steps, 0, -1):
        slope, offset, variance = affine(process, t, **context)
        mean = (slope @ mean[..., None])[..., 0] + offset
        spread = slope @ spread @ slope.mT + variance
    return mean, spread


def enumerated(process: Any, **context: Any) -> tuple[Tensor, Tensor]:
    """All fully masked, partly and fully revealed states, and the law of x_0 over them.

    Returns:
        states with shape ``(states, length)`` and probabilities with shape ``(*context, states)``.
    """
    length, mask = process.event_shape[0], process.mask
    states = torch.tensor(list(itertools.product(range(mask + 1), repeat=length)))
    batch = next((v.shape for v in context.values()), torch.Size())
    rows = {n: v[..., None].expand(*batch, len(states)) for n, v in context.items()}
    x = states.expand(*batch, -1, -1)
    weights = (states == mask).all(-1).double().expand(*batch, -1)
    for t in range(process.num_steps, 0, -1):
        logits = process.kernel(x, t, **rows).law.base_dist.logits.double()
        steps = [logits[..., site, states[:, site]] for site in range(length)]
        transition = torch.stack(steps).sum(0).exp()
        weights = (weights[..., None, :] @ transition)[..., 0, :]
    return states, weights


def grid(mean: Tensor, variance: Tensor, num: int = 161) -> tuple[Tensor, Tensor]:
    """Points and log-weights of N(mean, variance), such that sums over them are integrals.

    Args:
        mean, variance: with shape ``(*batch,)``.

    Returns:
        points and log-weights with shape ``(*batch, num)``.
    """
    scale = torch.as_tensor(variance, dtype=torch.float64).sqrt()[..., None]
    points = torch.linspace(-8, 8, num, dtype=torch.float64)
    log_weights = (
        torch.distributions.Normal(0.0, 1.0).log_prob(points) + (points[1] - points[0]).log()
    )
    centre = torch.as_tensor(mean, dtype=torch.float64)[..., None]
    return centre + scale * points, log_weights.expand(*scale.shape[:-1], num)
