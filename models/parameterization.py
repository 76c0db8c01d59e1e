r"""What a network returns, and what that says about x_0.

Every usual parameterisation is affine in the network's output F, so that all of them are one
preconditioning (Karras et al. 2022, equation 7) with other numbers:

.. math:: \hat x_0(x_t) = c_{skip} x_t + c_{out} F(c_{in} x_t; \tau_t).

============  =====================================  =============================================
name          F estimates                            c_skip, c_out
============  =====================================  =============================================
"x0"          x_0                                    0, 1
"epsilon"     epsilon (Ho et al. 2020)               1 / alpha, -sigma / alpha
"v"           alpha epsilon - sigma x_0 (Salimans    alpha / n, -sigma / n,
              & Ho 2022)                             n = alpha^2 + sigma^2
"score"       grad log p(x_t) = -epsilon / sigma     1 / alpha, sigma^2 / alpha
              (Song et al. 2021)
"velocity"    alpha' x_0 + sigma' epsilon, primes    sigma' / D, -sigma / D,
              being derivatives in the schedule's    D = alpha sigma' - sigma alpha'
              time (Lipman et al. 2023)
"edm"         what preconditioning leaves (Karras    alpha s^2 / n, sigma s / sqrt(n),
              et al. 2022, table 1, for alpha = 1)   n = sigma^2 + alpha^2 s^2, s = sigma_data
============  =====================================  =============================================

c_in is 1 but for "edm", where it is 1 / sqrt(n). The network's time tau_t is the schedule's own,
unless another is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from smcdiff.arguments import check_option

from .continuous import EDM, RectifiedFlow
from .grids import Grid, Schedule, check_positive, described, wrong
from .schedules import VariancePreserving

Parameterization = Literal["epsilon", "x0", "v", "score", "velocity", "edm"]
Time = Literal["index", "sigma", "log_snr", "c_noise"]


@dataclass(frozen=True)
class Preconditioning:
    """The coefficients at one t."""

    c_skip: float
    c_out: float
    c_in: float = 1.0

    def fed(self, x: Tensor) -> Tensor:
        """What the network sees of x."""
        return x if self.c_in == 1.0 else self.c_in * x

    def denoised(self, x: Tensor, output: Tensor) -> Tensor:
        """The estimate of x_0, with the shape of x."""
        if (self.c_skip, self.c_out) == (0.0, 1.0):
            return output
        return self.c_skip * x + self.c_out * output

    def output(self, x: Tensor, x_0: Tensor) -> Tensor:
        """What the network would say if x_0 were known: the inverse of :meth:`denoised`."""
        return (x_0 - self.c_skip * x) / self.c_out


def usual_schedule(parameterization: Parameterization) -> Schedule:
    """What networks of this kind are mostly trained with."""
    match parameterization:
        case "edm":
            return EDM()
        case "velocity":
            return RectifiedFlow()
        case _:
            return VariancePreserving()


def preconditionings(
    parameterization: Parameterization, grid: Grid, sigma_data: float = 0.5
) -> list[Preconditioning]:
    """One for every t = 0, ..., T; that of t = 0 only holds the place.

    Raises:
        ValueError: the parameterisation does not exist, or says nothing about x_0 on this grid.
    """
    _check(parameterization, grid)
    s = check_positive("sigma_data", sigma_data)
    steps = range(1, grid.num_steps + 1)
    return [
        Preconditioning(0.0, 1.0),
        *(_coefficients(parameterization, grid, t, s) for t in steps),
    ]


def _coefficients(
    parameterization: Parameterization, grid: Grid, t: int, s: float
) -> Preconditioning:
    alpha, sigma = grid.alpha[t].item(), grid.sigma[t].item()
    match parameterization:
        case "x0":
            return Preconditioning(0.0, 1.0)
        case "epsilon":
            return Preconditioning(1 / alpha, -sigma / alpha)
        case "v":
            norm = alpha**2 + sigma**2
            return Preconditioning(alpha / norm, -sigma / norm)
        case "score":
            return Preconditioning(1 / alpha, sigma**2 / alpha)
        case "velocity":
            assert grid.rates is not None
            alpha_rate, sigma_rate = grid.rates.alpha[t].item(), grid.rates.sigma[t].item()
            turn = alpha * sigma_rate - sigma * alpha_rate
            return Preconditioning(sigma_rate / turn, -sigma / turn)
        case "edm":
            norm = sigma**2 + (alpha * s) ** 2
            return Preconditioning(alpha * s**2 / norm, sigma * s / norm**0.5, norm**-0.5)


def network_times(
    time: Time | Callable[[Grid], Tensor] | None, grid: Grid, parameterization: Parameterization
) -> Tensor:
    r"""What a network is fed at t = 0, ..., T (t = 0 only holds the place).

    Args:
        time: ``"index"``: the schedule's time, rounded to integers (int64); ``"sigma"``:
            :math:`\sigma_t / \alpha_t`; ``"log_snr"``; ``"c_noise"``: :math:`\log(\sigma_t /
            \alpha_t) / 4`; a function of the grid, such as ``lambda grid: 1000 * grid.time``, with
            shape (T + 1,); None: the schedule's time (``"c_noise"`` for ``"edm"``).
    """
    match time or ("c_noise" if parameterization == "edm" else "schedule"):
        case "schedule":
            times = grid.time
        case "index":
            times = _indices(grid)
        case "sigma":
            times = grid.sigma / grid.alpha
        case "log_snr":
            times = grid.log_snr
        case "c_noise":
            times = -grid.log_snr / 8
        case str():
            raise wrong(f"a time out of {get_args(Time)}", repr(time), "Or give a function.")
        case function:
            times = torch.as_tensor(function(grid))
    return _check_times(times, grid)


def _indices(grid: Grid) -> Tensor:
    if grid.time[-1] < grid.num_steps - 1:
        raise wrong(
            f"a schedule whose times are indices of training steps, for {grid.num_steps} steps",
            f"times up to {grid.time[-1].item():.4g}",
            "Scale them, as in time=lambda grid: (1000 * grid.time).long().",
        )
    return grid.time.round().long()


def _check_times(times: Tensor, grid: Grid) -> Tensor:
    if times.shape != grid.time.shape or not bool(times[1:].isfinite().all()):
        raise wrong(
            f"finite times for the network, with shape ({grid.num_steps + 1},)",
            described(times),
            "In pure noise (alpha = 0) sigma / alpha and the log-SNR are infinite: take another.",
        )
    return times.cpu()


def check_name(parameterization: str) -> None:
    check_option("parameterization", parameterization, get_args(Parameterization))


def _check(parameterization: str, grid: Grid) -> None:
    check_name(parameterization)
    if parameterization in ("epsilon", "score") and grid.alpha[-1] == 0:
        raise wrong(
            f"alpha_T > 0 for parameterization={parameterization!r}",
            "alpha_T = 0, where the noise says nothing about x_0",
            "End the schedule earlier (span, spacing), or use a network for 'v', 'x0', 'velocity'.",
        )
    if parameterization == "velocity" and grid.rates is None:
        raise wrong(
            "a schedule with rates (the derivatives of alpha and sigma) for velocities",
            "a schedule that exists at its own steps only",
            "Use RectifiedFlow or another ContinuousSchedule, or Tabulated(..., rates=...).",
        )
