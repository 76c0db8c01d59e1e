r"""Steps along a flow: from the time s to s - h, towards the data.

Every kernel is affine in the state and in one velocity,

.. math:: x_{t-1} = a\, x_t + b\, v + \sqrt{V}\, z, \qquad z \sim N(0, I),

where v is the velocity at x_t or, for solvers of higher order, an average over the step.
The SDE with the marginals of the flow and noise g (Song et al. 2021; Domingo-Enrich et al. 2025,
proposition 1) is, in a time :math:`\tau = 1 - s` that runs from noise to data,

.. math:: dx = \left(-v + \tfrac{g^2}{2} \nabla \log p_s(x)\right) d\tau + g\, dB .
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .continuous import ContinuousSchedule
from .velocities import Levels

Noise = float | str | Callable[[float], float]  # the only word is "memoryless"
Field = Callable[[Tensor, float | Tensor], Tensor]  # the velocity at a state and a time s

OWN = ("exponential", "euler", "midpoint", "heun")
TORCHDIFFEQ = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "rk4")
NODES, WEIGHTS = map(torch.from_numpy, np.polynomial.legendre.leggauss(16))


@dataclass(frozen=True)
class Affine:
    """a, b and V of one step."""

    on_x: float
    on_velocity: float
    variance: float


def straight(h: float) -> Affine:
    """A step along one velocity: what is left of the ODE's solvers once that is known."""
    return Affine(1.0, -h, 0.0)


def exponential(path: ContinuousSchedule, now: Levels, then: Levels, noise: Noise) -> Affine:
    r"""Exact while the estimates of x_0 and of epsilon stand still, for any g:

    .. math:: x_{t-1} = \alpha_{t-1} \hat x_0 + \sqrt{\sigma_{t-1}^2 - V}\, \hat\varepsilon
              + \sqrt{V} z, \qquad V = \sigma_{t-1}^2 (1 - e^{-A}), \qquad
              A = \int \frac{g^2}{\sigma^2}\, ds .

    Memoryless, A is what the log-SNR gains: the transition of DDPM, q(x_{t-1} | x_t, x_0) at the
    estimate. Without noise it is DDIM's, and Euler's on the straight path.
    """
    lost = _lost(path, now, then, noise)
    kept = then.sigma / now.sigma * math.exp(-lost / 2)
    on_denoised = then.alpha - kept * now.alpha
    return Affine(
        on_denoised * now.sigma_rate / now.turn + kept,
        -on_denoised * now.sigma / now.turn,
        -math.expm1(-lost) * then.sigma**2,
    )


def euler(now: Levels, then: Levels, noise: Noise) -> Affine:
    r"""Euler-Maruyama, with g at the start of the step.

    The memoryless g is infinite in pure noise, and offset by h as in Adjoint Matching (appendix G),
    in the noise and in the drift: :math:`(-2 v + \dot\alpha x / (\alpha + h)) d\tau + g\, dB`.
    """
    h = now.time - then.time
    if noise == "memoryless":
        g = now.memoryless(offset=h)
        return Affine(1 + h * now.alpha_rate / (now.alpha + h), -2 * h, g**2 * h)
    g = _number(noise, now.time)
    pull = 0.5 * g**2 / (now.sigma * now.turn)
    return Affine(1 + h * pull * now.alpha_rate, -h * (1 + pull * now.alpha), g**2 * h)


def _number(noise: Noise, s: float) -> float:
    """g at s."""
    assert not isinstance(noise, str)
    g = noise(s) if callable(noise) else noise
    if not (math.isfinite(g) and g >= 0):
        raise ValueError(
            f"the noise must be finite and not negative, but is {g} at s = {s} (0: data, 1: "
            "noise). For one that grows without bound in pure noise take noise='memoryless'"
        )
    return g


def _lost(path: ContinuousSchedule, now: Levels, then: Levels, noise: Noise) -> float:
    """A, by Gauss-Legendre quadrature in log s where it has no closed form."""
    if noise == "memoryless":
        return then.log_snr - now.log_snr
    if noise == 0 or then.sigma == 0:  # the last step has no variance in any case
        return 0.0
    half = 0.5 * math.log(now.time / then.time)
    nodes = then.time * torch.exp(half * (1 + NODES))
    g = torch.tensor([_number(noise, node) for node in nodes.tolist()], dtype=torch.float64)
    return half * float((WEIGHTS * nodes * (g / path.level(nodes)[1]).square()).sum())


def stages(s: float, after: float, method: str) -> tuple[float, ...]:
    """The times at which a step from s asks for velocities (of torchdiffeq's: the first)."""
    match method:
        case "midpoint":
            return s, s - (s - after) / 2
        case "heun":
            return s, after
        case _:
            return (s,)


def average_velocity(
    field: Field, x: Tensor, velocity: Tensor, s: float, after: float, method: str
) -> Tensor:
    """The velocity that takes x from s to ``after`` in one straight step, to second order."""
    at = stages(s, after, method)[1]
    second = field(x - (s - at) * velocity, at)
    return second if method == "midpoint" else (velocity + second) / 2  # Heun


def integrate(
    field: Field,
    x: Tensor,
    s: float,
    after: float,
    method: str,
    tolerance: float,
    adjoint: Iterable[Tensor] | None,
) -> Tensor:
    """The same by a solver of torchdiffeq.

    Args:
        adjoint: the parameters to differentiate by the adjoint equation, which needs no memory for
            the steps; None differentiates the solver itself.
    """
    solvers = require_torchdiffeq()
    times = torch.tensor([0.0, s - after], dtype=x.dtype, device=x.device)  # spent so far

    def rate(spent: Tensor, state: Tensor) -> Tensor:
        return -field(state, s - spent)  # adaptive steps depend on x: the time has a gradient

    def at(end: int) -> dict[str, Any]:
        """No solver may step beyond an end, to ask at times that the network never saw."""
        return {} if method == "rk4" else {"step_t": times[end:][:1]}

    options: dict[str, Any] = {"method": method, "rtol": tolerance, "atol": tolerance}
    if adjoint is None:
        end = solvers.odeint(rate, x, times, options=at(1), **options)[-1]
    else:
        options |= {"adjoint_params": tuple(adjoint), "adjoint_options": at(0)}
        end = solvers.odeint_adjoint(rate, x, times, options=at(1), **options)[-1]
    return (x - end) / (s - after)


def require_torchdiffeq() -> Any:
    """The package, or what to do without it."""
    try:
        import torchdiffeq
    except ImportError as error:
        raise ImportError(
            f"the solvers {', '.join(TORCHDIFFEQ)} are those of torchdiffeq, which is not "
            "installed: pip install 'smcdiff[ode]', or take method='heun'"
        ) from error
    return torchdiffeq


def transition(
    path: ContinuousSchedule, now: Levels, then: Levels, noise: Noise, method: str
) -> Affine:
    """The step of a named method."""
    match method:
        case "exponential":
            return exponential(path, now, then, noise)
        case "euler":
            return euler(now, then, noise)
        case _:
            return straight(now.time - then.time)


def spread(levels: Levels, scale: float) -> tuple[float, float]:
    """For Gaussian data of this scale: the denoiser's slope, and the variance of x_0 given x_t."""
    gain = scale**2 / (levels.alpha**2 * scale**2 + levels.sigma**2)
    return levels.alpha * gain, levels.sigma**2 * gain
