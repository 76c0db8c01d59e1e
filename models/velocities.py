r"""What a velocity knows.

.. math:: x_s = \alpha_s x_0 + \sigma_s \varepsilon, \qquad
          v_s(x) = E[\dot x_s \mid x_s = x]
                 = \dot\alpha_s \hat x_0(x) + \dot\sigma_s \hat\varepsilon(x),

where s runs from data to noise (``continuous.py``) and dots are derivatives in s. With the *turn*
:math:`D = \alpha \dot\sigma - \dot\alpha \sigma > 0` (1 for the straight path) a velocity is all
that a diffusion model knows:

.. math:: \hat x_0 = \frac{\dot\sigma x - \sigma v}{D}, \qquad
          \hat\varepsilon = \frac{\alpha v - \dot\alpha x}{D}, \qquad
          \nabla \log p_s = -\frac{\hat\varepsilon}{\sigma} ,

and nothing is singular in pure noise. (Lipman et al. 2023; Liu et al. 2023; Albergo et al. 2023,
whose time is 1 - s.)
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from smcdiff.arguments import check_kind

from .continuous import ContinuousSchedule, RectifiedFlow
from .denoisers import Denoiser
from .grids import Grid

Prediction = Literal["x0", "epsilon", "score"]
NOTHING = 1e-12  # a smaller alpha is rounding: pure noise


@dataclass(frozen=True)
class Levels:
    r"""A path at one time.

    Attributes:
        time: s.
        alpha, sigma: what is left of the data, and how much noise there is.
        alpha_rate, sigma_rate: :math:`\dot\alpha` and :math:`\dot\sigma`.
    """

    time: float
    alpha: float
    sigma: float
    alpha_rate: float
    sigma_rate: float

    @property
    def turn(self) -> float:
        """D; the log-SNR falls at the rate 2 D / (alpha sigma)."""
        return self.alpha * self.sigma_rate - self.alpha_rate * self.sigma

    @property
    def log_snr(self) -> float:
        r""":math:`\log(\alpha^2 / \sigma^2)`, infinite for pure data and for pure noise."""
        if self.sigma == 0:
            return math.inf
        return 2 * math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf

    def denoised(self, x: Tensor, velocity: Tensor) -> Tensor:
        """E[x_0 | x], with the shape of x."""
        return (self.sigma_rate * x - self.sigma * velocity) / self.turn

    def epsilon(self, x: Tensor, velocity: Tensor) -> Tensor:
        """E[epsilon | x], with the shape of x."""
        return (self.alpha * velocity - self.alpha_rate * x) / self.turn

    def score(self, x: Tensor, velocity: Tensor) -> Tensor:
        """The gradient of the log-density of x, with the shape of x."""
        return -self.epsilon(x, velocity) / self.sigma

    def velocity(self, x: Tensor, prediction: Tensor, kind: Prediction) -> Tensor:
        """The inverse of the three above: a velocity from any of them (``"epsilon"`` and
        ``"score"`` say nothing of the data in pure noise, alpha = 0)."""
        match kind:
            case "x0":
                denoised, epsilon = prediction, (x - self.alpha * prediction) / self.sigma
            case "epsilon":
                denoised, epsilon = (x - self.sigma * prediction) / self.alpha, prediction
            case "score":
                return self.velocity(x, -self.sigma * prediction, "epsilon")
            case _:
                raise ValueError(f"kind must be 'x0', 'epsilon' or 'score', got {kind!r}")
        return self.alpha_rate * denoised + self.sigma_rate * epsilon

    def memoryless(self, offset: float = 0.0) -> float:
        r"""The noise g that makes x_0 independent of the source (Domingo-Enrich et al. 2025,
        arXiv 2409.08861, theorem 1):

        .. math:: g^2 = 2 D \frac{\sigma + h}{\alpha + h} ,

        where the offset h keeps g finite in pure noise.
        """
        return math.sqrt(2 * self.turn * (self.sigma + offset) / (self.alpha + offset))


def levels(grid: Grid) -> list[Levels]:
    """The levels of a grid at t = 0 .. T; at t = 0 (data) without rates."""
    if grid.rates is None:
        raise ValueError(
            "velocities need the derivatives of alpha and sigma: take a schedule that exists at "
            "all times (RectifiedFlow, Interpolant, ...)"
        )
    alpha = torch.where(grid.alpha > NOTHING, grid.alpha, 0.0)
    tables = (grid.time, alpha, grid.sigma, grid.rates.alpha, grid.rates.sigma)
    return [Levels(*row) for row in torch.stack(tables, 1).tolist()]


def levels_at(schedule: ContinuousSchedule, s: float) -> Levels:
    """The levels of a schedule at one time s > 0."""
    with torch.enable_grad():
        at = torch.tensor([s], dtype=torch.float64, requires_grad=True)
        both = schedule.level(at)
        rates = [torch.autograd.grad(each, at)[0].item() for each in both]
    return Levels(s, both[0].item(), both[1].item(), *rates)


class ExactVelocity(nn.Module):
    """The velocity of an exact denoiser, as a network would give it: the oracle of the tests.

    Args:
        denoiser: knows E[x_0 | x_s].
        schedule: the path (None: the straight one).
        data_at: the network's time of the data: 0 for s itself, 1 for 1 - s.
    """

    def __init__(
        self, denoiser: Denoiser, schedule: ContinuousSchedule | None = None, data_at: int = 1
    ) -> None:
        super().__init__()
        check_kind("denoiser", denoiser, Denoiser, "GaussianDenoiser(torch.zeros(2), 1.0)")
        if data_at not in (0, 1):
            raise ValueError(f"data_at is the network's time of the data, 0 or 1: {data_at}")
        self.denoiser, self.schedule, self.data_at = denoiser, schedule or RectifiedFlow(), data_at

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x of shape ``(batch, *event)``, and time of shape ``(batch,)``, the same for all."""
        if bool((time != time[:1]).any()):
            raise ValueError(f"one time for the whole batch is needed, got {time.unique()}")
        at = time[0].item() if len(time) else 0.5
        s = max(1.0 - at if self.data_at == 1 else at, 1e-6)  # where epsilon is not 0 / 0
        level, flat = levels_at(self.schedule, s), x.double().flatten(1)
        mean = self.denoiser.mean(flat, level.alpha, level.sigma)
        velocity = level.velocity(flat, mean, "x0").reshape(x.shape).to(x.dtype)
        return -velocity if self.data_at == 1 else velocity
