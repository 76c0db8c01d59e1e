r"""Proposals: where the next state comes from, and what that choice is worth.

A proposal draws :math:`x_{t-1} \sim q(\cdot \mid x_t)` and returns :math:`\log p - \log q` at the
draw. Any proposal that dominates the kernel gives the right answer.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float64
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from smcdiff.arguments import check_number
from smcdiff.laws import log_density
from smcdiff.process import Kernel, Tree, is_deterministic
from smcdiff.program import Program
from smcdiff.twist import View

from .linear_gaussian import (
    Covariance,
    LocalTwist,
    TwistedStep,
    law_covariance,
    stack,
    unstack,
)

if TYPE_CHECKING:
    from .evaluation import Evaluator


@dataclass(frozen=True)
class Move:
    """A draw of the next states.

    Attributes:
        x: the states by process.
        log_ratio: log kernel(x) - log proposal(x), or None where the proposal is the kernel.
        seen: the evaluator's look at x, where the proposal has taken it already.
    """

    x: dict[str, Tensor]
    log_ratio: Float64[Tensor, " particle"] | None = None
    seen: dict[str, Tree] | None = None


@dataclass(frozen=True)
class Start:
    """What a proposal may use to draw x_T.

    Attributes:
        laws: p_T by process, expanded to ``(particle, *plates)``.
        draws: draws from them.
        latents: the ordinary latents, drawn already.
        problems: the problem of each particle.
        twisted: whether the cache of a look offers what a twisted start needs.
        look: evaluates reference states at T; returns kernels and cache.
    """

    laws: dict[str, Distribution]
    draws: dict[str, Tensor]
    latents: Mapping[str, Tensor]
    problems: Tensor | None
    twisted: bool
    look: Callable[[dict[str, Tensor]], tuple[dict[str, Kernel], Tree]]


class Proposal(ABC):
    """Draws x_T and every transition; pure functions of what :meth:`observe` cached."""

    def prepare(self, program: Program) -> None:
        """Called once per run; may refuse the program."""

    def attach(self, evaluator: "Evaluator") -> None:
        """Called once per run with what looks at particles, for proposals that look ahead."""

    def latents(self, batch: int, problems: Tensor | None) -> tuple[dict[str, Tensor], Any]:
        """Values for ordinary latents and their log q (none: the program's own laws are used)."""
        return {}, 0.0

    def observe(self, view: View) -> Tree:
        """Tensors that the move out of ``view.x`` will need; gathered with their particles."""
        return {}

    def start(self, start: Start) -> Move:
        """Draws x_T; by default from p_T."""
        return Move(start.draws)

    def prepay(
        self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree
    ) -> Float64[Tensor, " particle"] | None:
        r"""An amount of log-weight to pay *before* resampling and moving.

        Where the twisted kernel's normaliser :math:`\nu_t(x_t)` is known, :math:`\log \nu_t - \log
        \psi_t` makes the move free of variance (fully adapted). Whatever is paid here is taken back
        from the weight of the move.
        """
        return None

    @abstractmethod
    def move(self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree) -> Move:
        """Draws x_{t-1}."""


class FromKernel(Proposal):
    """The process's own transitions (the bootstrap proposal)."""

    def move(self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree) -> Move:
        return Move({n: sample_as(k.law, x[n]) for n, k in kernels.items()})


class TwistedKernel(Proposal):
    r"""The kernel moved, and narrowed, towards where the twist points.

    The move out of x_t has the mean :math:`m + V d` and, with ``curvature``, the covariance
    :math:`(V^{-1} + K^\top R^{-1} K)^{-1}` (``linear_gaussian.py``); d is the twist's gradient,
    carried to t - 1. Without curvature it is the gradient shift of twisted diffusion samplers.

    Args:
        curvature: whether to narrow the proposal where the twist is Gaussian.
        temper: scales the shift (1: all of it).
        clip: the largest shift allowed, as the root mean square of its elements in units of the
            kernel's standard deviation (None: unlimited).
        twisted_start: whether x_T, too, is drawn from the twisted law.
    """

    def __init__(
        self,
        curvature: bool = True,
        temper: float = 1.0,
        clip: float | None = None,
        twisted_start: bool = True,
    ) -> None:
        check_number("temper", temper, 0, math.inf, "[)")
        check_number("clip", clip, 0, math.inf, "(]", or_none="unlimited")
        self.curvature, self.temper, self.clip = curvature, temper, clip
        self.twisted_start = twisted_start

    def prepare(self, program: Program) -> None:
        self.names = tuple(n for n in program.processes if not program.sources[n].discrete)

    def start(self, start: Start) -> Move:
        laws = {n: start.laws[n] for n in self.names}
        covariance = law_covariance(laws)
        wanted = self.twisted_start and self.curvature and start.twisted
        if not wanted or covariance is None:
            return Move(start.draws)
        reference = {n: laws[n].mean if n in laws else x for n, x in start.draws.items()}
        _, cache = start.look(reference)
        twist = cache["twist"]
        slope, noise = twist["start_slope"], twist["start_noise"]
        spread = covariance.times(slope)
        factor = torch.linalg.cholesky(noise + slope @ spread.mT)
        solved = torch.cholesky_solve(twist["start_residual"][..., None], factor)
        local = LocalTwist((slope.mT @ solved)[..., 0], slope, noise)
        x, log_ratio = self._draw(laws, covariance, local, start.draws)
        return Move({**start.draws, **x}, log_ratio)

    def move(self, t: int, x: dict[str, Tensor], kernels: dict[str, Kernel], cache: Tree) -> Move:
        laws = {n: kernels[n].law for n in self.names}
        covariance, twist = law_covariance(laws), cache["twist"]
        discrete = {n: sample_as(k.law, x[n]) for n, k in kernels.items() if n not in laws}
        if covariance is None or "direction" not in twist:
            return Move({**{n: sample_as(law, x[n]) for n, law in laws.items()}, **discrete})
        direction = self._limited(covariance, self.temper * twist["direction"])
        local = LocalTwist(direction)
        if self.curvature and "slope" in twist:
            local = LocalTwist(direction, twist["slope"], twist["noise"], twist.get("total"))
        moved, log_ratio = self._draw(laws, covariance, local, x)
        return Move({**moved, **discrete}, log_ratio)

    def _limited(self, covariance: Covariance, direction: Tensor) -> Tensor:
        """The direction, shortened where the shift that it makes would exceed the clip."""
        if self.clip is None:
            return direction
        shift = covariance.times(direction[:, None])[:, 0]
        size = (shift * direction).mean(-1, keepdim=True).sqrt()
        return direction * (self.clip / size.clamp(min=self.clip))

    @staticmethod
    def _draw(
        laws: Mapping[str, Distribution],
        covariance: Covariance,
        local: LocalTwist,
        like: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """A draw in the states' own dtypes, scored as it is stored."""
        step = TwistedStep(covariance, local)
        means = {n: law.mean for n, law in laws.items()}
        mean = stack(means)
        states = {n: m.to(like[n].dtype) for n, m in means.items()}
        x = unstack(mean + step.sample(), states)
        return x, step.log_ratio(stack(x) - mean)


def sample_as(law: Distribution, like: Tensor) -> Tensor:
    """A draw in the dtype of ``like``: exactly the state that is going to be scored."""
    x: Tensor = law.mean if is_deterministic(law) else law.sample()
    return x.to(like.dtype)


def log_ratio(law: Distribution, proposal: Distribution, x: Tensor) -> Tensor:
    """log p(x) - log q(x) in float64, per particle; zero where both are the same point."""
    if is_deterministic(law) or is_deterministic(proposal):
        if is_deterministic(law) and is_deterministic(proposal):
            return torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
        raise mismatched()
    return log_density(law, x) - log_density(proposal, x)


def mismatched() -> ValueError:
    """What to say where a point meets a density."""
    return ValueError(
        "one of kernel and proposal has no variance at this step and the other has: densities "
        "cannot be compared. Give both the same variance (eta, variance=)"
    )
