r"""What the configuration of a diffusers scheduler means.

A scheduler that takes one step from one state is a table: the level and the network's time at
t = 1, ..., T, and one `Step` between each two. Everything is read from the scheduler itself (betas
in float32, its own time steps), so that transitions agree with its `step` to rounding.

What differs from this package's own chains, and is kept as diffusers has it:

- `DDPMScheduler` adds no noise in its last step if that one leads from its first training step
  (``"leading"`` and ``"linspace"`` spacings), whatever the variance; else the last step of a
  learned variance interpolates between beta and 1e-20.
- `DDIMScheduler` aims at the level L // T training steps further on, which is not where the next
  step starts under ``"linspace"`` and, if T does not divide L, ``"trailing"``; it clips the
  estimate of x_0 but not that of the noise.
- ``set_alpha_to_one=False`` and ``final_sigmas_type="sigma_min"`` leave a little noise in x_0.
- EDM schedulers start from N(0, sigma_max^2 + 1).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..grids import Schedule
from ..parameterization import Parameterization, preconditionings
from ..schedules import Tabulated
from ..thresholding import Clipping, DynamicThresholding
from .scheduled import Level, Step, step

PREDICTIONS: dict[str, Parameterization] = {
    "epsilon": "epsilon",
    "sample": "x0",
    "v_prediction": "v",
}
SMALLEST = 1e-20  # diffusers' lower bound of a variance of which it takes the logarithm


@dataclass(frozen=True)
class Recipe:
    """A sampler in numbers.

    Attributes:
        schedule: the levels of x_1, ..., x_T.
        time: what the network is fed, with shape (T + 1,).
        steps: the transitions at t = 1, ..., T.
        parameterization, sigma_data: see ``Diffusion``.
        sign: of the network's output.
        clipping: of the estimate of x_0.
        learned: whether the network returns variances as well.
        start: the variance of x_T.
    """

    schedule: Schedule
    time: Tensor
    steps: list[Step]
    parameterization: Parameterization
    sigma_data: float = 0.5
    sign: float = 1.0
    clipping: Clipping = None
    learned: bool = False
    start: float = 1.0


def recipe(scheduler: Any, eta: float | None) -> Recipe:
    """The numbers of a scheduler whose time steps are set.

    Args:
        eta: the share of fresh noise; None: the scheduler's own.

    Raises:
        ValueError: a scheduler or an option whose step is no Gaussian law given one state.
    """
    name = type(scheduler).__name__
    if name not in RECIPES:
        raise ValueError(
            f"{name} is not supported: this package needs steps that look one state back, such as "
            f"those of {', '.join(RECIPES)}. Most checkpoints work with another one: "
            "scheduler=DDIMScheduler.from_config(scheduler.config)"
        )
    return RECIPES[name](scheduler, eta)


def _ddpm(scheduler: Any, eta: float | None) -> Recipe:
    config = scheduler.config
    _check(
        eta is None,
        f"DDPMScheduler has no eta, got {eta}: "
        "take scheduler=DDIMScheduler.from_config(scheduler.config)",
    )
    _check(
        config.variance_type in ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
        f"variance_type={config.variance_type!r} is not supported ('fixed_large_log' takes the "
        "root of a logarithm, 'learned' that of a network's output): take 'fixed_small', "
        "'fixed_large' or 'learned_range'",
    )
    times, trained = _training(scheduler)
    now = _preserving(trained[times])
    then = [Level(1.0, 0.0), *now[:-1]]
    steps = [
        _ddpm_step(a, b, config.variance_type, noisy=bool(time > 0))
        for a, b, time in zip(now, then, times, strict=True)
    ]
    learned = config.variance_type == "learned_range"
    return replace(_table(now, times, steps, config, _clipping(config)), learned=learned)


def _ddpm_step(now: Level, then: Level, kind: str, noisy: bool) -> Step:
    """The exact step towards the estimate, with another variance; none at the first time step."""
    plain = step(now, then, 1.0)
    large = 1 - (now.alpha / then.alpha) ** 2
    if not noisy:
        return replace(plain, variance=0.0)
    if kind == "fixed_large":
        return replace(plain, variance=large)
    if kind == "learned_range":
        return replace(plain, bounds=(max(plain.variance, SMALLEST), large))
    return plain


def _ddim(scheduler: Any, eta: float | None) -> Recipe:
    config, count = scheduler.config, scheduler.num_inference_steps
    _check(count is not None, "give num_steps, or call scheduler.set_timesteps first")
    times, trained = _training(scheduler)
    aims = times - config.num_train_timesteps // count
    final = scheduler.final_alpha_cumprod.cpu().double()
    now = _preserving(trained[times])
    then = _preserving(torch.where(aims >= 0, trained[aims.clamp(min=0)], final))
    clipping, share = _clipping(config), _share(eta, 0.0)
    raw = _table(now, times, [], config, clipping)
    known = preconditionings(raw.parameterization, raw.schedule.grid(len(now)))[1:]
    steps = [step(a, b, share, network) for a, b, network in zip(now, then, known, strict=True)]
    return replace(raw, steps=steps)


def _edm(scheduler: Any, eta: float | None) -> Recipe:
    return _exploding(scheduler, _share(eta, 0.0), None)


def _edm_solver(scheduler: Any, eta: float | None) -> Recipe:
    config = scheduler.config
    _check(
        config.solver_order == 1,
        f"a step of solver_order={config.solver_order} depends on earlier network outputs: take "
        "scheduler=EDMDPMSolverMultistepScheduler.from_config(scheduler.config, solver_order=1)",
    )
    usual = 1.0 if config.algorithm_type == "sde-dpmsolver++" else 0.0
    clipping = _clipping(config) if config.thresholding else None
    return _exploding(scheduler, _share(eta, usual), clipping)


def _exploding(scheduler: Any, eta: float, clipping: Clipping) -> Recipe:
    config = scheduler.config
    signs = {"epsilon": 1.0, "v_prediction": -1.0}
    _check(
        config.prediction_type in signs,
        f"prediction_type={config.prediction_type!r} is not supported with {_name(scheduler)}, "
        "nor by its step: 'epsilon' and 'v_prediction' are",
    )
    *_, final = sigmas = scheduler.sigmas.double().tolist()
    now = [Level(1.0, sigma) for sigma in reversed(sigmas[:-1])]
    then = [Level(1.0, final), *now[:-1]]
    return Recipe(
        _tabulated(now),
        _after_data(scheduler.timesteps.flip(0).cpu().double()),
        [step(a, b, eta) for a, b in zip(now, then, strict=True)],
        "edm",
        float(config.sigma_data),
        signs[config.prediction_type],
        clipping,
        start=config.sigma_max**2 + 1,
    )


def _fresh_flow(scheduler: Any, eta: float | None) -> Recipe:
    """Straight paths with fresh noise in every step (``stochastic_sampling``)."""
    _check(eta is None, f"a flow has no eta, got {eta}: give noise")
    now = [Level(1 - sigma, sigma) for sigma in flow_times(scheduler).tolist()]
    then = [Level(1.0, 0.0), *now[:-1]]
    steps = [Step(level.alpha, 0.0, variance=level.sigma**2) for level in then]
    time = _after_data(scheduler.timesteps.flip(0).cpu().double())
    return Recipe(_tabulated(now, (-1.0, 1.0)), time, steps, "velocity")


RECIPES: dict[str, Callable[[Any, float | None], Recipe]] = {
    "DDPMScheduler": _ddpm,
    "DDIMScheduler": _ddim,
    "EDMEulerScheduler": _edm,
    "EDMDPMSolverMultistepScheduler": _edm_solver,
    "FlowMatchEulerDiscreteScheduler": _fresh_flow,
}


def flow_times(scheduler: Any) -> Tensor:
    """The times s_1 < ... < s_T of a flow-matching scheduler, with shape (T,)."""
    config, sigmas = scheduler.config, scheduler.sigmas.cpu().double()[:-1]
    _check(not config.invert_sigmas, "invert_sigmas=True is not supported: data are at 0 here")
    _check(
        torch.allclose(scheduler.timesteps.cpu().double(), sigmas * config.num_train_timesteps),
        "timesteps that are not num_train_timesteps times the sigmas are not supported: give "
        "scheduler.set_timesteps the sigmas only",
    )
    return sigmas.flip(0)


def _training(scheduler: Any) -> tuple[Tensor, Tensor]:
    """The training steps that are kept, from data to noise, and alpha-bar at all of them."""
    times, trained = scheduler.timesteps.flip(0).cpu(), scheduler.alphas_cumprod.cpu().double()
    _check(
        bool((times >= 0).all() and (times < len(trained)).all()),
        f"time steps {times[0]} to {times[-1]} do not lie within the {len(trained)} of training: "
        "take fewer steps, or timestep_spacing='trailing'",
    )
    return times, trained


def _table(
    now: list[Level], times: Tensor, steps: list[Step], config: Any, clipping: Clipping
) -> Recipe:
    return Recipe(
        _tabulated(now),
        _after_data(times),
        steps,
        PREDICTIONS[config.prediction_type],
        clipping=clipping,
    )


def _tabulated(levels: list[Level], rates: tuple[float, float] | None = None) -> Tabulated:
    alpha, sigma = torch.tensor(levels, dtype=torch.float64).unbind(1)
    slopes = None if rates is None else tuple(torch.full_like(alpha, rate) for rate in rates)
    return Tabulated(alpha, sigma, rates=cast("tuple[Tensor, Tensor] | None", slopes))


def _preserving(alpha_bar: Tensor) -> list[Level]:
    return [Level(a**0.5, (1 - a) ** 0.5) for a in alpha_bar.tolist()]


def _after_data(times: Tensor) -> Tensor:
    """A place for t = 0 in front, with shape (T + 1,)."""
    return torch.cat([torch.zeros_like(times[:1]), times])


def _clipping(config: Any) -> Clipping:
    if config.thresholding:
        if config.sample_max_value <= 1:  # s is 1 always
            return (-1.0, 1.0)
        return DynamicThresholding(config.dynamic_thresholding_ratio, 1.0, config.sample_max_value)
    if config.get("clip_sample", False):
        return (-float(config.clip_sample_range), float(config.clip_sample_range))
    return None


def _share(eta: float | None, usual: float) -> float:
    _check(eta is None or 0 <= eta <= 1, f"eta lies between 0 and 1, got {eta}")
    return usual if eta is None else eta


def _name(scheduler: Any) -> str:
    return type(scheduler).__name__


def _check(fine: bool, message: str) -> None:
    if not fine:
        raise ValueError(message)
