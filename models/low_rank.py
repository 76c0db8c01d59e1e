"""Exact covariances of x_0 given x_t as a diagonal plus a low rank: what mixtures really are."""

import torch
from torch import Tensor

from .denoisers import Denoiser, GaussianDenoiser, MixtureDenoiser


def low_rank_covariance(
    denoiser: Denoiser, x: Tensor, alpha: float, sigma: float
) -> tuple[Tensor, Tensor]:
    r"""Cov[x_0 | x_t = x] = diag(a) + F F'.

    A mixture of isotropic or diagonal components has the average of their variances on the diagonal,
    and the spread of their means, :math:`\sqrt{r_k}(\mu_k - \bar\mu)`, as the columns of F.

    Returns:
        a of shape ``(*batch, d)`` and F of shape ``(*batch, d, r)``.
    """
    if isinstance(denoiser, GaussianDenoiser):
        denoiser = denoiser.mixture
    if isinstance(denoiser, MixtureDenoiser) and denoiser.covariances.dim() < 3:
        parts = denoiser.components(x, alpha, sigma)
        weights = parts.log_weights.exp().to(x.dtype)
        covariances = parts.covariances
        if covariances.dim() == 1:
            covariances = covariances[:, None].expand(-1, x.shape[-1])
        center = weights[..., None, :] @ parts.means
        offsets = (parts.means - center) * weights.sqrt()[..., None]
        return weights @ covariances, offsets.mT
    return split_full(denoiser.covariance(x, alpha, sigma))


def split_full(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Any covariance in this form: half its smallest eigenvalue on the diagonal, the rest in F."""
    values, vectors = torch.linalg.eigh(covariance)
    floor = 0.5 * values[..., :1].clamp(min=1e-12)
    factor = vectors * (values - floor).clamp(min=0).sqrt()[..., None, :]
    return floor.expand(covariance.shape[:-1]), factor
