"""Denoisers ``D(x, sigma)`` as processes: k-diffusion's, EDM's, or your own.

These know nothing of a schedule: x = x_0 + sigma epsilon. Networks that are fed anything else are
``Diffusion(network, schedule, ...)`` as they are.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..classifier_free import ClassifierFree
from ..continuous import EDM
from ..diffusion import Diffusion
from ..grids import Numbers, table
from ..schedules import Tabulated
from ..thresholding import Clipping


def from_denoiser(
    denoiser: Callable[..., Tensor],
    event_shape: Sequence[int] | None = None,
    num_steps: int = 100,
    *,
    sigmas: Numbers | None = None,
    eta: float = 1.0,
    clip_denoised: Clipping = None,
    guidance: ClassifierFree | None = None,
    scale: float | None = None,
    context_dims: Mapping[str, int] | None = None,
    train: bool = False,
) -> Diffusion:
    """A denoiser as a process.

    Args:
        denoiser: ``denoiser(x, sigma, **context)`` estimates x_0, with x of shape
            ``(batch, *event_shape)`` and sigma of shape ``(batch,)``.
        event_shape: the shape of one sample (None: from ``img_channels`` and ``img_resolution``,
            which EDM's networks have).
        num_steps: T, unless sigmas are given.
        sigmas: the noise levels, falling or rising; a zero at the end (k-diffusion's
            ``get_sigmas_karras``) is the data. None: the denoiser's own ``get_sigmas``, or those
            of ``EDM()`` within its ``sigma_min`` and ``sigma_max``, on the levels that its
            ``round_sigma`` knows.
        eta: 1 for ``sample_euler_ancestral``, 0 for Euler's method (a deterministic flow).
        clip_denoised, guidance, context_dims, train: see ``Diffusion``.
        scale: the standard deviation of the data, for scalar look-aheads (None: the denoiser's
            ``sigma_data``, or 1).

    Raises:
        ValueError: no event_shape, or levels that are no noise levels.
    """
    found = _sigmas(denoiser, num_steps) if sigmas is None else table(sigmas)
    kept = found[found != 0].sort().values
    if scale is None:
        scale = float(getattr(denoiser, "sigma_data", 1.0))
    return Diffusion(
        denoiser,
        Tabulated(torch.ones_like(kept), kept, time=kept),
        _event_shape(denoiser, event_shape),
        len(kept),
        parameterization="x0",
        eta=eta,
        clip_denoised=clip_denoised,
        guidance=guidance,
        scale=scale,
        context_dims=context_dims,
        train=train,
    )


def _sigmas(denoiser: Any, num_steps: int) -> Tensor:
    """What the denoiser itself says, as far as it does."""
    own = getattr(denoiser, "get_sigmas", None)
    if own is not None:
        return table(own(num_steps))
    low = max(float(getattr(denoiser, "sigma_min", 0.0)), 0.002)
    high = min(float(getattr(denoiser, "sigma_max", 80.0)), 80.0)
    sigmas = EDM(low, high).grid(num_steps).sigma[1:]
    known = getattr(denoiser, "round_sigma", None)
    return sigmas if known is None else table(known(sigmas))


def _event_shape(denoiser: Any, given: Sequence[int] | None) -> Sequence[int]:
    if given is not None:
        return given
    size, channels = (getattr(denoiser, f"img_{n}", None) for n in ("resolution", "channels"))
    if size is None or channels is None:
        raise ValueError("event_shape is needed: the shape of one sample, such as (3, 32, 32)")
    return (channels, size, size)
