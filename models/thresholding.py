"""Keeping estimates of x_0 where data can be."""

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from smcdiff.arguments import check_number


@dataclass(frozen=True)
class DynamicThresholding:
    r"""Dynamic thresholding (Saharia et al. 2022, Imagen, section 2.3), which guidance needs most.

    .. math:: s = \max(\mathrm{bound}, q\text{-quantile of } |\hat x_0| \text{ over its elements}),
              \qquad \hat x_0 \to \frac{\mathrm{bound}}{s} \mathrm{clip}(\hat x_0, -s, s).

    Attributes:
        quantile: q, between 0 and 1.
        bound: the largest absolute value of data.
        cap: the largest s (diffusers' ``sample_max_value``).
    """

    quantile: float = 0.995
    bound: float = 1.0
    cap: float = math.inf

    def __post_init__(self) -> None:
        for name in ("quantile", "bound"):
            check_number(name, getattr(self, name), 0, math.inf, "()")
        if not (self.quantile <= 1 and self.bound <= self.cap):
            raise ValueError(
                "dynamic thresholding needs a quantile in (0, 1] and a positive bound, at most "
                f"the cap, got quantile={self.quantile}, bound={self.bound}, cap={self.cap}: try "
                "the defaults"
            )

    def __call__(self, x0: Tensor, event_dim: int) -> Tensor:
        """The estimates, with shape ``(*batch, *event)``."""
        batch = x0.shape[: x0.dim() - event_dim]
        flat = x0.reshape(*batch, -1)
        ordered = flat.abs().sort(-1).values  # torch.quantile refuses large tensors
        place = self.quantile * (flat.shape[-1] - 1)
        low = int(place)
        high = min(low + 1, flat.shape[-1] - 1)
        limit = torch.lerp(ordered[..., low], ordered[..., high], place - low)
        limit = limit.clamp(self.bound, self.cap)[..., None]
        return (flat.clamp(-limit, limit) * (self.bound / limit)).reshape(x0.shape)


Clipping = tuple[float, float] | DynamicThresholding | None


def clip(x0: Tensor, clipping: Clipping, event_dim: int) -> Tensor:
    """The estimates within bounds, thresholded, or as they are."""
    match clipping:
        case None:
            return x0
        case DynamicThresholding():
            return clipping(x0, event_dim)
        case low, high:
            return x0.clamp(low, high)


def check_clipping(clipping: Clipping) -> None:
    if clipping is None or isinstance(clipping, DynamicThresholding):
        return
    pair = isinstance(clipping, tuple | list) and len(clipping) == 2
    if not (pair and all(isinstance(end, Real) for end in clipping) and clipping[0] < clipping[1]):
        raise ValueError(
            "clip_denoised needs (low, high) with low < high, such as (-1, 1), or "
            f"DynamicThresholding(), but got {clipping!r}"
        )
