r"""A network under the steps of another library's sampler.

Samplers that keep no history move affinely in the state, the estimate of x_0 (clipped or not) and
the network's output F,

.. math:: x_{t-1} = a\, \hat x_0 + b\, x_t + c\, F + \sqrt{V}\, z, \qquad z \sim N(0, I),

with numbers a, b, c, V that no schedule needs to explain: a library may aim at levels between its
own steps, end in an x_0 with a little noise, or clip the estimate of x_0 but not that of the noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin as Distribution
from torch import Tensor

from smcdiff.laws import normal
from smcdiff.process import Kernel, Process, Signal, Tree

from ..diffusion import Diffusion
from ..parameterization import Preconditioning


class Level(NamedTuple):
    """x = alpha x_0 + sigma epsilon."""

    alpha: float
    sigma: float


@dataclass(frozen=True)
class Step:
    """One transition.

    Attributes:
        on_denoised, on_x, on_output: a, b and c.
        variance: V; of a learned one, its lower bound.
        bounds: the bounds of a learned V, of which the logarithms are interpolated.
    """

    on_denoised: float
    on_x: float
    on_output: float = 0.0
    variance: float = 0.0
    bounds: tuple[float, float] | None = None


def step(now: Level, then: Level, eta: float, network: Preconditioning | None = None) -> Step:
    r"""From one level to another with a share of fresh noise (Song et al. 2021, DDIM):

    .. math:: x_{t-1} = \alpha' \hat x_0 + \sigma' (\sqrt{1 - \tau}\, \hat\varepsilon
              + \sqrt{\tau} z), \qquad
              \tau = \eta^2 \left(1 - \frac{\alpha^2 \sigma'^2}{\alpha'^2 \sigma^2}\right).

    Args:
        now, then: the levels of x_t and of x_{t-1}.
        eta: 1 for DDPM and ancestral sampling, 0 for DDIM and Euler's method.
        network: :math:`\hat\varepsilon` is the network's own, though :math:`\hat x_0` may be
            clipped; None: the one that leads from :math:`\hat x_0` to x_t.
    """
    kept = (now.alpha / then.alpha * then.sigma / now.sigma) ** 2
    fresh = max(eta**2 * (1 - kept), 0.0)
    on_epsilon, variance = then.sigma * math.sqrt(1 - fresh), then.sigma**2 * fresh
    ratio = on_epsilon / now.sigma
    if network is None:
        return Step(then.alpha - ratio * now.alpha, ratio, variance=variance)
    on_x = ratio * (1 - now.alpha * network.c_skip)
    return Step(then.alpha, on_x, -ratio * now.alpha * network.c_out, variance)


class Scheduled(Process):
    """A diffusion model whose transitions are given.

    Args:
        base: asks the network, and knows what its output says about x_0.
        steps: the transitions at t = 1, ..., T.
    """

    def __init__(self, base: Diffusion, steps: Sequence[Step]) -> None:
        if len(steps) != base.num_steps:
            raise ValueError(f"{base.num_steps} steps are needed, got {len(steps)}")
        self.base, self.steps = base, tuple(steps)
        self.num_steps, self.event_shape = base.num_steps, base.event_shape
        self._signals = self._tabulate()

    @property
    def deterministic(self) -> bool:
        return all(step.variance == 0 for step in self.steps)

    def initial(self, **context: Any) -> Distribution:
        return self.base.initial(**context)

    def evaluate(self, x: Tensor, t: int, **context: Any) -> Tree:
        return self.base.evaluate(x, t, **context)

    def kernel(self, x: Tensor, t: int, evaluation: Tree = None, **context: Any) -> Kernel:
        if evaluation is None:
            evaluation = self.evaluate(x, t, **context)
        event_dim, step = len(self.event_shape), self.steps[t - 1]
        denoised = self.base.kernel(x, t, evaluation).denoised.mean
        output, variance = self._halves(evaluation["output"], step)
        mean = step.on_denoised * denoised + step.on_x * x
        if step.on_output:
            mean = mean + step.on_output * output
        spread = normal(denoised, self.signal(t).variance, event_dim)
        return Kernel(normal(mean, variance, event_dim), spread)

    def signal(self, t: int) -> Signal:
        return self._signals[t]

    def bridge(self, x_0: Tensor, x: Tensor, t: int) -> Tensor | None:
        if self.base.bridge(x_0, x, t) is None:
            return None
        step = self.steps[t - 1]
        mean = step.on_denoised * x_0 + step.on_x * x
        if step.on_output:
            mean = mean + step.on_output * self.base.preconditioning[t].output(x, x_0)
        return mean

    def calls(self, t: int) -> int:
        return self.base.calls(t)

    def _halves(self, output: Tensor, step: Step) -> tuple[Tensor, Tensor | float]:
        """F, and V (Nichol & Dhariwal 2021, equation 15, where it is learned)."""
        if self.base.variance != "learned":
            return output, step.variance
        output, learned = output.chunk(2, -len(self.event_shape))
        if step.bounds is None:
            return output, step.variance
        low, high = map(math.log, step.bounds)
        share = (learned + 1) / 2
        return output, torch.exp(share * high + (1 - share) * low)

    def _tabulate(self) -> list[Signal]:
        """The chain's own variance of x_0 given x_t: v_t = v_{t-1} + slope_{t-1}^2 V_t."""
        signals = [self.base.signal(0)]
        for t, step in enumerate(self.steps, 1):
            variance = signals[-1].variance + signals[-1].slope ** 2 * step.variance
            signals.append(replace(self.base.signal(t), variance=variance))
        return signals
