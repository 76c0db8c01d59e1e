r"""Posterior sampling with azula, of one of our priors: the same network at the same noise levels.

azula's samplers know the noise as y = A x + N(0, r I) and return samples without weights. Here
they get what they need to be at their best: the strength of DPS is searched, the twist of TDS has
the covariance r + A A' Var(x_0 | x_t), and the linear system of MMPS is iterated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smcdiff.models import Diffusion

try:
    from azula.denoise import Denoiser, DiracPosterior
    from azula.guidance import DPSSampler, MMPSDenoiser, TDSSampler
    from azula.linalg.covariance import IsotropicCovariance
    from azula.noise import Schedule
    from azula.sample import DDPMSampler
except ImportError:  # peers.py says what to install
    Denoiser = Schedule = object

LEFT = 1e-3  # the noise in x_0 that azula's own schedules keep


@dataclass(frozen=True)
class Linear:
    """y = forward(x) + noise epsilon.

    Attributes:
        forward: from ``(*batch, *event)`` to ``(*batch, d_y)``.
        gram: A A', with shape (d_y, d_y), or a number if it is a multiple of the identity.
    """

    y: Tensor
    forward: Callable[[Tensor], Tensor]
    noise: float
    gram: Tensor | float

    def log_prob(self, x: Tensor, variance: Tensor) -> Tensor:
        """log N(y; A x, noise^2 + variance A A'), with shape ``(*batch,)``."""
        mean = self.forward(x)
        if isinstance(self.gram, float):
            scale = (self.noise**2 + variance * self.gram).sqrt()
            return torch.distributions.Normal(mean, scale).log_prob(self.y).sum(-1)
        spread = self.noise**2 * torch.eye(len(self.y)) + variance * self.gram
        return torch.distributions.MultivariateNormal(mean, spread).log_prob(self.y)


class Levels(Schedule):
    """The noise levels of a process, at the times t / T."""

    def __init__(self, prior: Diffusion) -> None:
        dtype = torch.get_default_dtype()
        self.alpha, self.sigma = prior.grid.alpha.to(dtype), prior.grid.sigma.clone().to(dtype)
        self.sigma[0], self.num_steps = LEFT, prior.num_steps

    def __call__(self, time: Tensor) -> tuple[Tensor, Tensor]:
        t = (time * self.num_steps).round().long()
        return self.alpha[t], self.sigma[t]


class Wrapped(Denoiser):
    """The estimate of x_0 of a process."""

    def __init__(self, prior: Diffusion) -> None:
        super().__init__()
        self.prior, self.schedule = prior, Levels(prior)

    def forward(self, x: Tensor, time: Tensor, **context: Any) -> Any:
        t = round(float(time) * self.prior.num_steps)
        output = self.prior.evaluate(x, t)["output"]
        return DiracPosterior(mean=self.prior.preconditioning[t].denoised(x, output))


def run(sampler: Any, prior: Diffusion, number: int) -> Tensor:
    start = prior.initial().expand([number]).sample()
    x: Tensor = sampler(start)
    return x


def tds(prior: Diffusion, seen: Linear, number: int) -> Tensor:
    """Twisted diffusion sampling (Wu et al. 2023) with the scalar look-ahead, in two runs."""
    s2 = prior.scale**2

    def twist(x: Tensor, noise: Tensor) -> Tensor:
        return seen.log_prob(x, s2 * noise**2 / (s2 + noise**2))

    sampler = TDSSampler(Wrapped(prior), twist, steps=prior.num_steps, silent=True)
    return torch.cat([run(sampler, prior, number // 2) for _ in range(2)])


def dps(prior: Diffusion, seen: Linear, number: int, strength: float) -> Tensor:
    """Diffusion posterior sampling (Chung et al. 2023).

    azula divides by the norm of the misses of the whole batch, not of each sample: times the square
    root of the number of samples, the strength means what it does for one.
    """
    zeta = strength * number**0.5
    options = {"zeta": zeta, "steps": prior.num_steps, "silent": True}
    return run(DPSSampler(Wrapped(prior), seen.y, seen.forward, **options), prior, number)


def mmps(prior: Diffusion, seen: Linear, number: int, iterations: int) -> Tensor:
    """Moment matching (Rozet et al. 2024) under DDPM steps."""
    noise = IsotropicCovariance(torch.tensor(seen.noise**2))
    settings = {"solver": "cg", "iterations": iterations}
    denoiser = MMPSDenoiser(Wrapped(prior), seen.y, seen.forward, noise, **settings)
    sampler = DDPMSampler(denoiser, steps=prior.num_steps, silent=True)
    return run(sampler, prior, number)
