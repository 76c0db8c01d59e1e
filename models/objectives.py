r"""What a network is trained to predict: denoising score matching and flow matching as one loss.

Notation: x_i = alpha_i x_0 + sigma_i eps on L levels of noise, i = 0 .. L - 1. Each
parameterisation reads the network's output F as an estimate of x_0 (``parameterization.py``),

.. math:: \hat x_0 = c_{skip} x_i + c_{out} F(c_{in} x_i; \tau_i),

so that F has one linear target, and every weighting of the error of x_0 is one of the error of F:

.. math:: w_i \|\hat x_0 - x_0\|^2 = w_i c_{out}^2 \|F - a_i x_0 - b_i \epsilon\|^2, \qquad
          a = \frac{1 - c_{skip} \alpha}{c_{out}}, \quad b = -\frac{c_{skip} \sigma}{c_{out}} .

Levels are drawn uniformly: *where the levels lie* is the law of the noise. A schedule with its own
spacing decides that; :func:`log_normal` places them as EDM draws them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor, nn

from .continuous import ContinuousSchedule, RectifiedFlow
from .grids import Grid, Schedule, check_positive
from .parameterization import (
    Parameterization,
    Time,
    network_times,
    preconditionings,
    usual_schedule,
)
from .schedules import Tabulated

Weighting = Literal["network", "snr", "min_snr", "edm"]


class Table(NamedTuple):
    """One row per level of noise."""

    alpha: Float64[Tensor, " levels"]
    sigma: Float64[Tensor, " levels"]
    time: Tensor
    on_input: Float64[Tensor, " levels"]
    on_data: Float64[Tensor, " levels"]
    on_noise: Float64[Tensor, " levels"]
    weight: Float64[Tensor, " levels"]


class Trainable(ABC):
    """What the trainer and its validation ask of an objective."""

    @property
    @abstractmethod
    def table(self) -> Any:
        """A named tuple of tensors: what makes two objectives different."""

    @abstractmethod
    def draw(self, count: int) -> Int64[Tensor, " count"]:
        """One level of noise per sample."""

    @abstractmethod
    def noise(self, x0: Tensor) -> Tensor:
        """The noise of a batch, on the CPU."""

    @abstractmethod
    def loss(
        self,
        network: Callable[..., Tensor],
        x0: Tensor,
        level: Int64[Tensor, " batch"],
        noise: Tensor,
        label: Tensor | None = None,
    ) -> Float[Tensor, " batch"]:
        """The loss of each sample."""


@dataclass(frozen=True, eq=False)
class Objective(Trainable):
    r"""The loss of one sample at one level of noise.

    Attributes:
        parameterization: what the network predicts, as in :class:`~smcdiff.models.Diffusion`;
            ``"velocity"`` is conditional flow matching (Lipman et al. 2023), whose network serves
            ``Flow(network, ..., data_at=0)``.
        schedule: the levels of noise; None: the usual ones of the parameterisation.
        weighting: the weight w of the error of x_0, with SNR = alpha^2 / sigma^2, s = sigma_data:
            ``"network"``: 1 / c_out^2, the plain error of the network's output;
            ``"snr"``: SNR, the plain error of the noise;
            ``"min_snr"``: min(SNR, gamma) (Hang et al. 2023);
            ``"edm"``: SNR + 1 / s^2 (Karras et al. 2022).
        gamma: for ``"min_snr"``.
        sigma_data: the standard deviation of the data, for ``"edm"`` of both kinds.
        time: what the network is fed, as in :class:`~smcdiff.models.Diffusion`.
        num_levels: L.
    """

    parameterization: Parameterization = "v"
    schedule: Schedule | None = None
    weighting: Weighting = "network"
    gamma: float = 5.0
    sigma_data: float = 0.5
    time: Time | Callable[[Grid], Tensor] | None = None
    num_levels: int = 1000

    @cached_property
    def table(self) -> Table:
        """Everything that depends on the level alone, in float64."""
        grid = (self.schedule or usual_schedule(self.parameterization)).grid(self.num_levels)
        rows = preconditionings(self.parameterization, grid, self.sigma_data)[1:]
        c_skip, c_out, c_in = (
            torch.tensor([getattr(row, name) for row in rows], dtype=torch.float64)
            for name in ("c_skip", "c_out", "c_in")
        )
        alpha, sigma = grid.alpha[1:], grid.sigma[1:]
        return Table(
            alpha,
            sigma,
            network_times(self.time, grid, self.parameterization)[1:],
            on_input=c_in,
            on_data=(1 - c_skip * alpha) / c_out,
            on_noise=-c_skip * sigma / c_out,
            weight=self._weight((alpha / sigma) ** 2, c_out),
        )

    def _weight(self, snr: Tensor, c_out: Tensor) -> Tensor:
        match self.weighting:
            case "network":
                return torch.ones_like(snr)
            case "snr":
                return snr * c_out**2
            case "min_snr":
                return snr.clamp(max=check_positive("gamma", self.gamma)) * c_out**2
            case "edm":
                return (snr + check_positive("sigma_data", self.sigma_data) ** -2) * c_out**2
            case other:
                raise ValueError(
                    f"weighting must be 'network', 'snr', 'min_snr' or 'edm', got {other!r}"
                )

    def draw(self, count: int) -> Int64[Tensor, " count"]:
        """Levels that cover all of them evenly, in rising order."""
        shares = torch.arange(count, dtype=torch.float64) + torch.rand(count, dtype=torch.float64)
        return (shares / count * self.num_levels).long().clamp(max=self.num_levels - 1)

    def noise(self, x0: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Standard normal, on the CPU."""
        return torch.randn(x0.shape, dtype=x0.dtype)

    def levels(
        self, level: Int64[Tensor, " batch"], like: Float[Tensor, "batch *event"]
    ) -> tuple[Tensor, Tensor]:
        """alpha and sigma, shaped to multiply `like`."""
        return self._rows("alpha", level, like), self._rows("sigma", level, like)

    def loss(
        self,
        network: Callable[..., Tensor],
        x0: Float[Tensor, "batch *event"],
        level: Int64[Tensor, " batch"],
        noise: Float[Tensor, "batch *event"],
        label: Int64[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """The weighted squared error per element of each sample, of ``network(x, time, label)``."""
        alpha, sigma, on_input, on_data, on_noise = (
            self._rows(name, level, x0)
            for name in ("alpha", "sigma", "on_input", "on_data", "on_noise")
        )
        x = alpha * x0 + sigma * noise
        time = self.table.time[level.cpu()].to(x0.device)
        time = time.to(x0.dtype) if time.is_floating_point() else time
        error = network(on_input * x, time, label) - (on_data * x0 + on_noise * noise)
        squared = error.square().flatten(1).mean(1)
        return (
            squared
            if self.weighting == "network"
            else squared * self._rows("weight", level, squared)
        )

    def _rows(self, name: str, level: Tensor, like: Tensor) -> Tensor:
        column: Tensor = getattr(self.table, name)
        return column[level.cpu()].to(like).reshape(-1, *[1] * (like.ndim - 1))


def log_normal(mean: float = -1.2, std: float = 1.2, num_levels: int = 1000) -> Tabulated:
    """alpha = 1 and sigmas at the quantiles of a log-normal law (Karras et al. 2022, table 1)."""
    share = (torch.arange(num_levels, dtype=torch.float64) + 0.5) / num_levels
    sigma = torch.exp(mean + check_positive("std", std) * torch.special.ndtri(share))
    return Tabulated(torch.ones_like(sigma), sigma, time=sigma)


def edm(sigma_data: float = 0.5, mean: float = -1.2, std: float = 1.2) -> Objective:
    """EDM's training: preconditioned network, log-normal noise, and its weighting (that of F)."""
    return Objective("edm", log_normal(mean, std), sigma_data=sigma_data)


def flow_matching(schedule: ContinuousSchedule | None = None) -> Objective:
    """Conditional flow matching; the straight path by default, times uniform or as spaced."""
    return Objective("velocity", schedule or RectifiedFlow())


@contextmanager
def private_stream(seed: int, step: int = 0) -> Iterator[None]:
    """Seeds torch's global stream inside the block and restores it afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed((seed * 1_000_003 + step) % 2**32)
        yield


@torch.no_grad()
def validation_loss(
    network: nn.Module,
    data: Shaped[Tensor, "sample *event"],
    labels: Int64[Tensor, " sample"] | None = None,
    objective: Trainable | None = None,
    num_draws: int = 50,
    seed: int = 0,
    chunk_size: int = 1024,
) -> float:
    """The mean loss over `num_draws` noise levels per sample, the same ones for every network."""
    objective, total = objective or Objective(), 0.0
    with private_stream(seed):
        for _ in range(num_draws):
            order = torch.randperm(len(data))
            level = objective.draw(len(data))[order]
            noise = objective.noise(data)
            for part in torch.arange(len(data)).split(chunk_size):
                label = None if labels is None else labels[part]
                eps = noise[part].to(data.device)
                loss = objective.loss(network, data[part], level[part], eps, label)
                total += loss.double().sum().item()
    return total / num_draws / len(data)
