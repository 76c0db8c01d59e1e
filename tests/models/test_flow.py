"""Flows against closed forms: Gaussian data stay Gaussian along the whole path."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size
from torch import Tensor, nn

from smcdiff.inference import SMC, TwistedSMC
from smcdiff.models import (
    Chain,
    ClassifierFree,
    ContinuousSchedule,
    Controlled,
    Diffusion,
    ExactVelocity,
    Flow,
    GaussianDenoiser,
    Interpolant,
    MixtureDenoiser,
    RectifiedFlow,
    VariancePreserving,
)
from smcdiff.models.velocities import levels, levels_at
from smcdiff.process import Process, is_deterministic

from ..oracles import affine, moments

BOUND = 4.3
MEAN, VARIANCE = 1.0, 0.25


def integral(s: Tensor | float) -> Any:
    """Of the linear betas from 0.1 to 20."""
    return 0.1 * s + 19.9 * s**2 / 2


SCHEDULES: dict[str, ContinuousSchedule] = {
    "straight": RectifiedFlow(),
    "shifted": RectifiedFlow(shift=3.0),
    "cosine": Interpolant(lambda s: (math.pi / 2 * s).cos(), lambda s: (math.pi / 2 * s).sin()),
    "VP": Interpolant(
        lambda s: (-integral(s) / 2).exp(), lambda s: (-(-integral(s)).expm1()).sqrt()
    ),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
preserving = pytest.mark.parametrize("name", ["straight", "cosine"])


def gaussian(dim: int = 1) -> GaussianDenoiser:
    return GaussianDenoiser(torch.full((dim,), MEAN).double(), VARIANCE)


def mixture() -> MixtureDenoiser:
    means = torch.tensor([[1.0, -0.5], [-1.2, 0.3], [0.1, 2.0]]).double()
    return MixtureDenoiser(means, torch.tensor([0.2, 0.5, 0.3]).double())


def flow(
    num_steps: int = 10,
    schedule: ContinuousSchedule | None = None,
    data_at: int = 1,
    dim: int = 1,
    **options: Any,
) -> Flow:
    velocity = ExactVelocity(gaussian(dim), schedule, data_at)
    scale = VARIANCE**0.5
    return Flow(
        velocity, (dim,), num_steps, schedule=schedule, data_at=data_at, scale=scale, **options
    )


def run(process: Process, x: Tensor) -> Tensor:
    """x_0 from x_T, without randomness or with torch's."""
    for t in range(process.num_steps, 0, -1):
        law = process.kernel(x, t).law
        x = law.mean if is_deterministic(law) else law.sample()
    return x


def slope(sizes: list[int], errors: list[float]) -> float:
    """The order of convergence, by regression."""
    x, y = (torch.tensor(v).double().log() for v in (sizes, errors))
    x, y = x - x.mean(), y - y.mean()
    return -float((x * y).sum() / x.square().sum())


# ---------------------------------------------------------------------------------- velocities


@every_schedule
@pytest.mark.parametrize("s", [0.01, 0.4, 0.9])
def test_velocity_knows_what_a_denoiser_knows(schedule: ContinuousSchedule, s: float) -> None:
    denoiser, level = mixture(), levels_at(schedule, s)
    x = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    mean = denoiser.mean(x, level.alpha, level.sigma)
    (score,) = torch.autograd.grad(denoiser.log_density(x, level.alpha, level.sigma).sum(), x)
    epsilon = (x - level.alpha * mean) / level.sigma
    velocity = ExactVelocity(denoiser, schedule, 0)(x, torch.full((7,), s, dtype=torch.float64))
    torch.testing.assert_close(level.denoised(x, velocity), mean)
    torch.testing.assert_close(level.epsilon(x, velocity), epsilon)
    torch.testing.assert_close(level.score(x, velocity), score)
    for prediction, kind in [(mean, "x0"), (epsilon, "epsilon"), (score, "score")]:
        torch.testing.assert_close(level.velocity(x, prediction, kind), velocity)  # type: ignore[arg-type]


@every_schedule
def test_velocity_is_kappa_x_plus_eta_score(schedule: ContinuousSchedule) -> None:
    """As in Adjoint Matching, in the time 1 - s: v = kappa x + eta score, g^2 = 2 eta."""
    level, x = levels_at(schedule, 0.6), torch.randn(5, 2).double()
    kappa = -level.alpha_rate / level.alpha
    eta = level.sigma * (kappa * level.sigma + level.sigma_rate)
    velocity = ExactVelocity(mixture(), schedule)(x, torch.full((5,), 0.4).double())
    score = level.score(x, -velocity)
    torch.testing.assert_close(velocity, kappa * x + eta * score)
    assert math.isclose(level.memoryless(), math.sqrt(2 * eta))


def test_nothing_is_singular_in_pure_noise() -> None:
    """There a velocity points to the mean of the data."""
    for name in ("straight", "cosine"):
        level = levels(SCHEDULES[name].grid(1))[1]
        assert level.alpha == 0.0
        x = torch.randn(3, 2).double()
        velocity = ExactVelocity(mixture(), SCHEDULES[name], 0)(x, torch.ones(3).double())
        mean = (mixture().weights[:, None] * mixture().means).sum(0).expand(3, 2)
        torch.testing.assert_close(level.denoised(x, velocity), mean)
        torch.testing.assert_close(level.epsilon(x, velocity), x)


def test_levels_are_those_of_the_schedule() -> None:
    grid = SCHEDULES["VP"].grid(4)
    for t, level in enumerate(levels(grid)):
        assert level.time == grid.time[t]
        assert level.alpha == grid.alpha[t]
        if t > 0:
            beta = 0.1 + 19.9 * level.time
            assert math.isclose(level.alpha_rate, -beta / 2 * level.alpha)
            assert math.isclose(level.memoryless(), math.sqrt(beta))
            there = levels_at(SCHEDULES["VP"], level.time)
            assert math.isclose(there.sigma_rate, level.sigma_rate)


# --------------------------------------------------------------------------------------- steps


@every_schedule
@pytest.mark.parametrize("options", [{}, {"noise": 0.0, "method": "heun"}, {"noise": 0.5}])
def test_both_directions_of_time_give_the_same_samples(
    schedule: ContinuousSchedule, options: dict[str, Any]
) -> None:
    start = torch.randn(50, 1, dtype=torch.float64)
    samples = []
    for data_at in (0, 1):
        torch.manual_seed(1)
        samples.append(run(flow(10, schedule, data_at, **options), start))
    torch.testing.assert_close(*samples, rtol=0, atol=1e-7)
    assert not samples[0].equal(start)


@every_schedule
@pytest.mark.parametrize(("noise", "eta"), [("memoryless", 1.0), (0.0, 0.0)])
def test_exponential_steps_are_those_of_a_diffusion(
    schedule: ContinuousSchedule, noise: Any, eta: float
) -> None:
    """DDPM's and DDIM's transitions on the same schedule."""
    one = flow(6, schedule, noise=noise)
    two = Diffusion(gaussian(), schedule, num_steps=6, eta=eta, scale=VARIANCE**0.5)
    for t in range(6, 0, -1):
        for mine, theirs in zip(affine(one, t), affine(two, t), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
        mine, theirs = one.signal(t), two.signal(t)
        assert mine is not None
        for field in ("alpha", "sigma", "slope", "variance", "spread"):
            assert math.isclose(getattr(mine, field), getattr(theirs, field), abs_tol=1e-9)
        x = torch.randn(4, 1).double()
        mine, theirs = one.kernel(x, t).denoised, two.kernel(x, t).denoised
        torch.testing.assert_close(mine.mean, theirs.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mine.variance, theirs.variance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["exponential", "euler"])
def test_euler_without_noise_is_exponential_on_the_straight_path(method: str) -> None:
    x = torch.randn(4, 1).double()
    law = flow(5, noise=0.0, method=method).kernel(x, 3).law
    pull = ExactVelocity(gaussian(), None, 1)(x, torch.full((4,), 0.4).double())
    torch.testing.assert_close(law.mean, x + 0.2 * pull)


def test_quadrature_of_the_noise_is_exact_where_known() -> None:
    """The memoryless noise of the VP path is sqrt(beta): given as a function, all is the same."""
    schedule = SCHEDULES["VP"]
    known, given = (
        flow(5, schedule, noise=g) for g in ("memoryless", lambda s: math.sqrt(0.1 + 19.9 * s))
    )
    for t in range(5, 0, -1):
        for one, two in zip(affine(known, t), affine(given, t), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


def test_euler_is_an_exponential_step_to_first_order() -> None:
    """Over a short step, for any noise: the same drift and the same variance."""

    def difference(h: float, noise: Any) -> Tensor:
        schedule = RectifiedFlow(spacing=[0.5 - h, 0.5, 1.0])
        steps = [
            affine(flow(3, schedule, noise=noise, method=m), 2) for m in ("euler", "exponential")
        ]
        return torch.stack([(a - b).abs().max() for a, b in zip(*steps, strict=True)])

    for noise in ("memoryless", 0.7, lambda s: s):
        ratio = difference(2e-3, noise) / difference(1e-3, noise)
        assert ((ratio > 3.9) & (ratio < 4.1)).all()  # they differ by h^2


# ----------------------------------------------------------------------------------------- ODE


def exact_map(x: Tensor) -> Tensor:
    """The flow of Gaussian data from pure noise."""
    return MEAN + VARIANCE**0.5 * x


@preserving
@pytest.mark.parametrize(
    ("method", "order"),
    [("euler", 1), ("exponential", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)],
)
def test_order_of_convergence(name: str, method: str, order: int) -> None:
    x = torch.tensor([[-1.5], [0.3], [2.0]]).double()
    sizes = [4, 8, 16] if order == 4 else [25, 50, 100]
    errors = [
        float(
            (run(flow(n, SCHEDULES[name], noise=0.0, method=method), x) - exact_map(x)).abs().max()
        )
        for n in sizes
    ]
    assert slope(sizes, errors) > order - 0.2  # some gain one on a straight path
    if name == "cosine":
        assert slope(sizes, errors) < order + 0.2
    assert errors[-1] < (0.03 if order == 1 else 1e-3)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"])
def test_adaptive_solvers_reach_their_tolerance_in_one_step(method: str) -> None:
    x = torch.randn(20, 1).double()
    errors = {}
    for tolerance in (1e-3, 1e-6):
        process = flow(1, noise=0.0, method=method, tolerance=tolerance)
        errors[tolerance] = float((run(process, x) - exact_map(x)).abs().max())
        assert process.calls(1) > 5
    assert errors[1e-6] < 2e-5
    assert errors[1e-6] < errors[1e-3]


class Learned(nn.Module):
    """A small velocity network."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.layers(torch.cat([x, time[:, None]], 1))
        return out


def test_adjoint_gradients_are_those_of_backpropagation() -> None:
    network, start = Learned(), torch.randn(5, 2).double()
    gradients = []
    for adjoint in (False, True):
        x = start.clone().requires_grad_()
        options = {"noise": 0.0, "method": "dopri5", "tolerance": 1e-9, "adjoint": adjoint}
        process = Flow(network, (2,), 2, train=True, **options)  # type: ignore[arg-type]
        loss = run(process, x).square().sum()
        gradients.append(torch.autograd.grad(loss, [x, *network.parameters()]))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def test_networks_are_frozen_unless_they_train() -> None:
    network = Learned().train()
    Flow(network, (2,), train=True)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    Flow(network, (2,))
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_half_precision_networks_have_float32_states() -> None:
    seen: list[Tensor] = []

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2, dtype=torch.bfloat16)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            seen.extend((x, time))
            out: Tensor = self.layer(x)
            return out

    process = Flow(Half(), (2,), 3)
    x = process.initial().sample((4,))
    assert process.kernel(x, 3).law.mean.dtype == x.dtype == torch.float32
    assert seen[0].dtype == torch.bfloat16
    assert seen[1].dtype == torch.float32  # 8 bits of time are too few


def test_guidance_extrapolates_the_velocity() -> None:
    def velocity(x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        return label[:, None] * x

    guidance = ClassifierFree(3.0, {"label": 0})
    prior = Flow(velocity, (2,), 4, noise=0.0, method="heun", guidance=guidance)
    x, label = torch.randn(5, 2), torch.arange(5)
    guided = prior.evaluate(x, 4, label=label)["velocity"]
    torch.testing.assert_close(guided, -3.0 * label[:, None] * x)
    assert prior.calls(4) == 4


TWO = (0.9, 4.0)  # of the noise levels 1/3, 1, 3 and infinity of four uniform steps


@pytest.mark.parametrize(
    ("method", "calls"),
    [
        ("euler", [1, 2, 2, 1]),
        ("midpoint", [2, 3, 4, 2]),
        ("heun", [2, 3, 4, 3]),
        ("dopri5", None),
    ],
)
def test_guidance_acts_in_its_interval(method: str, calls: list[int] | None) -> None:
    """Velocities are the guided ones inside, those of the network with its context outside."""
    asked = 0

    def velocity(x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        nonlocal asked
        asked += len(x)
        return label[:, None] * x

    guidance = ClassifierFree(3.0, {"label": 0}, TWO)
    prior = Flow(velocity, (2,), 4, noise=0.0, method=method, guidance=guidance)
    x, label = torch.randn(5, 2), torch.arange(5)
    for t in range(1, 5):
        asked = 0
        found = prior.evaluate(x, t, label=label)["velocity"]
        weight = 3.0 if t in (2, 3) else 1.0
        torch.testing.assert_close(found, -weight * label[:, None] * x)
        assert asked == 5 * prior.calls(t)
        assert calls is None or prior.calls(t) == calls[t - 1]


@pytest.mark.parametrize("data_at", [0, 1])
def test_network_is_asked_at_the_times_of_the_schedule(data_at: int) -> None:
    times: list[float] = []

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        times.extend(time.unique().tolist())
        return torch.zeros_like(x)

    process = Flow(velocity, (2,), 4, schedule=RectifiedFlow(shift=3.0), data_at=data_at)
    run(process, torch.zeros(3, 2))
    wanted = torch.tensor([3 * t / (1 + 2 * t) for t in (1.0, 0.75, 0.5, 0.25)])
    torch.testing.assert_close(torch.tensor(times), 1 - wanted if data_at else wanted)


# ----------------------------------------------------------------------------------------- SDE

NOISES: dict[str, Any] = {
    "none": 0.0,
    "constant": 0.6,
    "function": lambda s: 0.8 * math.sqrt(s),
    "memoryless": "memoryless",
}


def marginals(process: Flow, schedule: ContinuousSchedule) -> Tensor:
    """Errors of mean and variance at every t, with shape (T, 2)."""
    mean, variance, errors = torch.zeros(1).double(), torch.ones(1, 1).double(), []
    rows = levels(schedule.grid(process.num_steps))
    for t in range(process.num_steps, 0, -1):
        a, b, v = affine(process, t)
        mean, variance = a @ mean + b, a @ variance @ a.mT + v
        level = rows[t - 1]
        exact = level.alpha * MEAN, level.alpha**2 * VARIANCE + level.sigma**2
        errors.append([float(mean) - exact[0], float(variance) - exact[1]])
    return torch.tensor(errors).abs()


@pytest.mark.parametrize("method", ["exponential", "euler"])
@pytest.mark.parametrize("noise", NOISES)
@preserving
def test_all_noises_have_the_same_marginals(name: str, noise: str, method: str) -> None:
    """Up to an error that falls as 1/T, at all times below 0.9."""
    schedule, sizes = SCHEDULES[name], [25, 50, 100]
    errors = []
    for n in sizes:
        process = flow(n, schedule, noise=NOISES[noise], method=method)
        errors.append(float(marginals(process, schedule)[n // 10 :].max()))
    slow = noise == "constant" and method == "exponential"  # freezes what it should follow
    assert (0.5 if slow else 0.8) < slope(sizes, errors) < 1.2
    assert errors[-1] < 12 / sizes[-1]


@preserving
def test_only_the_memoryless_noise_forgets_the_source(name: str) -> None:
    def correlation(**options: Any) -> float:
        process, gain = flow(40, SCHEDULES[name], **options), torch.eye(1).double()
        for t in range(40, 0, -1):
            gain = affine(process, t)[0] @ gain
        return float(gain) / float(moments(process)[1]) ** 0.5

    assert abs(correlation()) < 1e-12
    assert abs(correlation(method="euler")) < 0.01
    assert math.isclose(correlation(noise=0.0), 1.0)
    assert 0.1 < correlation(noise=0.6) < 0.95


# Reference figures: an independent implementation of Adjoint Matching's sampler with the exact
# control for g(x) = 2 (x - 3)^2, whose posterior is N(2, 1/8) and -log Z = 4.3466. K, mean,
# variance and cost as measured there from samples.
FIGURES = [(20, 2.136, 0.1334, 3.96), (40, 2.076, 0.1294, 4.12), (200, 2.016, 0.1262, 4.30)]
EVIDENCE = -4.3466


def controlled(num_steps: int) -> Controlled:
    """The memoryless flow with the exact control of continuous time, u = -g dV/dx."""
    base = flow(num_steps, method="euler")
    rows, h = levels(base.grid), 1 / num_steps

    def control(x: Tensor, t: int, denoised: Tensor) -> Tensor:
        signal = base.signal(t)
        assert signal is not None
        pull = signal.slope / (0.25 + signal.spread)
        return -math.sqrt(h) * rows[t].memoryless(offset=h) * pull * (denoised - 3)

    return Controlled(base, control)


def line(values: Tensor) -> tuple[float, float]:
    """Slope and offset, from the values at 0 and 1."""
    return float(values[1] - values[0]), float(values[0])


def outcome(process: Controlled) -> tuple[float, float, float]:
    """Mean and variance of x_0, and E[1/2 sum |u|^2 + g(x_0)], by following the moments."""
    mean, variance, cost = 0.0, 1.0, 0.0
    for t in range(process.num_steps, 0, -1):
        x = torch.tensor([[0.0], [1.0]]).double()
        evaluation = process.evaluate(x, t)
        law = process.kernel(x, t, evaluation).law
        (a, b), (gain, offset) = (line(rows) for rows in (law.mean, evaluation["control"]))
        cost += 0.5 * ((gain * mean + offset) ** 2 + gain**2 * variance)
        mean, variance = a * mean + b, a**2 * variance + float(law.variance[0])
    return mean, variance, cost + 2 * variance + 2 * (mean - 3) ** 2


@pytest.mark.parametrize(("steps", "mean", "variance", "cost"), FIGURES)
def test_figures_of_the_memoryless_control(
    steps: int, mean: float, variance: float, cost: float
) -> None:
    found = outcome(controlled(steps))
    assert abs(found[0] - mean) < 2e-3  # of samples
    assert abs(found[1] - variance) < 5e-4
    assert abs(found[2] - cost) < 1e-2


def test_bias_of_the_memoryless_control_falls_with_the_steps() -> None:
    sizes = [100, 200, 400]
    found = [outcome(controlled(n)) for n in sizes]
    for values, truth in zip(zip(*found, strict=True), (2.0, 0.125, -EVIDENCE), strict=True):
        assert 0.9 < slope(sizes, [abs(value - truth) for value in values]) < 1.1


# ----------------------------------------------------------------------------------- inference

Y, SCALE = torch.tensor(1.8).double(), 0.4


def observed(prior: Process) -> Callable[[], None]:
    def program() -> None:
        x = prior("x")
        pyro.sample("y", dist.Normal(x[..., 0], SCALE), obs=Y)

    return program


def single_particles(prior: Process, number: int) -> Tensor:
    """log Z by each of so many particles alone."""
    method = TwistedSMC(
        observed(prior),
        num_particles=1,
        num_runs=number,
        covariance="jacobian",
        proposal="conjugate",
        damping=0.0,
    )
    return method.run().log_evidence


def answer(prior: Process) -> tuple[float, float, float]:
    """Posterior mean and variance of x_0[0], and the log-evidence, under the steps as they are."""
    mean, variance = (float(each.flatten()[0]) for each in moments(prior))
    total = variance + SCALE**2
    log_evidence = -0.5 * ((float(Y) - mean) ** 2 / total + math.log(2 * math.pi * total))
    gain = variance / total
    return mean + gain * (float(Y) - mean), variance * (1 - gain), log_evidence


@every_schedule
@pytest.mark.parametrize("data_at", [0, 1])
def test_one_particle_knows_the_evidence(schedule: ContinuousSchedule, data_at: int) -> None:
    """Of a memoryless flow with the exact velocity: twist, kernel and proposal agree."""
    prior = flow(12, schedule, data_at, dim=3)
    log_evidence = single_particles(prior, 10)
    assert float(log_evidence.std()) < 1e-9
    torch.testing.assert_close(float(log_evidence.mean()), answer(prior)[2], rtol=0, atol=1e-8)


def test_euler_maruyama_is_nearly_as_good() -> None:
    prior = flow(50, method="euler")
    log_evidence = single_particles(prior, 200)
    assert float(log_evidence.std()) < 0.1
    ratio = (log_evidence - answer(prior)[2]).exp()
    assert abs(float((ratio.mean() - 1) / (ratio.std() / 200**0.5))) < BOUND


@pytest.mark.parametrize("method", [SMC, TwistedSMC])
def test_particles_weigh_the_source_of_an_ode(method: Any) -> None:
    """Where one says so: that is importance sampling, and right."""
    prior = flow(8, noise=0.0, method="heun")
    mean, _, log_evidence = answer(prior)
    sizes = {"num_particles": 50, "num_runs": 200, "ess_threshold": 0.0}
    posterior = method(observed(prior), **sizes).run()
    ratio = (posterior.log_evidence - log_evidence).exp()
    average = (posterior.log_weights.softmax(-1) * (posterior.samples["x"][..., 0] - mean)).sum(-1)
    for values, truth in ((ratio, 1.0), (ratio * average, 0.0)):
        assert abs(float((values.mean() - truth) / (values.std() / 200**0.5))) < BOUND


def straight_velocity(x: Tensor, time: Tensor) -> Tensor:
    """The exact velocity on the straight path once more, in few operations and from time 0."""
    total = time**2 * VARIANCE + (1 - time) ** 2
    out: Tensor = MEAN + ((time * VARIANCE - (1 - time)) / total)[:, None] * (
        x - time[:, None] * MEAN
    )
    return out


def test_velocities_agree() -> None:
    x, time = torch.randn(4, 1).double(), torch.full((4,), 0.7).double()
    torch.testing.assert_close(straight_velocity(x, time), ExactVelocity(gaussian())(x, time))


@pytest.mark.parametrize(("method", "steps"), [("exponential", 2), ("heun", 2)])
def test_nuts_in_source_space(method: str, steps: int) -> None:
    prior = Flow(straight_velocity, (1,), steps, noise=0.0, method=method)
    mcmc = MCMC(NUTS(observed(prior)), num_samples=100, warmup_steps=30, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)
    assert set(draws) == {f"x_{steps}"}
    x = run(prior, draws[f"x_{steps}"][0])
    mean, variance, _ = answer(prior)
    for values, truth in ((x, mean), ((x - mean).square(), variance)):
        size = float(effective_sample_size(values[None])[0])
        error = float(values.std()) / size**0.5
        assert abs(float(values.mean()) - truth) < BOUND * error
        assert error < 0.12


# -------------------------------------------------------------------------------------- source


def test_source_need_not_be_gaussian() -> None:
    """x_0 = 2 e + 1 with uniform e: trajectories are straight, and Euler is exact."""

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        s = time[:, None]
        return -((x - (1 - s)) / (2 - s) + 1)

    source = dist.Uniform(-torch.ones(1), 1.0).to_event(1)
    prior = Flow(velocity, (1,), 7, data_at=0, noise=0.0, method="euler", source=source)
    assert prior.initial() is source
    assert prior.signal(3) is None
    x = prior.initial().sample((9,))
    torch.testing.assert_close(run(prior, x), 2 * x + 1)
    torch.testing.assert_close(prior.kernel(x, 7).denoised.mean, 2 * x + 1)
    program = inside(prior)
    method = TwistedSMC(program, num_particles=500, num_runs=100, ess_threshold=0.0)
    log_evidence = method.run().log_evidence
    truth = math.log(0.5 / 4)  # of x_0 ~ U(-1, 3)
    ratio = (log_evidence - truth).exp()
    assert abs(float((ratio.mean() - 1) / (ratio.std() / 10))) < BOUND


def inside(prior: Process) -> Callable[[], None]:
    def program() -> None:
        x = prior("x")[..., 0]
        pyro.factor("inside", torch.where((x > 1.0) & (x < 1.5), 0.0, -math.inf))

    return program


def test_source_may_be_a_process() -> None:
    """A diffusion's samples, pushed through a flow: both are linear, and so is the whole."""
    first = Diffusion(gaussian(), VariancePreserving([0.4, 0.7]), num_steps=2, variance="exact")
    second = flow(6, noise=0.0, method="heun")
    chain = Chain(first, second)
    mean, variance = moments(first)
    for t in range(6, 0, -1):
        a, b, _ = affine(second, t)
        mean, variance = a @ mean + b, a @ variance @ a.mT
    found = moments(chain)
    torch.testing.assert_close(found[0], mean)
    torch.testing.assert_close(found[1], variance)
    method = SMC(observed(chain), num_particles=100, num_runs=200)
    ratio = (method.run().log_evidence - answer(chain)[2]).exp()
    assert abs(float((ratio.mean() - 1) / (ratio.std() / 200**0.5))) < BOUND


# ----------------------------------------------------------------------------------- bad input


def network(x: Tensor, time: Tensor) -> Tensor:
    return x


BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": "magic"}, "method must be 'exponential', 'euler'"),
    ({"method": "heun"}, "take method='exponential' or 'euler', or noise=0.0"),
    ({"method": "dopri5", "noise": 0.3}, "solves ODEs"),
    ({"noise": "loud"}, "noise is 'memoryless', a number or a function"),
    ({"noise": -1.0}, "must be finite and not negative, but is -1.0"),
    ({"noise": lambda s: math.inf, "method": "euler"}, "take noise='memoryless'"),
    ({"data_at": 2}, "data_at is the network's time of the data"),
    ({"num_steps": 0}, "at least one step"),
    ({"source": dist.Normal(0.0, 1.0), "noise": 0.0}, "declare event dimensions"),
    ({"source": dist.Normal(torch.zeros(2), 1.0).to_event(1)}, "take noise=0.0"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Flow(network, (2,), **options)


def test_levels_need_rates() -> None:
    with pytest.raises(ValueError, match="take a schedule that exists at all times"):
        levels(VariancePreserving().grid(3))


def test_process_as_a_source_is_refused() -> None:
    with pytest.raises(Exception, match="source"):  # by the types first, where tests execute them
        Flow(network, (1,), noise=0.0, source=flow())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "velocity",
    [
        lambda x, time: x[:, :1],
        lambda x, time: x.sum(),
        lambda x, time: x.long(),
        lambda x, time: (x,),
    ],
)
def test_velocities_of_a_wrong_kind_are_refused(velocity: Any) -> None:
    with pytest.raises(ValueError, match="the (velocity|network) returned"):
        Flow(velocity, (2,), 3).evaluate(torch.zeros(4, 2), 3)


def test_exact_velocity_needs_one_time() -> None:
    with pytest.raises(ValueError, match="one time for the whole batch"):
        ExactVelocity(gaussian())(torch.zeros(2, 1), torch.tensor([0.1, 0.2]))


def test_unknown_prediction_is_refused() -> None:
    level = levels_at(RectifiedFlow(), 0.5)
    with pytest.raises(Exception, match="x0.*epsilon.*score"):
        level.velocity(torch.zeros(2), torch.zeros(2), "v")  # type: ignore[arg-type]


def test_missing_torchdiffeq_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"smcdiff\[ode\]"):
        Flow(network, (2,), noise=0.0, method="dopri5")
    Flow(network, (2,), noise=0.0, method="heun")
