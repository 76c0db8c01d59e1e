r"""Laws of transitions, and their log-densities in float64.

Two float32 log-densities subtracted lose 3e-4 per step at 784 dimensions. States and networks keep
their own dtype; log-densities of what was actually drawn are always computed in float64.
"""

import math
from typing import Any

import pyro.distributions as dist
import torch
from jaxtyping import Float, Float64
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Size, Tensor

FEW_COLUMNS = 4


class CovariantNormal(TorchDistribution):
    r"""A Gaussian over events of any shape with covariance diag(a) + F F'.

    Args:
        mean: with shape ``(*batch, *event)``.
        diagonal: a > 0, with shape ``(*batch, d)`` or ``(d,)``; d is the number of elements of an
            event.
        factor: F, with shape ``(*batch, d, r)``.
        event_dim: the number of event dimensions.
    """

    arg_constraints: dict[str, Any] = {}
    support = torch.distributions.constraints.independent(torch.distributions.constraints.real, 1)
    has_rsample = True

    def __init__(
        self,
        mean: Float[Tensor, "..."],
        diagonal: Float[Tensor, "... d"],
        factor: Float[Tensor, "... d r"],
        event_dim: int = 1,
    ) -> None:
        cut = mean.dim() - event_dim
        self.loc, self.diagonal, self.factor = mean, diagonal, factor
        super().__init__(mean.shape[:cut], mean.shape[cut:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return (self.diagonal + self.factor.square().sum(-1)).reshape(self.loc.shape)

    @property
    def covariance_matrix(self) -> Float[Tensor, "... d d"]:
        return torch.diag_embed(self.diagonal) + self.factor @ self.factor.mT

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        batch = (*sample_shape, *self.batch_shape)
        own = self._white(*batch, self.factor.shape[-2]) * self.diagonal.sqrt()
        common = self._white(*batch, self.factor.shape[-1], 1)
        offset = own + (self.factor @ common)[..., 0]
        return self.loc + offset.reshape(*batch, *self.event_shape)

    def _white(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)

    def log_prob(self, value: Tensor) -> Tensor:
        offset = value - self.loc
        offset = offset.reshape(*offset.shape[: offset.dim() - self.event_dim], -1)
        small = capacitance(self.diagonal, self.factor)
        inner = torch.linalg.solve_triangular(
            small, self.factor.mT @ (offset / self.diagonal)[..., None], upper=False
        )[..., 0]
        square = (offset.square() / self.diagonal).sum(-1) - inner.square().sum(-1)
        log_det = self.diagonal.log().sum(-1) + 2 * small.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (square + log_det + offset.shape[-1] * math.log(2 * math.pi))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "CovariantNormal":
        batch = Size(batch_shape)
        return CovariantNormal(
            self.loc.expand(batch + self.event_shape),
            self.diagonal.expand(batch + self.diagonal.shape[-1:]),
            self.factor.expand(batch + self.factor.shape[-2:]),
            self.event_dim,
        )


def base_law(law: Distribution) -> Distribution:
    """The law of the elements, without the dimensions that ``to_event`` has joined."""
    while isinstance(law, torch.distributions.Independent):
        law = law.base_dist
    return law


def capacitance(diagonal: Tensor, factor: Tensor) -> Tensor:
    """The Cholesky factor of I + F' diag(a)^-1 F, which inverts diag(a) + F F' (Woodbury)."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    small: Tensor = torch.linalg.cholesky(eye + factor.mT @ (factor / diagonal[..., None]))
    return small


def thin_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right' for batches of matrices with few columns, where batched products are slow."""
    if not 0 < right.shape[-1] <= FEW_COLUMNS:
        return left @ right.mT
    rows = right[..., None, :, :]
    product = left[..., :1] * rows[..., 0]
    for k in range(1, right.shape[-1]):
        product = torch.addcmul(product, left[..., k : k + 1], rows[..., k])
    return product


def double(law: Distribution) -> Distribution:
    """The same law with float64 parameters (if it has real parameters)."""
    match law:
        case torch.distributions.Independent():
            return dist.Independent(double(law.base_dist), law.reinterpreted_batch_ndims)
        case torch.distributions.Normal():
            return dist.Normal(law.loc.double(), law.scale.double(), validate_args=False)
        case CovariantNormal():
            return CovariantNormal(
                law.loc.double(), law.diagonal.double(), law.factor.double(), law.event_dim
            )
        case torch.distributions.MultivariateNormal():
            return dist.MultivariateNormal(law.loc.double(), scale_tril=law.scale_tril.double())
        case torch.distributions.Categorical():
            return dist.Categorical(logits=law.logits.double(), validate_args=False)
        case torch.distributions.MixtureSameFamily():
            mixture, component = law.mixture_distribution, law.component_distribution
            return dist.MixtureSameFamily(double(mixture), double(component), validate_args=False)
        case _:
            return law


def log_density(law: Distribution, x: Tensor) -> Float64[Tensor, " particle"]:
    """log p(x) in float64, summed over everything but the leading (particle) axis."""
    value = x.double() if x.is_floating_point() else x
    log_prob: Tensor = double(law).log_prob(value)
    return log_prob.double().reshape(x.shape[0], -1).sum(-1)


def normal(mean: Tensor, variance: Tensor | float, event_dim: int) -> Distribution:
    """A Gaussian with independent elements; a point if the variance is exactly zero."""
    variance = torch.as_tensor(variance, dtype=mean.dtype, device=mean.device)
    if variance.dim() == 0 and float(variance) == 0.0:
        return dist.Delta(mean, event_dim=event_dim)
    scale = variance.sqrt().expand(mean.shape)
    return dist.Normal(mean, scale, validate_args=False).to_event(event_dim)
