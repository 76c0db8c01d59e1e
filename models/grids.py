r"""Noise levels on a grid: how much of the data is left when t steps remain.

x_0 is data, x_T is noise, and the integer t counts the steps that remain:

.. math:: x_t = \alpha_t x_0 + \sigma_t \varepsilon, \qquad \varepsilon \sim N(0, I).

A `Schedule` is a rule; `Schedule.grid(num_steps)` is the rule written out for T = num_steps: a
`Grid`, tables indexed by t, with alpha_0 = 1 and sigma_0 = 0 exactly. A schedule is variance
preserving when alpha_t^2 + sigma_t^2 = 1; alpha-bar_t stands for alpha_t^2 there, and variance
exploding when alpha_t = 1. The log-SNR is log(alpha_t^2 / sigma_t^2), and falls from +inf at t = 0.
Everything here is float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float64
from torch import Tensor

Scalar: TypeAlias = Float64[Tensor, ""]
Numbers: TypeAlias = Tensor | Sequence[float | int]


class Bridge(NamedTuple):
    r"""The law of x_{t-1} given both ends: N(c_0 x_0 + c_t x_t, variance)."""

    c_0: Scalar
    c_t: Scalar
    variance: Scalar


class Transition(NamedTuple):
    """The law of x_t given x_{t-1}: N(ratio x_{t-1}, variance)."""

    ratio: Scalar
    variance: Scalar


class Rates(NamedTuple):
    """The derivatives of alpha and sigma in the schedule's own time, with shape (T + 1,) each."""

    alpha: Float64[Tensor, " times"]
    sigma: Float64[Tensor, " times"]


@dataclass(frozen=True, eq=False)
class Grid:
    r"""A schedule on T steps: the tables `alpha`, `sigma` and `time`, each with shape (T + 1,).

    `time[t]` is what a network is fed at t; `time[0]` is never used. `rates`, known where the
    schedule exists at all times, are what a velocity network needs. One noising step is

    .. math:: x_t = \alpha_{t|t-1} x_{t-1} + \sigma_{t|t-1} \varepsilon, \qquad
              \alpha_{t|t-1} = \frac{\alpha_t}{\alpha_{t-1}}, \quad
              \sigma_{t|t-1}^2 = \sigma_t^2 - \alpha_{t|t-1}^2 \sigma_{t-1}^2.
    """

    alpha: Float64[Tensor, " times"]
    sigma: Float64[Tensor, " times"]
    time: Float64[Tensor, " times"]
    rates: Rates | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma", "time"):
            _check_table(name, getattr(self, name), len(self.alpha))
        for name, rate in zip(("rates.alpha", "rates.sigma"), self.rates or (), strict=False):
            _check_table(name, rate, len(self.alpha))
        _check_data_level(self.alpha[0].item(), self.sigma[0].item())
        _check_falls(self.log_snr)

    @property
    def num_steps(self) -> int:
        return len(self.alpha) - 1

    @property
    def noise(self) -> Float64[Tensor, " times"]:
        """sigma_t / alpha_t, the noise level of x_t / alpha_t (EDM's sigma)."""
        return self.sigma / self.alpha

    @cached_property
    def log_snr(self) -> Float64[Tensor, " times"]:
        return 2 * (self.alpha.log() - self.sigma.log())

    @property
    def terminal_scale(self) -> float:
        """The standard deviation of pure noise at T: 1 where variance preserving, else sigma_T."""
        sigma = self.sigma[-1].item()
        total = self.alpha[-1].item() ** 2 + sigma**2
        return 1.0 if math.isclose(total, 1.0, abs_tol=1e-6) else sigma

    def transition(self, t: int) -> Transition:
        r"""The noising kernel q(x_t | x_{t-1}).

        Its variance (beta_t where variance preserving) is the "large" choice for a reverse kernel.
        """
        self._check_step(t)
        ratio = self.alpha[t] / self.alpha[t - 1]
        return Transition(ratio, self.sigma[t] ** 2 * self._forgotten(t))

    def posterior(self, t: int) -> Bridge:
        r"""The reverse kernel q(x_{t-1} | x_t, x_0), whose variance is the "small" choice:

        .. math:: c_0 = \alpha_{t-1} \frac{\sigma_{t|t-1}^2}{\sigma_t^2}, \quad
                  c_t = \alpha_{t|t-1} \frac{\sigma_{t-1}^2}{\sigma_t^2}, \quad
                  \tilde\beta_t = \sigma_{t-1}^2 \frac{\sigma_{t|t-1}^2}{\sigma_t^2}.

        At t = 1 this is (1, 0, 0) exactly.
        """
        self._check_step(t)
        forgotten = self._forgotten(t)
        c_t = self.alpha[t] / self.alpha[t - 1] * (self.sigma[t - 1] / self.sigma[t]) ** 2
        return Bridge(self.alpha[t - 1] * forgotten, c_t, self.sigma[t - 1] ** 2 * forgotten)

    def _forgotten(self, t: int) -> Scalar:
        """sigma_{t|t-1}^2 / sigma_t^2 = 1 - SNR_t / SNR_{t-1}, above 0 and at most 1."""
        return -torch.expm1(self.log_snr[t - 1 : t + 1].diff()[0])

    def _check_step(self, t: int) -> None:
        if not 1 <= t <= self.num_steps:
            raise wrong(
                f"a step t in 1..{self.num_steps}, which leads from x_t to x_(t-1)",
                f"t = {t}",
                "t counts the steps that remain: start at num_steps, stop after 1.",
            )


class Schedule(ABC):
    """A rule that says how noisy x_t is, for any number of steps."""

    @abstractmethod
    def grid(self, num_steps: int) -> Grid:
        """The tables alpha, sigma and time for t = 0 .. num_steps."""

    def __repr__(self) -> str:
        fields = (f"{name}={described(value)}" for name, value in vars(self).items())
        return f"{type(self).__name__}({', '.join(fields)})"


def prepend(first: float, rest: Float64[Tensor, " steps"]) -> Float64[Tensor, " times"]:
    """Puts the level of the data in front of the noise levels."""
    return torch.cat([rest.new_tensor([first]), rest])


def table(values: Numbers) -> Float64[Tensor, "*shape"]:
    """A float64 copy on the CPU."""
    try:
        return torch.as_tensor(values, dtype=torch.float64).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise wrong("a sequence of numbers or a tensor", repr(values), str(error)) from error


def check_num_steps(num_steps: int) -> int:
    if not isinstance(num_steps, Integral) or isinstance(num_steps, bool) or num_steps < 1:
        raise wrong("at least one step", repr(num_steps), "Ask for a positive, whole number.")
    return num_steps


def check_positive(name: str, value: float) -> float:
    if not (isinstance(value, Real) and math.isfinite(value) and value > 0):
        raise wrong(f"a positive, finite {name}", f"{value!r}", "Give a number above 0.")
    return value


def _check_table(name: str, values: Tensor, length: int) -> None:
    shaped = values.dtype == torch.float64 and values.shape == (length,) and length >= 2
    positive = name not in ("alpha", "sigma") or bool((values >= 0).all())
    if not (shaped and positive and bool(values.isfinite().all())):
        raise wrong(
            f"{name} in float64 with shape (num_steps + 1,), finite, and no negative level",
            f"{values.dtype}, {described(values)}",
            "Convert with .double(), or let a Schedule build the grid.",
        )


def _check_data_level(alpha: float, sigma: float) -> None:
    if alpha != 1 or sigma != 0:
        raise wrong(
            "alpha[0] = 1 and sigma[0] = 0 exactly, since x_0 is data",
            f"alpha[0] = {alpha}, sigma[0] = {sigma}",
            "Put the level of the data in front of the noise levels.",
        )


def _check_falls(log_snr: Float64[Tensor, " times"]) -> None:
    rises = (~(log_snr.diff() < 0)).nonzero()
    if len(rises):
        t = int(rises[0]) + 1
        raise wrong(
            "a log-SNR that falls at every step",
            f"{log_snr[t - 1].item():.6g} and then {log_snr[t].item():.6g} at t = {t}",
            "Order the levels from data to noise, without repetitions.",
        )


def described(value: object) -> str:
    """A value in an error message: tensors by their shape and ends."""
    if not isinstance(value, Tensor):
        return repr(value)
    ends = f" from {value.flatten()[0]:.4g} to {value.flatten()[-1]:.4g}" if value.numel() else ""
    return f"shape {tuple(value.shape)}{ends}"


def wrong(expected: str, got: str, fix: str) -> ValueError:
    return ValueError(f"expected {expected}; got {got}. {fix}")
