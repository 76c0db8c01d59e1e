r"""Noise schedules in continuous time: alpha and sigma as functions of s, from data to noise.

A network is fed s itself. A grid keeps T times s_1 < ... < s_T by its spacing, with
`span` = (first, last):

- "uniform": s_t = last t / T, equal steps from the data on;
- "quadratic": s_t = last (t / T)^2;
- "linspace": from first to last, equal steps after a first one from the data;
- "karras" and "log_snr" (`spacings`): between the noise levels at first and at last;
- times s_1 < ... < s_T of your own, for T steps only.

The derivatives of alpha and sigma, which velocity networks need, are exact (automatic).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from .grids import (
    Grid,
    Numbers,
    Rates,
    Schedule,
    check_num_steps,
    check_positive,
    described,
    prepend,
    table,
    wrong,
)
from .spacings import RHO, NoiseSpacing, Steps, noise_levels, shares

TimeSpacing: TypeAlias = Literal["uniform", "quadratic", "linspace", "karras", "log_snr"]
Span: TypeAlias = tuple[float, float]
HALVINGS = 100  # of an interval of times: to the last bit of float64


class ContinuousSchedule(Schedule, ABC):
    """A schedule that exists at all times."""

    spacing: TimeSpacing | Tensor
    span: Span

    def space(self, spacing: TimeSpacing | Numbers, span: Span) -> None:
        """Sets which times a grid keeps."""
        if not 0 < span[0] < span[1] < math.inf:
            raise wrong(
                "a span (first, last) of times, with 0 < first < last", f"{span}", "Data are at 0."
            )
        if isinstance(spacing, str) and spacing not in get_args(TimeSpacing):
            raise wrong(f"one of {get_args(TimeSpacing)}", repr(spacing), "Or give the times.")
        self.spacing = spacing if isinstance(spacing, str) else table(spacing)
        self.span = span

    @abstractmethod
    def level(self, s: Steps) -> tuple[Steps, Steps]:
        """alpha and sigma at the times s, differentiable in them."""

    def grid(self, num_steps: int) -> Grid:
        with torch.inference_mode(False), torch.enable_grad():
            s = self.times(check_num_steps(num_steps)).clone().requires_grad_()
            levels = self.level(s)
            rates = Rates(*(prepend(0.0, _derivative(level, s)) for level in levels))
        alpha, sigma = (level.detach() for level in levels)
        return Grid(prepend(1.0, alpha), prepend(0.0, sigma), prepend(0.0, s.detach()), rates)

    def times(self, num_steps: int) -> Steps:
        """s_1, ..., s_T."""
        (first, last), spacing = self.span, self.spacing
        steps = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
        if isinstance(spacing, Tensor):
            return _check_times(spacing, num_steps)
        match spacing:
            case "uniform":
                return last * steps
            case "quadratic":
                return last * steps**2
            case "linspace":
                return last + (first - last) * (1 - shares(num_steps))
            case "karras" | "log_snr":
                return self._times_at(self._levels(spacing, num_steps))

    def _levels(self, spacing: NoiseSpacing, num_steps: int) -> Steps:
        first, last = self._log_snr(torch.tensor(self.span, dtype=torch.float64)).tolist()
        if not math.isfinite(last):
            raise wrong(
                f"a finite log-SNR at the end of span = {self.span}, for spacing = {spacing!r}",
                f"{last}",
                "End before pure noise, as in span=(1e-3, 0.999).",
            )
        return noise_levels(spacing, first, last, num_steps)

    def _log_snr(self, s: Steps) -> Steps:
        alpha, sigma = self.level(s)
        return 2 * (alpha.log() - sigma.log())

    def _times_at(self, log_snr: Steps) -> Steps:
        """The times with these log-SNRs, by bisection."""
        low, high = (torch.full_like(log_snr, end) for end in self.span)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            late = self._log_snr(middle) < log_snr
            low, high = torch.where(late, low, middle), torch.where(late, middle, high)
        return high


class OrnsteinUhlenbeck(ContinuousSchedule):
    r"""Variance preserving, from a process with a constant rate:

    .. math:: dz = -\tfrac{r}{2} z\, ds + \sqrt{r}\, dW, \qquad
              \bar\alpha_s = e^{-r s}, \qquad s \in [0, 1], \quad r = \mathrm{rate}.
    """

    def __init__(
        self,
        rate: float = 6.0,
        spacing: TimeSpacing | Numbers = "uniform",
        span: Span = (1e-3, 1.0),
    ) -> None:
        self.rate = check_positive("rate", rate)
        self.space(spacing, span)

    def level(self, s: Steps) -> tuple[Steps, Steps]:
        return torch.exp(-self.rate * s / 2), torch.sqrt(-torch.expm1(-self.rate * s))


class SubVariancePreserving(ContinuousSchedule):
    r"""The sub-VP SDE with linear betas (Song et al. 2021, equations 13 and 29):

    .. math:: B_s = \beta_{min} s + (\beta_{max} - \beta_{min}) s^2 / 2, \qquad
              \alpha_s = e^{-B_s / 2}, \quad \sigma_s = 1 - e^{-B_s}.
    """

    def __init__(
        self,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        spacing: TimeSpacing | Numbers = "uniform",
        span: Span = (1e-3, 1.0),
    ) -> None:
        self.beta_min = check_positive("beta_min", beta_min)
        self.beta_max = check_positive("beta_max", beta_max)
        self.space(spacing, span)

    def level(self, s: Steps) -> tuple[Steps, Steps]:
        integral = self.beta_min * s + (self.beta_max - self.beta_min) * s**2 / 2
        return torch.exp(-integral / 2), -torch.expm1(-integral)


class VarianceExploding(ContinuousSchedule):
    r"""alpha = 1, geometric sigmas (Song & Ermon 2019; Song et al. 2021, the VE SDE):

    .. math:: \sigma_t = \sigma_{min} (\sigma_{max} / \sigma_{min})^{(t - 1) / (T - 1)}.

    The time is sigma itself. Other spacings of the sigmas are as above.
    """

    def __init__(
        self,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
        spacing: TimeSpacing | Numbers = "log_snr",
    ) -> None:
        self.space(spacing, (sigma_min, sigma_max))

    def level(self, s: Steps) -> tuple[Steps, Steps]:
        return torch.ones_like(s), s


class EDM(ContinuousSchedule):
    r"""alpha = 1, the sigmas of Karras et al. (2022, equation 5):

    .. math:: \sigma_t = \left(\sigma_{min}^{1/\rho} + \frac{t - 1}{T - 1}
              (\sigma_{max}^{1/\rho} - \sigma_{min}^{1/\rho})\right)^\rho.

    The time is sigma itself, as preconditioned networks D(x; sigma) want it
    (``parameterization="x0"``); raw ones F(x; c_noise) are ``parameterization="edm"``.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = RHO) -> None:
        self.rho = check_positive("rho", rho)
        self.space("karras", (sigma_min, sigma_max))

    def level(self, s: Steps) -> tuple[Steps, Steps]:
        return torch.ones_like(s), s

    def times(self, num_steps: int) -> Steps:
        first, last = (-2 * math.log(sigma) for sigma in self.span)
        return torch.exp(-noise_levels("karras", first, last, num_steps, self.rho) / 2)


class RectifiedFlow(ContinuousSchedule):
    r"""The straight interpolation of flow matching (Lipman et al. 2023; Liu et al. 2023):

    .. math:: \alpha_s = 1 - s, \quad \sigma_s = s, \qquad
              s \to \frac{\mathrm{shift}\; s}{1 + (\mathrm{shift} - 1) s}.

    A `shift` above 1 moves the kept times towards noise (Esser et al. 2024, equation 23). The
    literature often counts time the other way: such a network is ``lambda x, s: -net(x, 1 - s)``.
    """

    def __init__(
        self,
        shift: float = 1.0,
        spacing: TimeSpacing | Numbers = "uniform",
        span: Span = (1e-3, 1.0),
    ) -> None:
        self.shift = check_positive("shift", shift)
        self.space(spacing, span)

    def level(self, s: Steps) -> tuple[Steps, Steps]:
        return 1 - s, s

    def times(self, num_steps: int) -> Steps:
        s = super().times(num_steps)
        return self.shift * s / (1 + (self.shift - 1) * s)


class Interpolant(ContinuousSchedule):
    r"""Any alpha and sigma of your own (stochastic interpolants, Albergo et al. 2023).

    Args:
        alpha, sigma: differentiable functions of the time s, which map (T,) to (T,).
        spacing, span: which times a grid keeps.

    The VP SDE is ``Interpolant(lambda s: (-B(s) / 2).exp(), lambda s: (-(-B(s)).expm1()).sqrt())``.
    """

    def __init__(
        self,
        alpha: Callable[[Tensor], Tensor],
        sigma: Callable[[Tensor], Tensor],
        spacing: TimeSpacing | Numbers = "uniform",
        span: Span = (1e-3, 1.0),
    ) -> None:
        self.alpha, self.sigma = alpha, sigma
        self.space(spacing, span)

    def level(self, s: Steps) -> tuple[Steps, Steps]:
        return self.alpha(s), self.sigma(s)


def _derivative(values: Steps, s: Steps) -> Steps:
    if not values.requires_grad:  # they do not depend on s
        return torch.zeros_like(s)
    (rate,) = torch.autograd.grad(values.sum(), s, retain_graph=True, materialize_grads=True)
    return rate.detach()


def _check_times(times: Tensor, num_steps: int) -> Float64[Tensor, " steps"]:
    if times.shape != (num_steps,):
        raise wrong(
            f"one time per step, with shape ({num_steps},)",
            f"times with {described(times)}",
            "Leave out the time of the data, 0, or ask for as many steps as there are times.",
        )
    return times
