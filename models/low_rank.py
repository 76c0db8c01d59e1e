"""Exact covariances of x_0 given x_t as a diagonal plus a low rank: what mixtures really are."""

import torch
from torch import Tensor

from smcdiff.laws import thin_product

from .denoisers import Denoiser, GaussianDenoiser, MixtureDenoiser


def low_rank_covariance(
    denoiser: Denoiser, x: Tensor, alpha: float, sigma: float
) -> tuple[Tensor, Tensor]:
    r"""Cov[x_0 | x_t = x] = diag(a) + F F'.

    A mixture of isotropic or diagonal components has the average of their variances on the
    diagonal; F F' is the spread of their means
    :math:`\sum_k r_k (\mu_k - \bar\mu)(\mu_k - \bar\mu)^\top`.

    Returns:
        a of shape ``(*batch, d)`` and F of shape ``(*batch, d, r)``, r at most the smaller of d
        and K.
    """
    if isinstance(denoiser, GaussianDenoiser):
        denoiser = denoiser.mixture
    if not isinstance(denoiser, MixtureDenoiser) or denoiser.covariances.dim() == 3:
        return split_full(denoiser.covariance(x, alpha, sigma))
    if denoiser.covariances.shape == (1,):
        return _shared(denoiser, x, alpha, sigma)
    parts = denoiser.components(x, alpha, sigma)
    weights, covariances = parts.log_weights.exp().to(x.dtype), parts.covariances
    if covariances.dim() == 1:
        covariances = covariances[:, None].expand(-1, x.shape[-1])
    center = weights[..., None, :] @ parts.means
    offsets = (parts.means - center) * weights.sqrt()[..., None]
    wide = offsets.shape[-2] > offsets.shape[-1]
    if not wide:
        return weights @ covariances, offsets.mT
    fine = offsets.double()
    return weights @ covariances, _square_root(fine.mT @ fine).to(x.dtype)


def _shared(
    denoiser: MixtureDenoiser, x: Tensor, alpha: float, sigma: float
) -> tuple[Tensor, Tensor]:
    """Components of one isotropic variance v: noise moves all their means alike, by a factor.

    The means' spread then lives in the few directions in which the prior's means differ.
    """
    variance = denoiser.covariances.item()
    keep = sigma**2 / (alpha**2 * variance + sigma**2)
    weights = denoiser.responsibilities(x, alpha, sigma)
    offsets = denoiser.means.double() - denoiser.means.double().mean(0)
    _, sizes, rows = torch.linalg.svd(offsets, full_matrices=False)
    basis = rows[sizes > 1e-10 * sizes.max().clamp(min=1e-300)].mT
    points = keep * offsets @ basis
    spread = (points - (weights @ points)[..., None, :]) * weights.sqrt()[..., None]
    root = _square_root(spread.mT @ spread)
    factor = thin_product(root.mT, basis).mT.to(x.dtype)
    diagonal = x.new_full(x.shape, keep * variance)
    return diagonal, factor if factor.shape[-1] else diagonal.new_zeros(*x.shape, 1)


def _square_root(gram: Tensor) -> Tensor:
    """L with L L' = gram, up to a relative 1e-12 that keeps it positive definite in float64."""
    size = gram.shape[-1]
    jitter = 1e-12 * gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=0) + 1e-30
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    factor: Tensor = torch.linalg.cholesky(gram + jitter[..., None, None] * eye)
    return factor


def split_full(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Any covariance in this form: half its smallest eigenvalue on the diagonal, the rest in F."""
    values, vectors = torch.linalg.eigh(covariance)
    floor = 0.5 * values[..., :1].clamp(min=1e-12)
    factor = vectors * (values - floor).clamp(min=0).sqrt()[..., None, :]
    return floor.expand(covariance.shape[:-1]), factor
