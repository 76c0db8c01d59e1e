r"""Noise schedules: how much of the data is left when t steps remain.

x_0 is data, x_T is noise, and the integer t counts the steps that remain:

.. math:: x_t = \alpha_t x_0 + \sigma_t \varepsilon, \qquad \varepsilon \sim N(0, I).

A `Schedule` is a rule; `Schedule.grid(num_steps)` is the rule written out for T = num_steps: a
`Grid`, three tables indexed by t, with alpha_0 = 1 and sigma_0 = 0 exactly. A schedule is variance
preserving when alpha_t^2 + sigma_t^2 = 1; alpha-bar_t stands for alpha_t^2 there. The log-SNR is
log(alpha_t^2 / sigma_t^2), and falls from +inf at t = 0. Everything here is float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch.nn import functional

Scalar: TypeAlias = Float64[Tensor, ""]
Numbers: TypeAlias = Tensor | Sequence[float]
Spacing: TypeAlias = Literal["trailing", "linspace"]


class Bridge(NamedTuple):
    r"""The law of x_{t-1} given both ends: N(c_0 x_0 + c_t x_t, variance)."""

    c_0: Scalar
    c_t: Scalar
    variance: Scalar


class Transition(NamedTuple):
    """The law of x_t given x_{t-1}: N(ratio x_{t-1}, variance)."""

    ratio: Scalar
    variance: Scalar


@dataclass(frozen=True, eq=False)
class Grid:
    r"""A schedule on T steps: the tables `alpha`, `sigma` and `time`, each with shape (T + 1,).

    `time[t]` is what a network is fed at t; `time[0]` is never used. One noising step is

    .. math:: x_t = \alpha_{t|t-1} x_{t-1} + \sigma_{t|t-1} \varepsilon, \qquad
              \alpha_{t|t-1} = \frac{\alpha_t}{\alpha_{t-1}}, \quad
              \sigma_{t|t-1}^2 = \sigma_t^2 - \alpha_{t|t-1}^2 \sigma_{t-1}^2.
    """

    alpha: Float64[Tensor, " times"]
    sigma: Float64[Tensor, " times"]
    time: Float64[Tensor, " times"]

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma", "time"):
            _check_table(name, getattr(self, name), len(self.alpha))
        _check_data_level(self.alpha[0].item(), self.sigma[0].item())
        _check_falls(self.log_snr)

    @property
    def num_steps(self) -> int:
        return len(self.alpha) - 1

    @property
    def log_snr(self) -> Float64[Tensor, " times"]:
        return 2 * (self.alpha.log() - self.sigma.log())

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
            raise _wrong(
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
        fields = (f"{name}={_described(value)}" for name, value in vars(self).items())
        return f"{type(self).__name__}({', '.join(fields)})"


class VariancePreserving(Schedule):
    r"""The discrete schedule of a trained network, given by its betas with shape (L,):

    .. math:: \bar\alpha_i = \prod_{j \le i} (1 - \beta_j), \qquad
              \alpha_t = \sqrt{\bar\alpha_{i(t)}}, \quad \sigma_t = \sqrt{1 - \bar\alpha_{i(t)}}.

    Without betas it is the usual linear schedule: 1e-4 to 0.02 over L = 1000 training steps. A grid
    keeps T of the L training steps, always the last one; `time[t]` is the index i(t) in 0 .. L - 1:

    - "trailing" (as in diffusers): i(t) = round(L t / T) - 1, equal strides down to the data;
    - "linspace" (as in improved-diffusion): i(t) = round((L - 1) (t - 1) / (T - 1)), which also
      keeps the first training step.

    Both keep everything when T = L.
    """

    def __init__(self, betas: Numbers | None = None, spacing: Spacing = "trailing") -> None:
        linear = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        self.betas = linear if betas is None else _check_betas(betas)
        self.spacing = _check_spacing(spacing)

    def grid(self, num_steps: int) -> Grid:
        index = self._kept(_check_num_steps(num_steps))
        log_alpha_bar = torch.log1p(-self.betas).cumsum(0)[index]
        return _variance_preserving(log_alpha_bar, time=index.double())

    def _kept(self, num_steps: int) -> Int64[Tensor, " steps"]:
        length = len(self.betas)
        if num_steps > length:
            raise _wrong(
                f"at most {length} steps, the number of betas in training",
                f"num_steps = {num_steps}",
                "Ask for fewer, or use a schedule that exists at all times (LogSNR).",
            )
        t = torch.arange(1, num_steps + 1, dtype=torch.float64)
        if self.spacing == "trailing" or num_steps == 1:
            return (length * t / num_steps).round().long() - 1
        return ((length - 1) * (t - 1) / (num_steps - 1)).round().long()


class Cosine(Schedule):
    r"""The cosine schedule (Nichol & Dhariwal, 2021), L = num_train_steps and s = offset:

    .. math:: f(u) = \cos^2\left(\frac{\pi}{2} \frac{u + s}{1 + s}\right), \qquad
              \beta_i = \min\left(1 - \frac{f((i + 1) / L)}{f(i / L)}, 0.999\right).

    A grid keeps some of the L training steps, as in `VariancePreserving`.
    """

    def __init__(
        self, num_train_steps: int = 1000, offset: float = 0.008, spacing: Spacing = "trailing"
    ) -> None:
        u = torch.linspace(0, 1, _check_num_steps(num_train_steps) + 1, dtype=torch.float64)
        f = torch.cos(math.pi / 2 * (u + _check_positive("offset", offset)) / (1 + offset)) ** 2
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
            raise _wrong(
                "a log-SNR that falls: start > end, both finite",
                f"start = {start}, end = {end}",
                "Data have a high log-SNR, noise a low one: try LogSNR(9.0, -20.0).",
            )
        self.start, self.end = start, end

    def grid(self, num_steps: int) -> Grid:
        steps = torch.arange(_check_num_steps(num_steps), dtype=torch.float64).flip(0)
        log_snr = self.end + (self.start - self.end) * steps / max(num_steps - 1, 1)
        return _variance_preserving(functional.logsigmoid(log_snr), time=log_snr)


class OrnsteinUhlenbeck(Schedule):
    r"""Variance preserving in continuous time s in [0, 1], on equal steps of it:

    .. math:: dz = -\tfrac{r}{2} z\, ds + \sqrt{r}\, dW, \qquad
              \bar\alpha_s = e^{-r s}, \qquad s_t = t / T, \quad r = \mathrm{rate}.

    `time[t]` is s_t.
    """

    def __init__(self, rate: float = 6.0) -> None:
        self.rate = _check_positive("rate", rate)

    def grid(self, num_steps: int) -> Grid:
        s = torch.arange(1, _check_num_steps(num_steps) + 1, dtype=torch.float64) / num_steps
        return _variance_preserving(-self.rate * s, time=s)


class FromAlphas(Schedule):
    r"""Variance preserving, with alpha_1 > ... > alpha_T given by hand, with shape (T,):

    .. math:: \sigma_t^2 = (1 - \alpha_t)(1 + \alpha_t).

    `time`, with shape (T,), is what the network is fed: t itself if left out. alpha_0 = 1 is added.
    The only grid is the one with T steps.
    """

    def __init__(self, alphas: Numbers, time: Numbers | None = None) -> None:
        self.alphas = _check_alphas(alphas)
        self.time = _table(torch.arange(len(self.alphas)) + 1 if time is None else time)
        if self.time.shape != self.alphas.shape:
            raise _wrong(
                f"one time per alpha, with shape ({len(self.alphas)},)",
                f"time with {_described(self.time)}",
                "Leave out the time of the data: it is never used.",
            )

    def grid(self, num_steps: int) -> Grid:
        if num_steps != len(self.alphas):
            raise _wrong(
                f"num_steps = {len(self.alphas)}, the number of alphas given",
                f"num_steps = {num_steps}",
                f"Give FromAlphas the {num_steps} alphas you want, or ask for its own number.",
            )
        sigma = torch.sqrt((1 - self.alphas) * (1 + self.alphas))
        return Grid(_prepend(1.0, self.alphas), _prepend(0.0, sigma), _prepend(0.0, self.time))


def _variance_preserving(
    log_alpha_bar: Float64[Tensor, " steps"], time: Float64[Tensor, " steps"]
) -> Grid:
    alpha, sigma = torch.exp(log_alpha_bar / 2), torch.sqrt(-torch.expm1(log_alpha_bar))
    return Grid(_prepend(1.0, alpha), _prepend(0.0, sigma), _prepend(0.0, time))


def _prepend(first: float, rest: Float64[Tensor, " steps"]) -> Float64[Tensor, " times"]:
    return torch.cat([rest.new_tensor([first]), rest])


def _table(values: Numbers) -> Float64[Tensor, "*shape"]:
    return torch.as_tensor(values, dtype=torch.float64).detach().cpu().clone()


def _check_betas(betas: Numbers) -> Float64[Tensor, " steps"]:
    table = _table(betas)
    if table.ndim != 1 or len(table) == 0 or not bool(((table > 0) & (table < 1)).all()):
        raise _wrong(
            "betas with shape (num_train_steps,), all above 0 and below 1",
            _described(table),
            "From alpha-bar (with its leading 1) they are 1 - alpha_bar[1:] / alpha_bar[:-1].",
        )
    return table


def _check_alphas(alphas: Numbers) -> Float64[Tensor, " steps"]:
    table = _table(alphas)
    shaped = table.ndim == 1 and len(table) > 0
    if not (shaped and table[0] < 1 and table[-1] >= 0 and bool((table.diff() < 0).all())):
        raise _wrong(
            "alphas with shape (num_steps,), below 1, not negative, and falling at every step",
            _described(table),
            "Order them from data to noise, leave out alpha_0 = 1, and give alpha, not alpha-bar.",
        )
    return table


def _check_spacing(spacing: Spacing) -> Spacing:
    if spacing not in ("trailing", "linspace"):
        raise _wrong("'trailing' or 'linspace'", repr(spacing), "Leave it out for 'trailing'.")
    return spacing


def _check_num_steps(num_steps: int) -> int:
    if num_steps < 1:
        raise _wrong("at least one step", f"{num_steps}", "Ask for a positive number of steps.")
    return num_steps


def _check_positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise _wrong(f"a positive, finite {name}", f"{value}", "Give a number above 0.")
    return value


def _check_table(name: str, table: Tensor, length: int) -> None:
    shaped = table.dtype == torch.float64 and table.shape == (length,) and length >= 2
    positive = name == "time" or bool((table >= 0).all())
    if not (shaped and positive and bool(table.isfinite().all())):
        raise _wrong(
            f"{name} in float64 with shape (num_steps + 1,), finite, and no negative level",
            f"{table.dtype}, {_described(table)}",
            "Convert with .double(), or let a Schedule build the grid.",
        )


def _check_data_level(alpha: float, sigma: float) -> None:
    if alpha != 1 or sigma != 0:
        raise _wrong(
            "alpha[0] = 1 and sigma[0] = 0 exactly, since x_0 is data",
            f"alpha[0] = {alpha}, sigma[0] = {sigma}",
            "Put the level of the data in front of the noise levels.",
        )


def _check_falls(log_snr: Float64[Tensor, " times"]) -> None:
    rises = (~(log_snr.diff() < 0)).nonzero()
    if len(rises):
        t = int(rises[0]) + 1
        raise _wrong(
            "a log-SNR that falls at every step",
            f"{log_snr[t - 1].item():.6g} and then {log_snr[t].item():.6g} at t = {t}",
            "Order the levels from data to noise, without repetitions.",
        )


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    ends = f" from {value.flatten()[0]:.4g} to {value.flatten()[-1]:.4g}" if value.numel() else ""
    return f"shape {tuple(value.shape)}{ends}"


def _wrong(expected: str, got: str, fix: str) -> ValueError:
    return ValueError(f"expected {expected}; got {got}. {fix}")
