r"""Denoisers of azula as processes: ``prior = from_azula(denoiser, (3, 32, 32), num_steps=50)``.

Its time runs from 0 (data) to 1 (noise), and its schedules keep a little noise at 0: x_0 is what
azula's samplers return, with :math:`\sigma_0` of noise (1e-3 usually).
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from smcdiff.laws import normal

from ..calls import place
from ..classifier_free import ClassifierFree
from ..diffusion import Diffusion
from ..schedules import Tabulated
from ..thresholding import Clipping
from .scheduled import Level, Scheduled, step


def from_azula(
    denoiser: Any,
    event_shape: Sequence[int],
    num_steps: int = 100,
    *,
    eta: float = 1.0,
    span: tuple[float, float] = (0.0, 1.0),
    clip_denoised: Clipping = None,
    guidance: ClassifierFree | None = None,
    scale: float = 1.0,
    context_dims: Mapping[str, int] | None = None,
    train: bool = False,
) -> Scheduled:
    r"""A denoiser of azula under the steps of its ``DDPMSampler`` and ``DDIMSampler``.

    Args:
        denoiser: ``denoiser(x, t, **context).mean`` estimates x_0, and ``denoiser.schedule(t)``
            gives alpha and sigma.
        event_shape: the shape of one sample.
        num_steps: T.
        eta: 1 for ``DDPMSampler``, 0 for ``EulerSampler``; :math:`\sqrt\eta` of the ``eta`` that
            ``DDIMSampler`` takes.
        span: the times of x_0 and of x_T, ``stop`` and ``start`` of azula's samplers.
        clip_denoised: bounds for the estimate of x_0.
        guidance, context_dims, train: see ``Diffusion``.
        scale: the standard deviation of the data: for scalar look-aheads, and for x_T, which is
            N(0, alpha_T^2 scale^2 + sigma_T^2).

    Raises:
        ValueError: eta is not between 0 and 1, or the levels do not go from data to noise.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta lies between 0 and 1, got {eta}")
    times = torch.linspace(*span, num_steps + 1, dtype=torch.float64)
    alpha, sigma = (level.detach().cpu() for level in denoiser.schedule(times))
    levels = [Level(*both) for both in zip(alpha.tolist(), sigma.tolist(), strict=True)]
    dtype, device, _ = place(denoiser)
    last = levels[-1]
    base = Diffusion(
        AzulaNetwork(denoiser),
        Tabulated(alpha[1:], sigma[1:], times[1:]),
        event_shape,
        num_steps,
        parameterization="x0",
        clip_denoised=clip_denoised,
        guidance=guidance,
        scale=scale,
        source=normal(
            torch.zeros(tuple(event_shape), dtype=dtype, device=device),
            (last.alpha * scale) ** 2 + last.sigma**2,
            len(event_shape),
        ),
        context_dims=context_dims,
        train=train,
    )
    return Scheduled(base, [step(now, then, eta) for then, now in pairwise(levels)])


class AzulaNetwork(nn.Module):
    """``network(x, time, **context)``; the time has no axes, as in azula's own samplers."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, time: Tensor, **context: Any) -> Tensor:
        mean: Tensor = self.denoiser(x, time[0], **context).mean
        return mean
