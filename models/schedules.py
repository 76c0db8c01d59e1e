r"""Noise schedules given by tables, or by their log-SNR (those in continuous time: `continuous`).

The notation is that of `grids`. Everything here is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn import functional

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
from .spacings import IndexSpacing, NoiseSpacing, kept_indices, noise_levels

Spacing: TypeAlias = Literal[IndexSpacing, NoiseSpacing]


class VariancePreserving(Schedule):
    r"""The discrete schedule of a trained network, given by its betas with shape (L,):

    .. math:: \bar\alpha_i = \prod_{j \le i} (1 - \beta_j), \qquad
              \alpha_t = \sqrt{\bar\alpha_{i(t)}}, \quad \sigma_t = \sqrt{1 - \bar\alpha_{i(t)}}.

    Without betas it is the usual linear schedule: 1e-4 to 0.02 over L = 1000 training steps. A grid
    keeps T of the L training steps; `time[t]` is the index i(t) in 0 .. L - 1:

    - "trailing" (as in diffusers): i(t) = round(L t / T) - 1, equal strides down to the data;
    - "leading" (as in diffusers, without offset): i(t) = floor(L / T) (t - 1), which keeps the
      first training step but not the last: x_T is then less noisy than in training;
    - "linspace" (as in improved-diffusion): i(t) = round((L - 1) (t - 1) / (T - 1)), which keeps
      both;
    - "quadratic" (Song et al. 2021, DDIM, appendix D.2): i(t) is the larger of t - 1 and
      round((L - 1) ((t - 1) / (T - 1))^2);
    - "karras" and "log_snr" (`spacings`): between the levels of the first and the last training
      step, whatever they are; `time[t]` is a fraction then, linear in the log-SNR;
    - indices i(1) < ... < i(T) of your own.

    Those by index keep everything when T = L.
    """

    def __init__(
        self, betas: Numbers | None = None, spacing: Spacing | Sequence[int] = "trailing"
    ) -> None:
        linear = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        self.betas = linear if betas is None else _check_betas(betas)
        self.spacing = _check_spacing(spacing, len(self.betas))

    def grid(self, num_steps: int) -> Grid:
        log_alpha_bar, length = torch.log1p(-self.betas).cumsum(0), len(self.betas)
        _check_most(check_num_steps(num_steps), length)
        spacing = self.spacing
        if isinstance(spacing, Tensor):
            index = _check_same(spacing, num_steps)
        elif spacing == "karras" or spacing == "log_snr":
            return self._between(log_alpha_bar, spacing, num_steps)
        else:
            index = kept_indices(spacing, length, num_steps)
        return _variance_preserving(log_alpha_bar[index], time=index.double())

    @staticmethod
    def _between(
        log_alpha_bar: Float64[Tensor, " train"], spacing: NoiseSpacing, num_steps: int
    ) -> Grid:
        trained = log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))
        wanted = noise_levels(spacing, trained[0].item(), trained[-1].item(), num_steps)
        time = np.interp(-wanted.numpy(), -trained.numpy(), np.arange(len(trained)))
        return _variance_preserving(functional.logsigmoid(wanted), time=torch.from_numpy(time))


class Cosine(Schedule):
    r"""The cosine schedule (Nichol & Dhariwal, 2021), L = num_train_steps and s = offset:

    .. math:: f(u) = \cos^2\left(\frac{\pi}{2} \frac{u + s}{1 + s}\right), \qquad
              \beta_i = \min\left(1 - \frac{f((i + 1) / L)}{f(i / L)}, 0.999\right).

    A grid keeps some of the L training steps, as in `VariancePreserving`.
    """

    def __init__(
        self,
        num_train_steps: int = 1000,
        offset: float = 0.008,
        spacing: Spacing | Sequence[int] = "trailing",
    ) -> None:
        u = torch.linspace(0, 1, check_num_steps(num_train_steps) + 1, dtype=torch.float64)
        f = torch.cos(math.pi / 2 * (u + check_positive("offset", offset)) / (1 + offset)) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        self.trained = VariancePreserving(betas, spacing)

    def grid(self, num_steps: int) -> Grid:
        return self.trained.grid(num_steps)


class LogSNR(Schedule):
    r"""Variance preserving, the log-SNR falling by equal steps from `start` to `end`:

    .. math:: \lambda_t = \mathrm{start} + (\mathrm{end} - \mathrm{start}) \frac{t - 1}{T - 1},
              \qquad \alpha_t^2 = \frac{1}{1 + e^{-\lambda_t}}.

    `time[t]` is the log-SNR itself. With one step only `end` is left.
    """

    def __init__(self, start: float, end: float) -> None:
        if not (math.isfinite(start) and math.isfinite(end) and start > end):
            raise wrong(
                "a log-SNR that falls: start > end, both finite",
                f"start = {start}, end = {end}",
                "Data have a high log-SNR, noise a low one: try LogSNR(9.0, -20.0).",
            )
        self.start, self.end = start, end

    def grid(self, num_steps: int) -> Grid:
        log_snr = noise_levels("log_snr", self.start, self.end, check_num_steps(num_steps))
        return _variance_preserving(functional.logsigmoid(log_snr), time=log_snr)


class FromAlphas(Schedule):
    r"""Variance preserving, with alpha_1 > ... > alpha_T given by hand, with shape (T,):

    .. math:: \sigma_t^2 = (1 - \alpha_t)(1 + \alpha_t).

    `time`, with shape (T,), is what the network is fed: t itself if left out. alpha_0 = 1 is added.
    The only grid is the one with T steps.
    """

    def __init__(self, alphas: Numbers, time: Numbers | None = None) -> None:
        self.alphas = _check_alphas(alphas)
        self.time = _times(time, self.alphas)

    def grid(self, num_steps: int) -> Grid:
        _check_same(self.alphas, num_steps)
        sigma = torch.sqrt((1 - self.alphas) * (1 + self.alphas))
        return Grid(prepend(1.0, self.alphas), prepend(0.0, sigma), prepend(0.0, self.time))


class Tabulated(Schedule):
    r"""Any levels given by hand, from data to noise and without the level of the data.

    Args:
        alpha: alpha_1, ..., alpha_T, with shape (T,).
        sigma: sigma_1, ..., sigma_T, with shape (T,). alpha_t / sigma_t must fall.
        time: what the network is fed, with shape (T,): t itself if left out.
        rates: the derivatives of alpha and sigma in the network's time, with shape (T,) each, for
            velocity networks.

    The only grid is the one with T steps.
    """

    def __init__(
        self,
        alpha: Numbers,
        sigma: Numbers,
        time: Numbers | None = None,
        rates: tuple[Numbers, Numbers] | None = None,
    ) -> None:
        self.alpha, self.sigma = table(alpha), table(sigma)
        _check_shape("sigma", self.sigma, self.alpha)
        self.time = _times(time, self.alpha)
        self.rates = None if rates is None else (table(rates[0]), table(rates[1]))
        for rate in self.rates or ():
            _check_shape("rate", rate, self.alpha)
        self.grid(len(self.alpha))  # refuses levels that are not noise levels

    def grid(self, num_steps: int) -> Grid:
        _check_same(self.alpha, num_steps)
        rates = self.rates and Rates(*(prepend(0.0, rate) for rate in self.rates))
        levels = prepend(1.0, self.alpha), prepend(0.0, self.sigma)
        return Grid(*levels, prepend(0.0, self.time), rates)


def _variance_preserving(
    log_alpha_bar: Float64[Tensor, " steps"], time: Float64[Tensor, " steps"]
) -> Grid:
    alpha, sigma = torch.exp(log_alpha_bar / 2), torch.sqrt(-torch.expm1(log_alpha_bar))
    return Grid(prepend(1.0, alpha), prepend(0.0, sigma), prepend(0.0, time))


def _check_betas(betas: Numbers) -> Float64[Tensor, " steps"]:
    values = table(betas)
    if values.ndim != 1 or len(values) == 0 or not bool(((values > 0) & (values < 1)).all()):
        raise wrong(
            "betas with shape (num_train_steps,), all above 0 and below 1",
            described(values),
            "From alpha-bar (with its leading 1) they are 1 - alpha_bar[1:] / alpha_bar[:-1].",
        )
    if float(values[0]) > 0.9 and float(values[-1]) < 0.1:
        raise wrong(
            "betas, the noise that each step adds, small at first",
            f"numbers that fall from {float(values[0]):.4g} to {float(values[-1]):.4g}",
            "From alpha-bar (alphas_cumprod) with a 1 put in front they are "
            "1 - alpha_bar[1:] / alpha_bar[:-1].",
        )
    return values


def _check_alphas(alphas: Numbers) -> Float64[Tensor, " steps"]:
    values = table(alphas)
    shaped = values.ndim == 1 and len(values) > 0
    if not (shaped and values[0] < 1 and values[-1] >= 0 and bool((values.diff() < 0).all())):
        raise wrong(
            "alphas with shape (num_steps,), below 1, not negative, and falling at every step",
            described(values),
            "Order them from data to noise, leave out alpha_0 = 1, and give alpha, not alpha-bar.",
        )
    return values


def _check_spacing(spacing: Spacing | Sequence[int], length: int) -> Spacing | Tensor:
    if isinstance(spacing, str):
        if spacing not in get_args(Spacing):
            raise wrong(
                f"one of {get_args(Spacing)}", repr(spacing), "Leave it out for 'trailing'."
            )
        return spacing
    index = torch.as_tensor(spacing)
    whole = index.ndim == 1 and len(index) > 0 and not index.is_floating_point()
    if not (whole and index[0] >= 0 and index[-1] < length and bool((index.diff() > 0).all())):
        raise wrong(
            f"indices of training steps that rise within 0..{length - 1}",
            described(index),
            "Order them from data to noise; time steps counted from 1 are one too many.",
        )
    return index


def _check_most(num_steps: int, length: int) -> None:
    if num_steps > length:
        raise wrong(
            f"at most {length} steps, the number of betas in training",
            f"num_steps = {num_steps}",
            "Ask for fewer, or use a schedule that exists at all times (LogSNR).",
        )


def _check_same(given: Tensor, num_steps: int) -> Tensor:
    if num_steps != len(given):
        raise wrong(
            f"num_steps = {len(given)}, the number of alphas given",
            f"num_steps = {num_steps}",
            f"Give the {num_steps} levels you want, or ask for the schedule's own number.",
        )
    return given


def _times(time: Numbers | None, like: Tensor) -> Float64[Tensor, " steps"]:
    times = table(torch.arange(len(like)) + 1 if time is None else time)
    _check_shape("time", times, like)
    return times


def _check_shape(name: str, values: Tensor, like: Tensor) -> None:
    if values.shape != like.shape or like.ndim != 1:
        raise wrong(
            f"one {name} per alpha, with shape ({len(like) if like.ndim else 'num_steps'},)",
            f"{name} with {described(values)}",
            f"Leave out the {name} of the data: it is never used.",
        )
