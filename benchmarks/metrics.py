"""How far two sets of samples are apart; sets have shape (n, d), and all samples count alike."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

Samples = Float[Tensor, "n d"]


def directions(dim: int, number: int, seed: int = 0) -> Float64[Tensor, "number d"]:
    """Unit vectors, uniform on the sphere: the same ones whenever they are asked for."""
    stream = torch.Generator().manual_seed(seed)
    raw = torch.randn(number, dim, generator=stream, dtype=torch.float64)
    return raw / raw.norm(dim=-1, keepdim=True)


def sliced_wasserstein(
    x: Samples, y: Samples, power: int = 1, slices: int = 500, seed: int = 0
) -> float:
    r"""The p-Wasserstein distance averaged over random directions u,

    .. math:: \Big( E_u\, W_p(u^\top x, u^\top y)^p \Big)^{1/p},

    for sets of one size, whose order statistics are matched.
    """
    if len(x) != len(y):
        raise ValueError(f"expected as many x as y, got {len(x)} and {len(y)}: draw equal numbers")
    lines = directions(x.shape[1], slices, seed).T
    apart = (x.double() @ lines).sort(0).values - (y.double() @ lines).sort(0).values
    return float(apart.abs().pow(power).mean() ** (1 / power))


def maximum_mean_discrepancy(x: Samples, y: Samples, bandwidth: float) -> float:
    r"""The unbiased estimate of MMD^2 under the kernel :math:`\exp(-|x - y|^2 / (2 h^2))`.

    It may be negative where both sets have one law.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a.double(), b.double()).square() / (2 * bandwidth**2))

    own = sum((kernel(a, a).sum() - len(a)) / (len(a) * (len(a) - 1)) for a in (x, y))
    return float(own - 2 * kernel(x, y).mean())


def median_bandwidth(y: Samples) -> float:
    """h with h^2 = median^2 / (2 log n), over the distances between different samples."""
    n = len(y)
    median = torch.nn.functional.pdist(y.double()).median()
    return float(median / (2 * torch.log(torch.tensor(float(n)))) ** 0.5)


def frechet(left: Samples, right: Samples) -> float:
    """The squared Frechet distance of two sets, taken as Gaussian."""
    means = [each.double().mean(0) for each in (left, right)]
    first, second = (each.double().T.cov() for each in (left, right))
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    trace = first.trace() + second.trace() - 2 * cross
    return float((means[0] - means[1]).square().sum() + trace)
