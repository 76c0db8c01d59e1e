r"""Intermediate rewards: twists made of the reward at the denoised estimate (Feynman-Kac steering).

With :math:`\hat r_t` the program's log-density at the denoised estimate (Singhal et al. 2025,
arXiv 2501.06848, section 3), a twist is its current value, its running maximum or its running sum,

.. math:: \log \psi_t = \lambda \hat r_t, \quad \lambda \max_{s \ge t} \hat r_s, \quad
          \lambda \textstyle\sum_{s \ge t} \hat r_s .

The engine puts the true reward in place of the twist at t = 0, so that all of them aim at the same
target; they differ in variance only.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch

from smcdiff.arguments import check_kind, check_number, check_option, check_whole
from smcdiff.program import Program
from smcdiff.twist import Twist, TwistValue, View


class IntermediateReward(Twist):
    """The reward at the denoised estimate, or its running maximum or sum.

    Args:
        kind: ``"difference"`` (the current value: its differences are the weights), ``"max"`` or
            ``"sum"``.
        exponent: lambda, at least 0.
        num_draws: draws of x_0 to average over (0: the denoised mean; discrete processes always
            draw).
    """

    def __init__(
        self,
        kind: Literal["difference", "max", "sum"] = "difference",
        exponent: float = 1.0,
        num_draws: int = 0,
    ) -> None:
        check_option("kind", kind, ("difference", "max", "sum"))
        check_number("exponent", exponent, 0, math.inf, "[)")
        check_whole("num_draws", num_draws, 0)
        self.kind, self.exponent, self._draws = kind, exponent, num_draws

    @property
    def num_draws(self) -> int:
        return self._draws

    def evaluate(self, view: View) -> TwistValue:
        values = view.log_likelihood()
        draws = values[1:] if view.num_estimates > 1 else values
        reward = torch.logsumexp(draws, 0) - math.log(len(draws))
        before = view.memory.get("reward")
        if before is not None and self.kind == "max":
            reward = torch.maximum(before, reward)
        if before is not None and self.kind == "sum":
            reward = before + reward
        memory = {} if self.kind == "difference" else {"reward": reward}
        return TwistValue(self.exponent * reward, memory=memory)


class Tempered(Twist):
    r"""Another twist to a power that may depend on t: :math:`\psi_t^{\lambda_t}`.

    Args:
        twist: the twist.
        exponent: lambda_t in [0, 1], as a number or a function of ``(t, num_steps)``.
    """

    def __init__(self, twist: Twist, exponent: float | Callable[[int, int], float]) -> None:
        check_kind("the twist of Tempered", twist, Twist, "IntermediateReward()", optional=False)
        if not callable(exponent):
            check_number("exponent", exponent, 0, 1)
        self.twist, self.exponent = twist, exponent

    def prepare(self, program: Program) -> None:
        self.twist.prepare(program)
        self.take_needs(self.twist)  # a power neither needs more than its base nor offers less

    @property
    def num_draws(self) -> int:
        return self.twist.num_draws

    def evaluate(self, view: View) -> TwistValue:
        value = self.twist.evaluate(view)
        power = self._power(view.t, view.program.num_steps)
        cache = {name: part for name, part in value.cache.items() if name != "total"}
        for name in cache:
            if name == "direction" or name.startswith("bias/"):
                cache[name] = cache[name] * power
            if name in ("noise", "start_noise"):  # a Gaussian's covariance is divided by the power
                cache[name] = cache[name] / max(power, 1e-12)
        return TwistValue(value.log_psi * power, cache, value.memory)

    def _power(self, t: int, num_steps: int) -> float:
        power = self.exponent(t, num_steps) if callable(self.exponent) else self.exponent
        check_number(f"the exponent of Tempered at t = {t}", power, 0, 1)
        return power
