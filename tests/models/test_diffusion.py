"""Reverse chains of exact denoisers, whatever the levels, against exact marginals and evidences."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from smcdiff.inference import TwistedSMC
from smcdiff.laws import CovariantNormal
from smcdiff.models import (
    EDM,
    Diffusion,
    GaussianDenoiser,
    Interpolant,
    MixtureDenoiser,
    OrnsteinUhlenbeck,
    RectifiedFlow,
    Schedule,
    SubVariancePreserving,
    Tabulated,
    Team,
    VarianceExploding,
    VariancePreserving,
)
from smcdiff.process import is_deterministic

from ..oracles import affine, moments

SCHEDULES: dict[str, Schedule] = {
    "linear": VariancePreserving(),
    "sub-VP": SubVariancePreserving(),
    "variance exploding": VarianceExploding(0.05, 30.0),
    "EDM": EDM(),
    "rectified": RectifiedFlow(),
    "rectified, shifted": RectifiedFlow(shift=3.0, spacing="linspace"),
    "own": Interpolant(lambda s: 1 / (1 + s), lambda s: 2 * s.sqrt(), spacing="karras"),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
STEPS = 7
MEAN = torch.tensor([0.3, -0.4, 1.0], dtype=torch.float64)
COVARIANCE = torch.tensor(
    [[1.0, 0.5, 0.2], [0.5, 0.8, -0.3], [0.2, -0.3, 1.5]], dtype=torch.float64
)
EYE = torch.eye(3, dtype=torch.float64)


def gaussian() -> GaussianDenoiser:
    return GaussianDenoiser(MEAN, COVARIANCE)


def noised(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of x_t."""
    return alpha * MEAN, alpha**2 * COVARIANCE + sigma**2 * EYE


def law_at(schedule: Schedule, num_steps: int, t: int) -> CovariantNormal:
    grid = schedule.grid(num_steps)
    mean, covariance = noised(grid.alpha[t], grid.sigma[t])
    values, vectors = torch.linalg.eigh(covariance)
    floor = 0.5 * values[:1].expand(3)
    return CovariantNormal(mean, floor, vectors * (values - floor).sqrt())


# -------------------------------------------------------------------------------- exact marginals


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@every_schedule
def test_exact_chain_has_the_exact_marginals(schedule: Schedule, eta: float) -> None:
    """At every step, from a few steps of any size, whatever is kept of the noise."""
    settings: Any = {"num_steps": STEPS, "variance": "exact", "eta": eta}
    prior = Diffusion(gaussian(), schedule, **settings, source=law_at(schedule, STEPS, STEPS))
    mean, covariance = noised(prior.grid.alpha[-1], prior.grid.sigma[-1])
    for t in range(STEPS, 0, -1):
        slope, offset, variance = affine(prior, t)
        mean, covariance = slope @ mean + offset, slope @ covariance @ slope.mT + variance
        expected = noised(prior.grid.alpha[t - 1], prior.grid.sigma[t - 1])
        torch.testing.assert_close(mean, expected[0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(covariance, expected[1], rtol=1e-9, atol=1e-10)


LINES: dict[str, Schedule] = {
    "linear": VariancePreserving([0.2, 0.4, 0.6]),
    "variance exploding": VarianceExploding(0.3, 2.0),
    "EDM": EDM(0.3, 2.0, rho=3.0),
    "rectified": RectifiedFlow(),
}


@pytest.mark.parametrize("schedule", LINES.values(), ids=LINES)
def test_exact_chain_of_a_mixture_has_the_exact_marginals(schedule: Schedule) -> None:
    """Densities on a line, pushed through the mixture kernels by summation."""
    means = torch.tensor([[-1.5], [0.5], [2.0]], dtype=torch.float64)
    denoiser = MixtureDenoiser(means, torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64))
    prior = Diffusion(denoiser, schedule, num_steps=3, variance="mixture")
    line = torch.linspace(-16, 16, 801, dtype=torch.float64)[:, None]
    width = line[1, 0] - line[0, 0]

    def density(t: int) -> Tensor:
        level = prior.grid.alpha[t].item(), prior.grid.sigma[t].item()
        return denoiser.log_density(line, *level).exp()

    for t in (3, 2, 1):
        into = prior.kernel(line, t).law.log_prob(line[:, None]).exp()
        pushed = (into * density(t) * width).sum(-1)
        torch.testing.assert_close(pushed, density(t - 1), rtol=0, atol=1e-9)


# ----------------------------------------------------------------------------------- convergence


def error(schedule: Schedule, num_steps: int, **options: Any) -> float:
    """How far the law of x_0 is from the data: the largest error of a first or second moment."""
    start = law_at(schedule, num_steps, num_steps)
    prior = Diffusion(gaussian(), schedule, num_steps=num_steps, source=start, **options)
    mean, covariance = moments(prior)
    return max(float((mean - MEAN).abs().max()), float((covariance - COVARIANCE).abs().max()))


def order(schedule: Schedule, **options: Any) -> float:
    """Minus the slope of log error in log T."""
    counts = [48, 96, 192]
    errors = [error(schedule, count, **options) for count in counts]
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


CONVERGING: dict[str, Schedule] = {
    "Ornstein-Uhlenbeck": OrnsteinUhlenbeck(spacing="quadratic"),  # sigma^2 ~ s: no equal steps
    "sub-VP": SubVariancePreserving(spacing="quadratic"),
    "EDM": EDM(0.002, 10.0),
    "variance exploding": VarianceExploding(1e-3, 10.0),
    "rectified": RectifiedFlow(),
}


KERNELS: dict[str, Any] = {
    "small": {"variance": "small"},
    "large": {"variance": "large"},
    "flow": {"eta": 0.0},
}


@pytest.mark.parametrize("options", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("name", CONVERGING)
def test_order_of_convergence(name: str, options: Any) -> None:
    """Weak order 1 in the number of steps, without any sampling."""
    assert order(CONVERGING[name], **options) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("name", ["sub-VP", "EDM"])
def test_larger_variances_belong_to_the_noise_that_is_renewed(name: str) -> None:
    """eta^2 beta, not beta: where less noise is renewed, the chain converges to the data, too."""
    assert order(CONVERGING[name], variance="large", eta=0.5) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_without_noise_every_variance_is_a_flow(variance: Any) -> None:
    layer = nn.Conv1d(1, 2 if variance == "learned" else 1, 1)
    settings: Any = {"eta": 0.0, "variance": variance}
    prior = Diffusion(lambda x, time: layer(x), None, (1, 4), 5, **settings)
    x = torch.randn(6, 1, 4)
    assert prior.deterministic
    assert all(is_deterministic(prior.kernel(x, t).law) for t in range(1, 6))
    assert all(prior.signal(t).variance == 0 for t in range(6))


# --------------------------------------------------------------------------------- the first state


@pytest.mark.parametrize(
    ("schedule", "scale"),
    [
        (VariancePreserving(), 1.0),
        (RectifiedFlow(), 1.0),
        (VarianceExploding(0.01, 50.0), 50.0),
        (EDM(), 80.0),
        (Tabulated([1.0, 0.5], [0.5, 3.0]), 3.0),
    ],
)
def test_paths_start_from_noise(schedule: Schedule, scale: float) -> None:
    prior = Diffusion(gaussian(), schedule, num_steps=2)
    start = prior.initial()
    assert start.mean.tolist() == [0.0] * 3
    assert start.stddev.tolist() == pytest.approx([scale] * 3, rel=1e-15)
    if scale == 1.0:
        assert start.stddev.tolist() == [1.0] * 3


# ------------------------------------------------------------------------------------- look-aheads


@pytest.mark.parametrize("variance", ["small", "large", "exact"])
@every_schedule
def test_signals_are_those_of_the_chain(schedule: Schedule, variance: Any) -> None:
    """Slope and variance of x_0 given x_t, by following the chain from x_t down."""
    data = GaussianDenoiser(torch.tensor([0.4], dtype=torch.float64), 0.8)
    prior = Diffusion(data, schedule, num_steps=STEPS, variance=variance)
    for t in range(1, STEPS + 1):
        slope, total = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1).double()
        for step in range(t, 0, -1):
            one, _, spread = affine(prior, step)
            slope, total = one @ slope, one @ total @ one.mT + spread
        signal = prior.signal(t)
        level = (signal.alpha, signal.sigma)
        assert level == (prior.grid.alpha[t].item(), prior.grid.sigma[t].item())
        assert signal.slope == pytest.approx(slope.item(), rel=1e-7, abs=1e-12)
        assert signal.variance == pytest.approx(total.item(), rel=1e-7, abs=1e-12)
        kept = 0.8 * signal.sigma**2 / (signal.alpha**2 * 0.8 + signal.sigma**2)
        assert signal.spread == pytest.approx(kept, rel=1e-12)
        if variance == "exact":
            assert signal.variance == pytest.approx(kept, rel=1e-7)


# --------------------------------------------------- one particle knows the evidence, at any levels

OPERATOR = torch.tensor([[1.0, -0.5, 0.3], [0.2, 0.7, 1.0]], dtype=torch.float64)
NOISE = torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=torch.float64)
Y = torch.tensor([1.0, -0.5], dtype=torch.float64)


def observe(prior: Diffusion) -> Callable[[], None]:
    def model() -> None:
        law = dist.MultivariateNormal(prior("x").double() @ OPERATOR.T, NOISE)
        pyro.sample("y", law, obs=Y)

    return model


def log_evidence(prior: Diffusion) -> float:
    """log p(y), x_0 being as the chain makes it, from its own x_T on."""
    mean, covariance = moments(prior)
    law = dist.MultivariateNormal(OPERATOR @ mean, OPERATOR @ covariance @ OPERATOR.T + NOISE)
    return float(law.log_prob(Y))


def assert_one_particle_knows(prior: Diffusion, covariance: Any) -> None:
    method = TwistedSMC(
        observe(prior), covariance=covariance, proposal="conjugate", num_particles=1, num_runs=10
    )
    *_, last = method.iterate()
    assert float(last.log_evidence.std()) < 1e-9
    truth = torch.full_like(last.log_evidence, log_evidence(prior))
    torch.testing.assert_close(last.log_evidence, truth, rtol=0, atol=1e-8)


@pytest.mark.parametrize("variance", ["exact", "small", "large"])
@every_schedule
def test_one_particle_knows_the_evidence(schedule: Schedule, variance: Any) -> None:
    isotropic = GaussianDenoiser(MEAN, 0.7)
    prior = Diffusion(isotropic, schedule, num_steps=STEPS, variance=variance)
    assert_one_particle_knows(prior, "scalar")
    assert_one_particle_knows(prior, "jacobian")


@every_schedule
def test_one_particle_knows_the_evidence_of_correlated_data(schedule: Schedule) -> None:
    prior = Diffusion(gaussian(), schedule, num_steps=STEPS, variance="exact")
    assert_one_particle_knows(prior, "jacobian")


@every_schedule
def test_states_in_float32_are_precise_enough(schedule: Schedule) -> None:
    """Weights are those of the states as stored, however much noise there is."""
    data = GaussianDenoiser(MEAN.float(), COVARIANCE.float())
    prior = Diffusion(data, schedule, num_steps=STEPS, variance="exact")
    *_, last = TwistedSMC(observe(prior), num_particles=1, num_runs=20).iterate()
    assert last.x["x"].dtype == torch.float32
    assert float(last.log_evidence.std()) < 1e-5


@pytest.mark.parametrize("covariance", ["scalar", "jacobian"])
def test_one_particle_knows_the_evidence_of_a_team(covariance: Any) -> None:
    """Priors of different noise, seen together through their sum."""
    data = GaussianDenoiser(MEAN, 0.7)
    agents = {
        name: Diffusion(data, schedule, num_steps=STEPS, variance="exact")
        for name, schedule in (("a", VariancePreserving()), ("b", VarianceExploding()))
    }
    team = Team(agents)

    def model() -> None:
        xs = team("x")
        law = dist.MultivariateNormal((xs["a"] + xs["b"]) @ OPERATOR.T, NOISE)
        pyro.sample("y", law, obs=Y)

    method = TwistedSMC(
        model, covariance=covariance, proposal="conjugate", num_particles=1, num_runs=10
    )
    *_, last = method.iterate()
    assert float(last.log_evidence.std()) < 1e-9
    (one, spread_one), (two, spread_two) = (moments(agent) for agent in agents.values())
    total = OPERATOR @ (spread_one + spread_two) @ OPERATOR.T + NOISE
    law = dist.MultivariateNormal(OPERATOR @ (one + two), total)
    truth = law.log_prob(Y).expand(10)
    torch.testing.assert_close(last.log_evidence, truth, rtol=0, atol=1e-8)


class RawEDM(nn.Module):
    """The exact denoiser of N(MEAN, 0.7) behind the preconditioning of Karras et al. (2022)."""

    def __init__(self, sigma_data: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        sigma, s = torch.exp(4 * time[0]), self.sigma_data
        root = torch.sqrt(sigma**2 + s**2)
        noisy = x * root
        x0 = MEAN + 0.7 / (0.7 + sigma**2) * (noisy - MEAN)
        return (x0 - (s / root) ** 2 * noisy) * root / (sigma * s)


@pytest.mark.parametrize("covariance", ["scalar", "jacobian"])
def test_one_particle_knows_the_evidence_through_a_raw_network(covariance: Any) -> None:
    """Variance exploding levels, preconditioning and backward passes, together."""
    prior = Diffusion(
        RawEDM(0.5),
        EDM(),
        (3,),
        STEPS,
        parameterization="edm",
        sigma_data=0.5,
        scale=math.sqrt(0.7),
    )
    exact = Diffusion(GaussianDenoiser(MEAN, 0.7), EDM(), num_steps=STEPS)
    torch.testing.assert_close(moments(prior), moments(exact), rtol=1e-9, atol=1e-12)
    method = TwistedSMC(
        observe(prior),
        covariance=covariance,
        proposal="conjugate",
        damping=0.0,
        num_particles=1,
        num_runs=10,
    )
    *_, last = method.iterate()
    assert float(last.log_evidence.std()) < 1e-9
    truth = torch.full_like(last.log_evidence, log_evidence(exact))
    torch.testing.assert_close(last.log_evidence, truth, rtol=0, atol=1e-8)
